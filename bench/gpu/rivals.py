"""Who takes part on the device: compiled, and captured as a graph, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfast
from bench.absent import Unavailable, require
from bench.gpu.device import DEVICE, REHEARSAL
from bench.gpu.workloads import Any_, LayerWorkload, PatternBank
from bench.problem import BankProblem, Problem, target_weights
from bench.rivals import bank, jax, ours, plain
from bench.rivals.rival import Call, Network, torch_rival
from hyperfast.functional import hyper_linear

GRAPH = " graph"  # the end of a name


@dataclass(frozen=True)
class LayerProblem:
    workload: LayerWorkload
    x: Tensor  # (B, in)
    h: Tensor  # (B, K)
    head: Tensor  # (O, I, K)


Build = Callable[[Any, str], Call]


def compiled(mode: str) -> Callable[[Callable[[Problem], Network]], Callable[[Problem], Network]]:
    def wrap(network: Callable[[Problem], Network]) -> Callable[[Problem], Network]:
        def build(problem: Problem) -> Network:
            function, leaves = network(problem)
            return faster(function, mode), leaves

        return build

    return wrap


def faster(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    options: dict[str, Any] = {"backend": "aot_eager"} if REHEARSAL else {"mode": mode}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def torch_call(network: Callable[[Problem], Network]) -> Build:
    """Modules that a rival makes are on the device, and of the problem's dtype."""

    def build(problem: Problem, mode: str) -> Call:
        before = torch.get_default_dtype()
        torch.set_default_dtype(problem.dtype)
        try:
            with torch.device(DEVICE):
                return torch_rival("", "", network).build(problem, mode)
        finally:
            torch.set_default_dtype(before)

    return build


def graphed(build: Build) -> Build:
    """The whole call, backward too, captured once and replayed: no launch cost is left."""

    def capture(problem: Any, mode: str) -> Call:
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

        replay.call = call  # type: ignore[attr-defined]  # what the graph reads lives as long
        return replay

    return capture


def by_host_clock(build: Build) -> Build:
    def wrapped(problem: Any, mode: str) -> Call:
        call = build(problem, mode)
        call.host_clock = True  # type: ignore[attr-defined]
        return call

    return wrapped


def requests(serve: Callable[[BankProblem], bank.Request]) -> Build:
    """A call answers all requests, one after another."""

    def build(problem: BankProblem, mode: str) -> Call:
        request = serve(problem)
        pairs = list(zip(problem.x, problem.task_ids, strict=True))

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(request(x, ids) for x, ids in pairs)

        return call

    return build


def task_bank(dtype: torch.dtype | None = None) -> Callable[[BankProblem], bank.Request]:
    def serve(problem: BankProblem) -> bank.Request:
        spec = hyperfast.MLPSpec(problem.workload.sizes)
        return hyperfast.TaskBank.from_weights(spec, problem.flat, dtype=dtype)

    return serve


def gather_compiled(problem: BankProblem) -> bank.Request:
    return faster(bank.gather_bmm(problem))


MOST_GROUPS = 1023  # of torch._grouped_mm


def grouped_mm(problem: BankProblem) -> bank.Request:
    """Rows sorted by task, then a grouped product a layer, whose widths are padded to 16 bytes."""
    w = problem.workload
    if problem.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        raise Unavailable("torch._grouped_mm takes bfloat16 alone")
    if w.tasks > MOST_GROUPS:
        raise Unavailable(f"torch._grouped_mm takes {MOST_GROUPS} groups at most")
    layers = []
    for weight, bias in target_weights(problem.flat, w):
        pad = -weight.shape[1] % 8
        layers.append((F.pad(weight, (0, 0, 0, pad)).contiguous().mT, F.pad(bias, (0, pad))))
    tasks = torch.arange(w.tasks, device=problem.flat.device)

    def request(x: Tensor, ids: Tensor) -> Tensor:
        keys, order = ids.sort()
        ends = torch.searchsorted(keys, tasks, right=True).int()
        rows = x.index_select(0, order)
        for n, (weight, bias) in enumerate(layers):
            rows = torch._grouped_mm(rows if n == 0 else rows.relu(), weight, offs=ends)
            rows = rows + bias.index_select(0, keys)
        rows = rows[:, : w.sizes[-1]]
        return torch.empty_like(rows).index_copy_(0, order, rows)

    return request


def layer(make: Callable[[LayerProblem], Callable[[Tensor, Tensor], Tensor]]) -> Build:
    def build(problem: LayerProblem, mode: str) -> Call:
        function = make(problem)

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(problem.x, problem.h),)

        return call

    return build


def _hyper_linear(p: LayerProblem) -> Callable[[Tensor, Tensor], Tensor]:
    flat = p.head.flatten(0, 1)
    return lambda x, h: hyper_linear(x.unsqueeze(1), h, flat, None, target_bias=False).squeeze(1)


def _layer_bmm(p: LayerProblem) -> Callable[[Tensor, Tensor], Tensor]:
    flat, shape = p.head.flatten(0, 1), p.head.shape[:2]
    return lambda x, h: torch.bmm(F.linear(h, flat).unflatten(1, shape), x.unsqueeze(2)).squeeze(2)


def _bilinear(p: LayerProblem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, h: F.bilinear(x, h, p.head)


def _e3nn(p: LayerProblem) -> Callable[[Tensor, Tensor], Tensor]:
    """A fully connected tensor product of scalars is this layer; it divides by sqrt(I K)."""
    o3 = require("e3nn.o3")
    outs, ins, features = p.head.shape
    sides = f"{ins}x0e", f"{features}x0e", f"{outs}x0e"
    product = o3.FullyConnectedTensorProduct(*sides, internal_weights=False, shared_weights=True)
    product = product.to(p.x.device, p.x.dtype)
    weight = p.head.permute(1, 2, 0).flatten() * (ins * features) ** 0.5
    return lambda x, h: product(x, h, weight)


# In each table the first are ours.
NETWORKS: dict[str, Build] = {
    "hyperfast": torch_call(ours.hyper_mlp),
    "hyperfast graph": graphed(torch_call(ours.hyper_mlp)),
    "bmm": torch_call(plain.bmm),
    "bmm graph": graphed(torch_call(plain.bmm)),
    "hyperfast compiled": torch_call(compiled("default")(ours.hyper_mlp)),
    "bmm compiled": torch_call(compiled("default")(plain.bmm)),
    "bmm by layer compiled": torch_call(compiled("default")(plain.bmm_by_layer)),
    "bmm max-autotune": torch_call(compiled("max-autotune-no-cudagraphs")(plain.bmm)),
    "vmap": torch_call(plain.vmap_functional_call),
    "jax": by_host_clock(jax.build),
}
BANKS: dict[str, Build] = {
    "hyperfast": requests(task_bank()),
    "hyperfast graph": graphed(requests(task_bank())),
    "hyperfast int8": requests(task_bank(torch.int8)),
    "bmm": requests(bank.gather_bmm),
    "bmm graph": graphed(requests(bank.gather_bmm)),
    "grouped_mm": requests(grouped_mm),
    "grouped_mm graph": graphed(requests(grouped_mm)),
    "bmm compiled": requests(gather_compiled),
}
LAYERS: dict[str, Build] = {
    "hyperfast": layer(_hyper_linear),
    "hyperfast graph": graphed(layer(_hyper_linear)),
    "bmm": layer(_layer_bmm),
    "bmm graph": graphed(layer(_layer_bmm)),
    "bilinear": layer(_bilinear),
    "bilinear graph": graphed(layer(_bilinear)),
    "e3nn": layer(_e3nn),
    "bmm compiled": layer(lambda problem: faster(_layer_bmm(problem))),
}
SLOWEST = ("bmm max-autotune", "vmap", "jax")


def field(workload: Any_, thorough: int) -> Mapping[str, Build]:
    """Who races on it: see :class:`bench.gpu.workloads.Job`."""
    if isinstance(workload, PatternBank):
        table = BANKS
    else:
        table = LAYERS if isinstance(workload, LayerWorkload) else NETWORKS
    takes = {name: 2 if name in SLOWEST else int("compiled" in name) for name in table}
    return {name: build for name, build in table.items() if takes[name] <= thorough}
