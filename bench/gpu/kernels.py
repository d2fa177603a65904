"""What the choices of the GPU plans rest on: layers by each plan, networks in one kernel or by
their layers, configurations of the kernels, the cost of a launch."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product
from statistics import median
from typing import Any

import torch
from torch import nn

from bench.gpu.contest import Row, network
from bench.gpu.device import DEVICE, KINDS, REHEARSAL, host_seconds, medians, select
from bench.gpu.rivals import NETWORKS
from bench.gpu.workloads import FEW, MANY, tiny_network
from bench.rivals.rival import Call
from bench.workloads import MODES
from hyperfast.functional import hyper_linear
from hyperfast.layout import MLPSpec
from hyperfast.ops.network import hyper_mlp
from hyperfast.plans import gpu
from hyperfast.plans.choose import choose
from hyperfast.plans.sizes import PLANS, Sizes


def plan_times() -> list[Row]:
    """One layer by each plan, forward: what the model of hyperfast.plans has to order."""
    rows = []
    b, i, o, k = (3, 5, 4, 4) if REHEARSAL else (4096, 128, 128, 64)
    for kind, n in product(KINDS, (1, 2) if REHEARSAL else (1, 2, 4, 8, 16, 64)):
        dtype = select(kind)
        x, h = (torch.randn(*s, device=DEVICE, dtype=dtype) for s in ((b, n, i), (b, k)))
        weight = torch.randn(o * i + o, k, device=DEVICE, dtype=dtype) / 10
        bias = torch.randn(o * i + o, device=DEVICE, dtype=dtype)
        calls: dict[str, Call] = {
            plan: lambda p=plan, a=(x, h, weight, bias): (hyper_linear(*a, plan=p),)  # type: ignore[misc]
            for plan in PLANS
        }
        times = medians(calls, rounds=3)
        layer = Sizes(b, b * n, i, o, k)
        chosen = choose(layer, dtype, gpu.arithmetic(dtype))
        rate = 2 * layer.rows * layer.params * k / times["contract"]
        found = {"kind": kind, "rows_a_task": n, "chosen": chosen, "flops_per_s": rate}
        rows.append(found | times)
    return sorted(rows, key=lambda row: -row["rows_a_task"])  # a kind's last: of one row a task


def network_times() -> list[Row]:
    """Whole networks, forward, in one kernel and by their layers: what gpu.one_kernel
    has to choose between."""
    found = []
    chosen, networks = gpu.one_kernel, ((64, 64, 10), (2, 64, 64, 1), (8, 32, 1))
    k, counts = (4, (3,)) if REHEARSAL else (64, (1024, 8192, 65536))
    try:
        for kind, sizes, rows in product(KINDS, networks, counts):
            sizes = tuple(min(s, 5) for s in sizes) if REHEARSAL else sizes
            dtype = select(kind)
            params = sum(o * (i + 1) for i, o in pairwise(sizes))
            shapes = (rows, 1, sizes[0]), (rows, k), (params, k), (params,)
            tensors = [torch.randn(*s, device=DEVICE).div_(10).to(dtype) for s in shapes]
            text = MLPSpec(sizes).describe([nn.ReLU()] * (len(sizes) - 2) + [None])

            def run(whole: bool, a: Any = (*tensors, None, text, False)) -> Any:
                gpu.one_kernel = lambda *_: whole
                return hyper_mlp(*a)

            calls: dict[str, Call] = {
                "layers": partial(run, False),
                "one kernel": partial(run, True),
            }
            times = medians(calls, rounds=3)
            layers = tuple(Sizes(rows, rows, i, o, k) for i, o in pairwise(sizes))
            whole = chosen(layers, dtype.itemsize, gpu.arithmetic(dtype))
            row = {"kind": kind, "sizes": sizes, "rows": rows, "one_kernel_chosen": whole}
            found.append(row | times)
    finally:
        gpu.one_kernel = chosen
    return found


def config_times() -> dict[str, dict[str, float]]:
    """Milliseconds of every configuration of the kernels, for the layers of the two workloads."""
    from hyperfast.kernels.triton import launch

    found: dict[str, dict[str, float]] = {}
    measured: list[float] = []
    clock, pick = launch.milliseconds, launch.run

    def milliseconds(call: Any, repeats: int = 5) -> float:
        measured.append(1e3 * medians({"": call}, 1)[""] if REHEARSAL else clock(call, repeats))
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
            NETWORKS["hyperfast"](network(tiny_network(w) if REHEARSAL else w, dtype), MODES[1])()
    finally:
        launch.milliseconds, launch.run, launch.AUTOTUNE = clock, pick, False
        launch.tuned.clear()
    return found


def sort_time() -> float:
    """Seconds of the device to sort 16,384 rows by their task, as the kernels do."""
    keys = torch.randint(100_000, (16_384,), dtype=torch.int32, device=DEVICE)
    return medians({"": lambda: tuple(keys.sort(stable=True))})[""]


def launch_times() -> dict[str, float]:
    """Seconds of the host a call, for 8 tasks: a fused layer, what was compiled for it called
    directly and launched by Triton; one by two products, a network."""
    from hyperfast.kernels.triton import direct

    x, h = torch.randn(8, 1, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    weight = torch.randn(16 * 17, 16, device=DEVICE)
    two = torch.randn(2 * 16 * 17, 16, device=DEVICE)

    def library() -> tuple[Any, ...]:
        flat = torch.nn.functional.linear(h, weight)
        w, b = flat[:, :256].view(8, 16, 16), flat[:, 256:]
        return (torch.baddbmm(b.unsqueeze(1), x, w.mT),)

    def layer() -> tuple[Any, ...]:
        return (hyper_linear(x, h, weight, None, plan="contract"),)

    def by_triton() -> tuple[Any, ...]:
        why, direct.WHY_NOT = direct.WHY_NOT, "to compare"
        try:
            return layer()
        finally:
            direct.WHY_NOT = why

    calls: dict[str, Call] = {
        "hyper_linear": layer,
        "hyper_linear launched by Triton": by_triton,
        "linear and baddbmm": library,
        "hyper_mlp": lambda: hyper_mlp(x, h, two, None, None, "16 > 16 b relu, 16 b", False),
    }
    times = {}
    for name, call in calls.items():
        call()
        times[name] = median(host_seconds(call, 3 if REHEARSAL else 100) for _ in range(5))
        if not REHEARSAL:
            torch.cuda.synchronize()
    return times
