"""Who takes part on the device: compiled, and captured as a graph, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import hyperfast
from bench.gpu.device import DEVICE, REHEARSAL
from bench.problem import BankProblem, Problem
from bench.rivals import bank, jax, ours, plain
from bench.rivals.rival import Call, Network, torch_rival
from hyperfast.activations import resolve
from hyperfast.bank.formats import format_of
from hyperfast.ops.network import task_mlp


def compiled(mode: str) -> Callable[[Callable[[Problem], Network]], Callable[[Problem], Network]]:
    def wrap(network: Callable[[Problem], Network]) -> Callable[[Problem], Network]:
        def build(problem: Problem) -> Network:
            function, leaves = network(problem)
            options: dict[str, Any] = {"backend": "aot_eager"} if REHEARSAL else {"mode": mode}
            return torch.compile(function, fullgraph=True, dynamic=False, **options), leaves

        return build

    return wrap


def torch_call(network: Callable[[Problem], Network]) -> Callable[[Problem, str], Call]:
    def build(problem: Problem, mode: str) -> Call:
        with torch.device(DEVICE):
            return torch_rival("", "", network).build(problem, mode)

    return build


def graphed(build: Callable[[Problem, str], Call]) -> Callable[[Problem, str], Call]:
    """The whole call, backward too, captured once and replayed: no launch cost is left."""

    def capture(problem: Problem, mode: str) -> Call:
        call = build(problem, mode)
        if REHEARSAL:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()

        def replay() -> tuple[Any, ...]:
            graph.replay()
            return outputs

        return replay

    return capture


def by_host_clock(build: Callable[[Problem, str], Call]) -> Callable[[Problem, str], Call]:
    def wrapped(problem: Problem, mode: str) -> Call:
        call = build(problem, mode)
        call.host_clock = True  # type: ignore[attr-defined]
        return call

    return wrapped


RIVALS: dict[str, Callable[[Problem, str], Call]] = {
    "hyperfast": torch_call(ours.hyper_mlp),
    "hyperfast graph": graphed(torch_call(ours.hyper_mlp)),
    "hyperfast compiled": torch_call(compiled("default")(ours.hyper_mlp)),
    "bmm": torch_call(plain.bmm),
    "bmm graph": graphed(torch_call(plain.bmm)),
    "bmm compiled": torch_call(compiled("default")(plain.bmm)),
    "bmm by layer compiled": torch_call(compiled("default")(plain.bmm_by_layer)),
    "bmm max-autotune": torch_call(compiled("max-autotune")(plain.bmm)),
    "vmap": torch_call(plain.vmap_functional_call),
    "jax": by_host_clock(jax.build),
}


def stored_networks(
    dtype: torch.dtype | None = None,
) -> Callable[[BankProblem], bank.Request]:
    """One op for whole networks, on weights as they are or as steps of int8."""

    def serve(problem: BankProblem) -> bank.Request:
        w, weight, scales = problem.workload, problem.flat, None
        if dtype is not None:
            weight, scales = format_of(hyperfast.MLPSpec(w.sizes), dtype).encode(weight)
            scales = scales.to(problem.flat.dtype)
        names = [w.activation] * (len(w.sizes) - 2) + ["identity"]
        text = hyperfast.MLPSpec(w.sizes).describe([resolve(name) for name in names])
        return lambda x, ids: task_mlp(x, weight, scales, ids, text)

    return serve


BANK_RIVALS = {
    "hyperfast": stored_networks(),
    "hyperfast int8": stored_networks(torch.int8),
    "hyperfast by layer": bank.fused,
    "bmm": bank.gather_bmm,
    "bmm compiled": bank.gather_bmm_compiled,
}
