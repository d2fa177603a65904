"""The GPU workloads: hyperfast beside its rivals, and both beside what the machine can do.

Run by bench/gpu.sh. Rivals take turns; a time is the median over turns of CUDA events around a few
calls. What does not fit the time is left out, and listed as such. One JSON file holds it all.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hyperfast
from bench.measure import machine
from bench.problem import BankProblem, Problem, plain_forward, relative_error
from bench.rivals import bank as bank_rivals
from bench.rivals import jax as jax_rival
from bench.rivals import plain as torch_rivals
from bench.rivals.ours import hyper_mlp
from bench.rivals.rival import Call, Network, Unavailable, torch_rival
from bench.workloads import MODES, WORKLOADS, BankWorkload, Workload
from hyperfast.bank.formats import format_of
from hyperfast.functional import hyper_linear
from hyperfast.ops.network import hyper_mlp as mlp_op
from hyperfast.ops.network import task_mlp
from hyperfast.plans import choose as plans

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
SECONDS = 240  # for everything here
ROUNDS = 5

FEW = Workload("few128", B=4096, N=1, z_dim=32, H=64, sizes=(128, 128, 128))
MANY = Workload("many64", B=65536, N=1, z_dim=32, H=64, sizes=(64, 64, 10))
BANK = BankWorkload("bank100000", tasks=100_000, rows=65_536, sizes=(64, 64, 10), requests=2)
TABLE = [
    w.scaled(8) for w in WORKLOADS.values() if isinstance(w, Workload) and w.B > 1
]  # the CPU's

# Kinds of arithmetic: dtype, and whether fp32 products may be rounded to TF32.
KINDS = {
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
    "fp64": (torch.float64, "highest"),
}
if REHEARSAL:  # the interpreter has no bf16
    del KINDS["bf16"]


def jobs() -> Iterator[tuple[Workload, str, str, tuple[str, ...]]]:
    """Workload, mode, kind and rivals, the most telling first."""
    best = next(iter(KINDS))
    slow = ("hyperfast graph", "bmm graph", "bmm compiled")
    for w, mode in product((FEW, MANY), MODES):
        yield w, mode, best, tuple(RIVALS)
    for n in (2, 4, 8, 16, 64, 256):
        yield replace(FEW, name=f"few128_n{n}", N=n), "forward", best, slow
    for w, kind, mode in product((FEW, MANY), ("tf32", "fp32"), MODES):
        yield w, mode, kind, slow
    for w, mode in product(TABLE, MODES):
        yield w, mode, best, slow
    for n in (2, 4, 16):
        yield replace(FEW, name=f"few128_n{n}", N=n), "forward+backward", best, slow


def tiny(w: Workload) -> Workload:
    sizes = tuple(min(s, 5) for s in w.sizes)
    return replace(w, B=3, N=min(w.N, 2), z_dim=3, H=4, sizes=sizes)


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


RIVALS: dict[str, Callable[[Problem, str], Call]] = {
    "hyperfast": torch_call(hyper_mlp),
    "hyperfast graph": graphed(torch_call(hyper_mlp)),
    "hyperfast compiled": torch_call(compiled("default")(hyper_mlp)),
    "bmm": torch_call(torch_rivals.bmm),
    "bmm graph": graphed(torch_call(torch_rivals.bmm)),
    "bmm compiled": torch_call(compiled("default")(torch_rivals.bmm)),
    "bmm by layer compiled": torch_call(compiled("default")(torch_rivals.bmm_by_layer)),
    "bmm max-autotune": torch_call(compiled("max-autotune")(torch_rivals.bmm)),
    "vmap": torch_call(torch_rivals.vmap_functional_call),
    "jax": jax_rival.build,
}


def stored_networks(
    dtype: torch.dtype | None = None,
) -> Callable[[BankProblem], bank_rivals.Request]:
    """One op for whole networks, on weights as they are or as steps of int8."""

    def serve(problem: BankProblem) -> bank_rivals.Request:
        w, weight, affine = problem.workload, problem.flat, None
        if dtype is not None:
            weight, affine = format_of(hyperfast.MLPSpec(w.sizes), dtype).encode(weight)
            affine = affine.to(problem.flat.dtype)
        names = ",".join([w.activation] * (len(w.sizes) - 2) + ["identity"])
        return lambda x, ids: task_mlp(x, weight, affine, ids, w.sizes, True, names)

    return serve


BANK_RIVALS = {
    "hyperfast": stored_networks(),
    "hyperfast int8": stored_networks(torch.int8),
    "hyperfast by layer": bank_rivals.fused,
    "bmm": bank_rivals.gather_bmm,
    "bmm compiled": bank_rivals.gather_bmm_compiled,
}


def select(kind: str) -> torch.dtype:
    """Sets the precision of fp32 products by the older interface, which compilers read too."""
    dtype, precision = KINDS[kind]
    torch.set_float32_matmul_precision(precision)
    return dtype


def make(w: Workload, dtype: torch.dtype) -> Problem:
    """Random values on the device, of the size training starts from."""

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).mul_(std).to(dtype)

    fans = torch.cat([torch.full((i * o + o,), float(i)) for i, o in w.layers]).to(DEVICE)
    return Problem(
        w,
        trunk_weight=normal(w.H, w.z_dim, std=w.z_dim**-0.5),
        trunk_bias=normal(w.H, std=0.1),
        head_weight=(normal(w.P, w.H) / fans.mul(w.H).sqrt()[:, None]).to(dtype),
        head_bias=(normal(w.P) / fans.sqrt()).to(dtype),
        z=normal(w.B, w.z_dim),
        x=normal(w.B, w.N, w.sizes[0]),
        grad=normal(w.B, w.N, w.sizes[-1]),
    )


def error(problem: Problem, y: Any) -> dict[str, float]:
    """Of the first tasks' outputs, against float64, beside that of plain PyTorch."""
    few = replace(problem, z=problem.z[:32], x=problem.x[:32])
    exact = plain_forward(few.to(torch.float64))
    y = y if isinstance(y, torch.Tensor) else torch.from_dlpack(y)
    return {
        "error": relative_error(y[:32].to(DEVICE), exact),
        "error_of_plain": relative_error(plain_forward(few), exact),
    }


def seconds(call: Call, count: int) -> float:
    """Mean of a few calls in a row."""
    if REHEARSAL:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def host_seconds(call: Call, count: int) -> float:
    """The same by the clock on the wall: for what does not run on PyTorch's stream."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def race(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians over rounds; in each, everyone has a call that is not timed, then a turn of 5 ms."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            clock = host_seconds if name == "jax" else seconds
            count = min(max(int(5e-3 / clock(calls[name], 1)), 1), 50)
            samples[name].append(clock(calls[name], count))
    return {name: median(times) for name, times in samples.items()}


def peak_extra(call: Call) -> int | None:
    """Bytes allocated at most during a call, on top of what lives and of what it returns."""
    if REHEARSAL:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    kept = sum(t.nbytes for t in outputs)
    return max(torch.cuda.max_memory_allocated() - before - kept, 0)


def ceilings() -> dict[str, float]:
    """FLOP/s of a library's product of random matrices of each kind; bytes/s read and written."""
    found = {}
    n = 64 if REHEARSAL else 8192
    for kind in KINDS:
        dtype = select(kind)
        size = n // 2 if kind in ("fp32", "fp64") else n
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        times = race({"": lambda a=a, b=b: (a @ b,)})  # type: ignore[misc]
        found[kind] = 2 * size**3 / times[""]
    source = torch.randn(1 << (16 if REHEARSAL else 30), device=DEVICE)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / race({"": lambda: (target.copy_(source),)})[""]
    return found


def hold(
    w: Workload, mode: str, kind: str, rivals: tuple[str, ...], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """One race: a row for each rival."""
    dtype = select(kind)
    torch._dynamo.reset()
    problem = make(w, dtype)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in rivals:
        row = rows[name] = {"workload": w.name, "mode": mode, "kind": kind, "rival": name}
        begin = time.perf_counter()
        try:
            call = RIVALS[name](problem, mode)
            y = call()[0]
            row |= {"first_call_s": time.perf_counter() - begin, **error(problem, y)}
            if name != "jax" and not name.endswith("graph"):
                row["peak_extra_bytes"] = peak_extra(call)
            calls[name] = call
        except Unavailable as reason:
            row["absent"] = str(reason)
        except Exception as failure:  # told in the row; the others still race
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
    itemsize = torch.finfo(dtype).bits // 8
    for name, t in race(calls).items():
        rows[name] |= {
            "seconds": t,
            "flops_share": w.flops(mode) / t / limits[kind],
            "bytes_share": w.bytes(mode, itemsize) / t / limits["copy"],
        }
    return list(rows.values())


def hold_bank(w: BankWorkload, limits: dict[str, float]) -> list[dict[str, Any]]:
    kind = next(iter(KINDS))
    dtype = select(kind)
    fans = torch.cat([torch.full((i * o + o,), float(i)) for i, o in w.layers]).to(DEVICE)
    problem = BankProblem(
        w,
        torch.randn(w.tasks, w.P, device=DEVICE, dtype=dtype).div_(fans.sqrt().to(dtype)),
        torch.randn(w.requests, w.rows, w.sizes[0], device=DEVICE, dtype=dtype),
        torch.randint(w.tasks, (w.requests, w.rows), device=DEVICE),
    )
    few = replace(problem, x=problem.x[:, :100], task_ids=problem.task_ids[:, :100])
    exact, plain = few.answer("forward", torch.float64)[0], few.answer("forward", dtype)[0]
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
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
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
    for name, t in race(calls).items():
        t /= w.requests
        touched = w.bytes("forward", torch.finfo(dtype).bits // 8)
        rows[name] |= {"seconds": t, "bytes_share": touched / t / limits["copy"]}
    return list(rows.values())


def plan_times() -> list[dict[str, Any]]:
    """One layer by each plan, forward: what the model of hyperfast.plans.choose has to order."""
    rows = []
    b, i, o, k = (3, 5, 4, 4) if REHEARSAL else (4096, 128, 128, 64)
    for kind, n in product(KINDS, (1, 2) if REHEARSAL else (1, 2, 4, 8, 16, 64)):
        dtype = select(kind)
        x, h = (torch.randn(*s, device=DEVICE, dtype=dtype) for s in ((b, n, i), (b, k)))
        weight = torch.randn(o * i + o, k, device=DEVICE, dtype=dtype) / 10
        bias = torch.randn(o * i + o, device=DEVICE, dtype=dtype)
        calls: dict[str, Call] = {
            plan: lambda p=plan, a=(x, h, weight, bias): (hyper_linear(*a, plan=p),)  # type: ignore[misc]
            for plan in plans.PLANS
        }
        times = race(calls, rounds=3)
        layer = plans.Layer(b, b * n, i, o, k)
        chosen = plans.choose(layer, x.element_size(), plans.arithmetic(dtype))
        rows.append({"kind": kind, "rows_a_task": n, "chosen": chosen, **times})
    return rows


def network_times() -> list[dict[str, Any]]:
    """Whole networks, forward, in one kernel and by their layers: what plans.one_kernel
    has to choose between."""
    found = []
    chosen, networks = plans.one_kernel, ((64, 64, 10), (2, 64, 64, 1), (8, 32, 1))
    k, counts = (4, (3,)) if REHEARSAL else (64, (1024, 8192, 65536))
    try:
        for kind, sizes, rows in product(KINDS, networks, counts):
            sizes = tuple(min(s, 5) for s in sizes) if REHEARSAL else sizes
            dtype = select(kind)
            params = sum(o * (i + 1) for i, o in pairwise(sizes))
            shapes = (rows, 1, sizes[0]), (rows, k), (params, k), (params,)
            tensors = [torch.randn(*s, device=DEVICE).div_(10).to(dtype) for s in shapes]
            names = ",".join(["relu"] * (len(sizes) - 2) + ["identity"])

            def run(whole: bool, a: Any = (*tensors, None, sizes, True, names, False)) -> Any:
                plans.one_kernel = lambda *_: whole  # type: ignore[assignment]
                return mlp_op(*a)

            calls: dict[str, Call] = {
                "layers": partial(run, False),
                "one kernel": partial(run, True),
            }
            times = race(calls, rounds=3)
            layers = tuple(plans.Layer(rows, rows, i, o, k) for i, o in pairwise(sizes))
            whole = chosen(layers, dtype.itemsize, plans.arithmetic(dtype))
            row = {"kind": kind, "sizes": sizes, "rows": rows, "one_kernel_chosen": whole}
            found.append(row | times)
    finally:
        plans.one_kernel = chosen
    return found


def config_times() -> dict[str, dict[str, float]]:
    """Milliseconds of every configuration of the kernels, for the layers of the two workloads."""
    from hyperfast.kernels.triton import launch

    found: dict[str, dict[str, float]] = {}
    measured: list[float] = []
    clock, pick = launch.milliseconds, launch.run

    def milliseconds(call: Any, repeats: int = 5) -> float:
        measured.append(1e3 * race({"": call}, 1)[""] if REHEARSAL else clock(call, repeats))
        return measured[-1]

    def run(table: Any, programs: Any, launch: Any, key: Any, device: Any) -> None:
        measured.clear()
        pick(table, programs, launch, key, device)
        if measured:
            names = [",".join(map(str, config)) for config in table]
            found[str(key)] = dict(zip(names, measured, strict=True))

    launch.milliseconds, launch.run, launch.AUTOTUNE = milliseconds, run, True
    dtype = select(next(iter(KINDS)))
    try:
        for w in (FEW, MANY):
            torch_call(hyper_mlp)(make(tiny(w) if REHEARSAL else w, dtype), MODES[1])()
    finally:
        launch.milliseconds, launch.run, launch.AUTOTUNE = clock, pick, False
        launch.tuned.clear()
    return found


def launch_times() -> dict[str, float]:
    """Seconds of the host a call, for 8 tasks: a fused layer, one by two products, a network."""
    x, h = torch.randn(8, 1, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    weight = torch.randn(16 * 17, 16, device=DEVICE)
    two = torch.randn(2 * 16 * 17, 16, device=DEVICE)

    def library() -> tuple[Any, ...]:
        flat = torch.nn.functional.linear(h, weight)
        w, b = flat[:, :256].view(8, 16, 16), flat[:, 256:]
        return (torch.baddbmm(b.unsqueeze(1), x, w.mT),)

    calls: dict[str, Call] = {
        "hyper_linear": lambda: (hyper_linear(x, h, weight, None, plan="contract"),),
        "linear and baddbmm": library,
        "hyper_mlp": lambda: mlp_op(
            x, h, two, None, None, (16, 16, 16), True, "relu,identity", False
        ),
    }
    times = {}
    for name, call in calls.items():
        call()
        times[name] = median(host_seconds(call, 3 if REHEARSAL else 100) for _ in range(5))
        if not REHEARSAL:
            torch.cuda.synchronize()
    return times


def show(row: dict[str, Any]) -> str:
    head = f"{row['workload']:<12} {row['mode']:<16} {row['kind']:<5} {row['rival']:<19}"
    if "seconds" not in row:
        return f"{head} {row.get('absent') or row.get('failed')}"
    flops = row.get("flops_share", math.nan)
    return (
        f"{head} {1e3 * row['seconds']:>10.4f} ms  {flops:>6.1%} of FLOP/s "
        f"{row['bytes_share']:>6.1%} of bandwidth  error {row['error']:.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, interpreted on the CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tests-exit", type=int, help="how the tests before this ended")
    args = parser.parse_args()
    if args.rehearse != REHEARSAL:
        parser.error("--rehearse goes with TRITON_INTERPRET=1: use bench/gpu.sh")
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs without")
    begin = time.perf_counter()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "date": machine.today(),
        "commit": machine.commit(),
        "device": platform.processor() if REHEARSAL else torch.cuda.get_device_name(),
        "versions": machine.versions(),
        "rehearsal": REHEARSAL,
        "tests_exit": args.tests_exit,
        "left_out": [],
        "failed": [],
        "rows": [],
    }

    def save() -> None:
        result["seconds"] = time.perf_counter() - begin
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    def step(name: str, key: str, work: Callable[[], Any]) -> None:
        """Runs one part, unless the time is up; a failure is told, and the next part runs."""
        if time.perf_counter() - begin > SECONDS - 25:
            result["left_out"].append(name)
            return
        try:
            found = work()
        except Exception as failure:
            result["failed"].append(f"{name}: {type(failure).__name__}: {failure}"[:500])
            print(result["failed"][-1])
        else:
            if key == "rows":
                result[key] += found
                print("\n".join(map(show, found)))
            else:
                result[key] = found
                print(key, json.dumps(found))
        gc.collect()
        if not REHEARSAL:
            torch.cuda.empty_cache()
        save()

    with hyperfast.use_backend("triton"):
        step("ceilings", "ceilings", ceilings)
        step("launch", "launch_seconds", launch_times)
        limits = result.get("ceilings", {})
        todo = list(jobs())
        for number, (w, mode, kind, rivals) in enumerate(todo):
            if number == 4:
                bank = replace(BANK, tasks=9, rows=20, sizes=(5, 4, 3)) if REHEARSAL else BANK
                step(bank.name, "rows", partial(hold_bank, bank, limits))
                step("plans", "plans", plan_times)
                step("networks", "networks", network_times)
                step("configurations", "configurations", config_times)
            w = tiny(w) if REHEARSAL else w
            step(
                f"{w.name} {mode} {kind}",
                "rows",
                partial(hold, w, mode, kind, rivals, limits),
            )
    save()
    print(f"{len(result['rows'])} rows, {len(result['left_out'])} left out, in {args.out}")
    broken = [r for r in result["rows"] if r["rival"].startswith("hyperfast") and "failed" in r]
    return bool(result["failed"] or broken)


if __name__ == "__main__":
    sys.exit(main())
