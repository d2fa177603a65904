"""One workload on the device: its problem, its race, how near the answers are."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.absent import Unavailable
from bench.gpu.device import DEVICE, medians, peak_extra, select
from bench.gpu.rivals import GRAPH, LayerProblem, field
from bench.gpu.workloads import Any_, Job, LayerWorkload, PatternBank
from bench.measure.race import rounded
from bench.problem import Problem, draw, make_bank, plain_forward, relative_error
from bench.rivals.rival import Call
from bench.workloads import Workload
from hyperfast.kernels import reference

Row = dict[str, Any]
CHECKED = 32  # tasks, or rows, whose answers are held against fp64


def network(w: Workload, dtype: torch.dtype) -> Problem:
    """Random values on the device, of the size training starts from."""
    return draw(w, lambda *shape: torch.randn(*shape, device=DEVICE)).to(dtype)


def asked(w: PatternBank) -> Tensor:
    """``(requests, rows)``: the tasks that the rows of each request name."""
    tasks, rows = w.bank.tasks, w.bank.rows
    shape = w.bank.requests, rows
    if w.pattern == "distinct":
        one = [torch.randperm(tasks, device=DEVICE) for _ in range(shape[0])]
        return torch.stack([t.repeat(-(-rows // tasks))[:rows] for t in one])
    if w.pattern == "uniform":
        return torch.randint(tasks, shape, device=DEVICE)
    if w.pattern == "skewed":
        chance = torch.arange(1, tasks + 1, dtype=torch.float64, device=DEVICE).pow(-1.5)
        found = torch.multinomial(chance.expand(shape[0], -1), rows, replacement=True)
        return torch.randperm(tasks, device=DEVICE)[found]  # the popular lie anywhere
    return torch.randint(tasks, (shape[0], 1), device=DEVICE).expand(shape).contiguous()


def problem_of(w: Any_, dtype: torch.dtype) -> Any:
    if isinstance(w, PatternBank):
        return replace(make_bank(w.bank, dtype=dtype, device=DEVICE), task_ids=asked(w))
    if isinstance(w, LayerWorkload):
        sides = (w.B, w.ins), (w.B, w.features), (w.outs, w.ins, w.features)
        x, h, head = (torch.randn(*side, device=DEVICE) for side in sides)
        head /= (w.ins * w.features) ** 0.5
        return LayerProblem(w, *(t.to(dtype) for t in (x, h, head)))
    return network(w, dtype)


def some(problem: Any, dtype: torch.dtype) -> Tensor:
    """The first answers, computed plainly in ``dtype``."""
    if isinstance(problem, LayerProblem):
        x, h, head = (t.to(dtype) for t in (problem.x, problem.h, problem.head))
        made = h[:CHECKED], head
        return reference.hyper_linear(x[:CHECKED].unsqueeze(1), *made).squeeze(1)
    if isinstance(problem, Problem):
        few = replace(problem, z=problem.z[:CHECKED], x=problem.x[:CHECKED])
        return plain_forward(few.to(dtype))
    ids = problem.task_ids[:, :CHECKED]
    tasks, local = ids.unique(return_inverse=True)  # lest all the bank be cast
    few = replace(problem, flat=problem.flat[tasks], x=problem.x[:, :CHECKED], task_ids=local)
    return few.answer("forward", dtype)[0]


def given(problem: Any, outputs: tuple[Any, ...]) -> Tensor:
    """The same of what a rival returned."""
    ours = [y if isinstance(y, Tensor) else torch.from_dlpack(y) for y in outputs]
    if isinstance(problem, LayerProblem | Problem):
        return ours[0][:CHECKED].to(DEVICE)
    return torch.stack([y[:CHECKED] for y in ours])


def work(w: Any_, mode: str, problem: Any, itemsize: int) -> tuple[float, float]:
    """FLOPs of the textbook way, and bytes that must be moved."""
    if not isinstance(w, PatternBank):
        return w.flops(mode), w.bytes(mode, itemsize)
    touched = sum(len(ids.unique()) for ids in problem.task_ids)
    rows = problem.task_ids.numel()
    sides = w.bank.sizes[0] + w.bank.sizes[-1]
    flops = w.bank.requests * w.bank.flops(mode)
    return flops, itemsize * (touched * w.bank.P + rows * sides) + 8 * rows


def hold(job: Job, limits: dict[str, float]) -> list[Row]:
    """One race: a row for each rival. Times are of a call, of a bank of one request."""
    w, dtype = job.workload, select(job.kind)
    torch._dynamo.reset()
    problem = problem_of(w, dtype)
    exact, plain = some(problem, torch.float64), some(problem, dtype)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    facts = {"workload": w.name, "mode": job.mode, "kind": job.kind, "bar": job.bar}
    for name, build in field(w, job.thorough).items():
        row = rows[name] = {**facts, "rival": name}
        begin = time.perf_counter()
        try:
            call = build(problem, job.mode)
            row["error"] = relative_error(given(problem, call()), exact)
            row["error_of_plain"] = relative_error(plain, exact)
            row["first_call_s"] = rounded(time.perf_counter() - begin)
            if name != "jax" and not name.endswith(GRAPH):  # whose memory PyTorch does not count
                row["peak_extra_bytes"] = peak_extra(call)
            calls[name] = call
        except Unavailable as reason:
            row["absent"] = str(reason)
        except Exception as failure:  # told in the row; the others still race
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
    flops, moved = work(w, job.mode, problem, dtype.itemsize)
    requests = w.bank.requests if isinstance(w, PatternBank) else 1
    for name, t in medians(calls).items():
        rows[name] |= {
            "seconds": rounded(t / requests),
            "flops_share": rounded(flops / t / limits[job.kind]),
            "bytes_share": rounded(moved / t / limits["copy"]),
        }
    return list(rows.values())
