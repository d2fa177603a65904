"""One workload on the device: its problem, its race, how near the answers are."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from bench.absent import Unavailable
from bench.gpu.device import DEVICE, KINDS, REHEARSAL, medians, peak_extra, select
from bench.gpu.rivals import BANK_RIVALS, RIVALS
from bench.problem import Problem, draw, make_bank, plain_forward, relative_error
from bench.rivals.rival import Call
from bench.workloads import BankWorkload, Workload

Row = dict[str, Any]


def make(w: Workload, dtype: torch.dtype) -> Problem:
    """Random values on the device, of the size training starts from."""
    return draw(w, lambda *shape: torch.randn(*shape, device=DEVICE)).to(dtype)


def failed(failure: Exception) -> dict[str, str]:
    return {"failed": f"{type(failure).__name__}: {failure}"[:300]}


def error(problem: Problem, y: Any) -> dict[str, float]:
    """Of the first tasks' outputs, against float64, beside that of plain PyTorch."""
    few = replace(problem, z=problem.z[:32], x=problem.x[:32])
    exact = plain_forward(few.to(torch.float64))
    y = y if isinstance(y, torch.Tensor) else torch.from_dlpack(y)
    return {
        "error": relative_error(y[:32].to(DEVICE), exact),
        "error_of_plain": relative_error(plain_forward(few), exact),
    }


def hold(
    w: Workload, mode: str, kind: str, rivals: tuple[str, ...], limits: dict[str, float]
) -> list[Row]:
    """One race: a row for each rival."""
    dtype = select(kind)
    torch._dynamo.reset()
    problem = make(w, dtype)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name in rivals:
        row = rows[name] = {"workload": w.name, "mode": mode, "kind": kind, "rival": name}
        begin = time.perf_counter()
        try:
            call = RIVALS[name](problem, mode)
            y = call()[0]
            row |= {"first_call_s": time.perf_counter() - begin, **error(problem, y)}
            if name != "jax" and not name.endswith("graph"):  # whose memory PyTorch does not count
                row["peak_extra_bytes"] = peak_extra(call)
            calls[name] = call
        except Unavailable as reason:
            row["absent"] = str(reason)
        except Exception as failure:  # told in the row; the others still race
            row |= failed(failure)
    itemsize = torch.finfo(dtype).bits // 8
    for name, t in medians(calls).items():
        rows[name] |= {
            "seconds": t,
            "flops_share": w.flops(mode) / t / limits[kind],
            "bytes_share": w.bytes(mode, itemsize) / t / limits["copy"],
        }
    return list(rows.values())


def hold_bank(w: BankWorkload, limits: dict[str, float]) -> list[Row]:
    kind = next(iter(KINDS))
    dtype = select(kind)
    problem = make_bank(w, dtype=dtype, device=DEVICE)
    few = replace(problem, x=problem.x[:, :100], task_ids=problem.task_ids[:, :100])
    exact, plain = few.answer("forward", torch.float64)[0], few.answer("forward", dtype)[0]
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for name, serve in BANK_RIVALS.items():
        row = rows[name] = {"workload": w.name, "mode": "forward", "kind": kind, "rival": name}
        if REHEARSAL and name == "bmm compiled":
            row["absent"] = "rehearsal"
            continue
        request = serve(problem)

        def call(request: Any = request) -> tuple[Any, ...]:
            with torch.no_grad():
                pairs = zip(problem.x, problem.task_ids, strict=True)
                return tuple(request(x, ids) for x, ids in pairs)

        try:
            y = torch.stack([t[:100] for t in call()])
            row |= {
                "error": relative_error(y, exact),
                "error_of_plain": relative_error(plain, exact),
            }
            row["peak_extra_bytes"] = peak_extra(call)
            calls[name] = call
        except Exception as failure:
            row |= failed(failure)
    for name, t in medians(calls).items():
        t /= w.requests
        touched = w.bytes("forward", torch.finfo(dtype).bits // 8)
        rows[name] |= {"seconds": t, "bytes_share": touched / t / limits["copy"]}
    return list(rows.values())


def show(row: Row) -> str:
    head = f"{row['workload']:<12} {row['mode']:<16} {row['kind']:<5} {row['rival']:<19}"
    if "seconds" not in row:
        return f"{head} {row.get('absent') or row.get('failed')}"
    flops = row.get("flops_share", math.nan)
    return (
        f"{head} {1e3 * row['seconds']:>10.4f} ms  {flops:>6.1%} of FLOP/s "
        f"{row['bytes_share']:>6.1%} of bandwidth  error {row['error']:.1e}"
    )
