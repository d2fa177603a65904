"""What a real workload is: sizes, tensors, a plain formula, and ways to compute the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.absent import Unavailable
from bench.workloads import MODES

Tensors = dict[str, Tensor]
Function = Callable[[Tensors, Tensors], Tensor]

# As CORNER of bench/problem.py; here sums are shorter, and a row has thousands of corners.
CORNER = 1e-5


def _as_they_are(gradients: Tensors) -> Tensors:
    return gradients


@dataclass(frozen=True)
class Network:
    """One way to compute a workload: `function(inputs)` -> y. Its own parameters may be laid out
    otherwise than the workload's leaves: `back` makes their gradients those of the leaves, after
    the clock has stopped, as one converts a checkpoint once."""

    function: Callable[[Tensors], Tensor]
    parameters: Tensors
    back: Callable[[Tensors], Tensors] = _as_they_are


def fresh(leaves: Tensors) -> Tensors:
    """Copies that ask for gradients."""
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}


def plain(function: Function, leaves: Tensors) -> Network:
    """A function of the leaves as they are."""
    own = fresh(leaves)
    return Network(lambda inputs: function(own, inputs), own)


def adopt(module: nn.Module, leaves: Tensors, names: Mapping[str, str] | None = None) -> Tensors:
    """Makes copies of the leaves the module's parameters, and returns these by the leaves' names;
    `names`: leaf -> parameter, by default all under their own."""
    found: Tensors = {}
    for leaf, name in (names or {leaf: leaf for leaf in leaves}).items():
        path, _, own = name.rpartition(".")
        owner, value = module.get_submodule(path), leaves[leaf]
        if owner.get_parameter(own).shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(owner.get_parameter(own).shape)}, not {value.shape}"
            )
        found[leaf] = nn.Parameter(value.detach().clone())
        setattr(owner, own, found[leaf])
    return found


class Draw:
    """Random values; the structure of a problem comes from `integers`, known without tensors."""

    def __init__(self, seed: int):
        self._rng = torch.Generator().manual_seed(seed)
        self.integers = random.Random(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._rng, dtype=torch.float64) * std

    def linear(self, out: int, ins: int, gain: float = 1.0) -> Tensor:
        """A matrix that keeps the size of what it multiplies, times `gain`."""
        return self.normal(out, ins, std=gain * ins**-0.5)


@dataclass(frozen=True)
class Real:
    """A subclass holds its sizes as fields.

    `definition(leaves, inputs)` is the formula, and in float64 the truth. The others each return a
    Network for given leaves: `ours`; `formula`, as published code computes it; `package`, the
    published package itself; `shortcut`, the fastest way in plain PyTorch that we know, where it is
    another. Leaves are what training differentiates: parameters, latents, and inputs that other
    layers made.
    """

    modes: ClassVar[tuple[str, ...]] = MODES
    requests: ClassVar[int] = 1
    about: ClassVar[str]
    tasks: ClassVar[str]  # the field that --scale multiplies
    tiny: ClassVar[dict[str, int]]  # sizes of the smoke test
    corner: ClassVar[str] = ""  # the tensor that is drawn again where it leads to a corner
    loops: ClassVar[bool] = False  # whether formula and package are Python loops of many turns

    name: str

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        """Leaves in the order in which gradients are reported, and inputs."""
        raise NotImplementedError

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        raise NotImplementedError

    def ours(self, leaves: Tensors) -> Network:
        raise NotImplementedError

    def formula(self, leaves: Tensors) -> Network:
        return plain(self.definition, leaves)

    def package(self, leaves: Tensors) -> Network:
        raise Unavailable("no package on PyPI has this network, or none that installs beside torch")

    def shortcut(self, leaves: Tensors) -> Network:
        raise Unavailable("we know no faster way in plain PyTorch than the formula")

    def corners(self, t: Tensors) -> Tensor:
        """How near the values of the tensor `corner` bring a ReLU, or an abs, to its corner; of a
        shape that can be expanded to the tensor's."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The longest sum behind a value of y."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """The longest sum behind a gradient."""
        raise NotImplementedError

    def scaled(self, factor: int) -> Real:
        """The same work for `factor` times as many tasks."""
        sizes: dict[str, Any] = {self.tasks: getattr(self, self.tasks) * factor}
        return replace(self, **sizes)

    def small(self) -> Real:
        sizes: dict[str, Any] = self.tiny
        return replace(self, **sizes)

    def flops(self, mode: str) -> int:
        """Of the definition, as PyTorch counts them."""
        return _counted(self, mode)[1]

    def bytes(self, mode: str, itemsize: int = 4) -> int:
        """Compulsory traffic: leaves and inputs read once, y written once; backward also reads the
        gradient of y and writes one for each leaf."""
        leaves, inputs, y = _counted(self, mode)[0]
        return itemsize * (leaves + inputs + y + (mode != "forward") * (leaves + y))

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"about": self.about}

    def problem(self, seed: int, dtype: torch.dtype) -> RealProblem:
        draw = Draw(seed)
        leaves, inputs = self.draw(draw)
        # Numbers of `dtype`, in which no distance to a corner is lost.
        leaves, inputs = (_to(_to(t, dtype), torch.float64) for t in (leaves, inputs))
        if self.corner:
            both = {**leaves, **inputs}
            values = both[self.corner]
            while (bad := self.corners(both) < CORNER).any():
                bad = bad.expand_as(values)
                values[bad] = draw.normal(int(bad.sum())).to(dtype).double()
        with torch.no_grad():
            grad = draw.normal(*_shape(self))
        return RealProblem(self, _to(leaves, dtype), _to(inputs, dtype), grad.to(dtype))


@dataclass(frozen=True)
class RealProblem:
    workload: Real
    leaves: Tensors
    inputs: Tensors
    grad: Tensor  # the gradient that reaches y

    @property
    def dtype(self) -> torch.dtype:
        return self.grad.dtype

    def to(self, dtype: torch.dtype) -> RealProblem:
        leaves, inputs = _to(self.leaves, dtype), _to(self.inputs, dtype)
        return RealProblem(self.workload, leaves, inputs, self.grad.to(dtype))

    def answer(self, mode: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(y,), or (y, gradient of each leaf), by the definition in `dtype`."""
        step = Step(self.to(dtype), plain(self.workload.definition, _to(self.leaves, dtype)), mode)
        return step.outputs(step())

    def sums(self, mode: str) -> list[int]:
        """The number of terms of the longest sum behind each part of the answer."""
        width = self.workload.width
        if mode == "forward":
            return [width]
        return [width, *[max(width, self.workload.rows)] * len(self.leaves)]


class Step:
    """What is timed: a forward pass without gradients, or one with the gradients of all leaves."""

    def __init__(self, problem: RealProblem, network: Network, mode: str):
        self.problem, self.network, self.mode = problem, network, mode
        self.parameters = tuple(network.parameters.values())

    def __call__(self) -> tuple[Tensor, ...]:
        if self.mode == "forward":
            with torch.no_grad():
                return (self.network.function(self.problem.inputs),)
        y = self.network.function(self.problem.inputs)
        return (y.detach(), *torch.autograd.grad(y, self.parameters, self.problem.grad))

    def outputs(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results in the order of the leaves, each in its leaf's layout."""
        y, *gradients = results
        if not gradients:
            return (y,)
        found = self.network.back(dict(zip(self.network.parameters, gradients, strict=True)))
        return (y, *(found[name] for name in self.problem.leaves))


def _to(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The floating-point ones; ids stay."""
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


@cache
def _shape(workload: Real) -> tuple[int, ...]:
    return _on_nothing(workload, lambda p, x: tuple(workload.definition(p, x).shape))


@cache
def _counted(workload: Real, mode: str) -> tuple[tuple[int, int, int], int]:
    """Elements of leaves, inputs and y; FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(p: Tensors, x: Tensors) -> tuple[tuple[int, int, int], int]:
        with FlopCounterMode(display=False) as counter:
            y = workload.definition(p, x)
            if mode != "forward":
                torch.autograd.grad(y, tuple(p.values()), torch.empty_like(y))
        sizes = (sum(t.numel() for t in tensors.values()) for tensors in (p, x))
        return (*sizes, y.numel()), counter.get_total_flops()  # type: ignore[return-value]

    return _on_nothing(workload, count)


def _on_nothing(workload: Real, function: Callable[[Tensors, Tensors], Any]) -> Any:
    """The function's result on tensors that have shapes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        leaves, inputs = workload.draw(Draw(0))
        return function(fresh(leaves), inputs)
