"""Given weights of many tasks, mixed rows: who takes part, by the names of the other races."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.absent import require
from bench.problem import ACTIVATIONS, BankProblem, target_weights
from bench.rivals.plain import apply_bmm
from bench.rivals.rival import Call, Rival, on_one_thread
from bench.workloads import BankWorkload

# x (rows, in), task_ids (rows,) -> y (rows, out)
Request = Callable[[Tensor, Tensor], Tensor]


def bank_rival(
    name: str,
    about: str,
    serve: Callable[[BankProblem], Request],
    dtype: torch.dtype = torch.float32,
) -> Rival:
    def build(problem: BankProblem, mode: str) -> Call:
        request = serve(problem)

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                pairs = zip(problem.x, problem.task_ids, strict=True)
                return (torch.stack([request(x, ids) for x, ids in pairs]),)

        return call

    return Rival(name, about, build, dtype)


def fused(problem: BankProblem) -> Request:
    import hyperfast

    target = hyperfast.TargetNet(problem.workload.activation)
    weights = [t for layer in target_weights(problem.flat, problem.workload) for t in layer]
    return lambda x, ids: target(x, weights, task_ids=ids)


def task_bank(problem: BankProblem) -> Request:
    import hyperfast

    sizes = problem.workload.sizes
    target = hyperfast.TargetNet(problem.workload.activation)
    return hyperfast.TaskBank.from_weights(hyperfast.MLPSpec(sizes), problem.flat, target=target)


def loop(problem: BankProblem) -> Request:
    """Sorts the rows, then serves one task after another."""
    layers = target_weights(problem.flat, problem.workload)
    activation = ACTIVATIONS[problem.workload.activation]

    def request(x: Tensor, ids: Tensor) -> Tensor:
        ids, order = ids.sort()
        tasks, counts = ids.unique_consecutive(return_counts=True)
        outputs = []
        for task, rows in zip(tasks.tolist(), x[order].split(counts.tolist()), strict=True):
            for index, (weight, bias) in enumerate(layers):
                rows = linear(rows if index == 0 else activation(rows), weight[task], bias[task])
            outputs.append(rows)
        joined = torch.cat(outputs)
        return torch.empty_like(joined).index_copy_(0, order, joined)

    return request


def gather_bmm(problem: BankProblem) -> Request:
    """The weights of each row in one copy, a contiguous piece a row, then baddbmm a layer."""
    w, flat = problem.workload, problem.flat

    def request(x: Tensor, ids: Tensor) -> Tensor:
        layers = target_weights(flat.index_select(0, ids), w)
        return apply_bmm(w, layers, x.unsqueeze(1)).squeeze(1)

    return request


def gather_bmm_compiled(problem: BankProblem) -> Request:
    return torch.compile(gather_bmm(problem), fullgraph=True, dynamic=False)


def jax_build(problem: BankProblem, mode: str) -> Call:
    jax = require("jax")
    jnp = jax.numpy
    w: BankWorkload = problem.workload
    activation = {"relu": jax.nn.relu, "sin": jnp.sin}[w.activation]
    device = jax.devices("cpu")[0]
    flat, x, ids = (
        jax.device_put(t.numpy(), device)
        for t in (problem.flat, problem.x, problem.task_ids.to(torch.int32))
    )

    def one_row(flat: Any, x: Any, task: Any) -> Any:
        weights, offset = flat[task], 0
        for index, (i, o) in enumerate(w.layers):
            x = x if index == 0 else activation(x)
            matrix = weights[offset : offset + i * o].reshape(o, i)
            bias = weights[offset + i * o : offset + i * o + o]
            x, offset = matrix @ x + bias, offset + i * o + o
        return x

    serve = jax.jit(jax.vmap(one_row, in_axes=(None, 0, 0)))
    requests = list(zip(x, ids, strict=True))

    def call() -> tuple[Any, ...]:
        outputs = [serve(flat, rows, tasks).block_until_ready() for rows, tasks in requests]
        return (jnp.stack(outputs).block_until_ready(),)

    return call


OURS = bank_rival("hyperfast", "TargetNet with task_ids", fused)
BANK_RIVALS = {
    r.name: r
    for r in (
        OURS,
        on_one_thread(OURS),
        bank_rival("hyperfast bf16", "the same on a bank in bfloat16", fused, torch.bfloat16),
        bank_rival("hyperfast TaskBank", "TaskBank.from_weights", task_bank),
        bank_rival("loop", "rows sorted, then a Python loop over tasks", loop),
        bank_rival("bmm", "the weights of every row gathered, then baddbmm", gather_bmm),
        bank_rival("bmm compiled", "the same under torch.compile", gather_bmm_compiled),
        Rival("jax", "jit(vmap) of gather and apply", jax_build),
    )
}
