"""What a rival is: something that turns z and x into y from given parameters, as well as it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.absent import Unavailable
from bench.problem import Problem

Call = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Rival:
    """`build(problem, mode)` takes a problem of `dtype`, and returns a call that does all the work
    anew each time and comes back when the result is there: (y,), or (y, gradients of the four
    parameters, gradient of z)."""

    name: str
    about: str
    build: Callable[[Any, str], Call]
    dtype: torch.dtype = torch.float32


# z, x -> y, with the four parameters in the order of Problem.parameters.
Network = tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, ...]]


def torch_rival(
    name: str,
    about: str,
    network: Callable[[Problem], Network],
    dtype: torch.dtype = torch.float32,
) -> Rival:
    """A rival from a differentiable PyTorch function of (z, x)."""

    def build(problem: Problem, mode: str) -> Call:
        function, leaves = network(problem)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(problem.z, problem.x),)

        z = problem.z.clone().requires_grad_()

        def forward_backward() -> tuple[Tensor, ...]:
            y = function(z, problem.x)
            return (y.detach(), *torch.autograd.grad(y, (*leaves, z), problem.grad))

        return forward if mode == "forward" else forward_backward

    return Rival(name, about, build, dtype)


def in_bf16(name: str, about: str, network: Callable[[Problem], Network]) -> Rival:
    """A rival in bfloat16, forward only."""

    def build(problem: Problem, mode: str) -> Call:
        if mode != "forward":
            raise Unavailable("bfloat16 is timed forward only: training keeps float32 parameters")
        return torch_rival(name, about, network).build(problem, mode)

    return Rival(name, about, build, torch.bfloat16)


def on_one_thread(rival: Rival) -> Rival:
    """The same in the same race without torch's other threads: its ratio is how the work scales."""

    def build(problem: Any, mode: str) -> Call:
        call = rival.build(problem, mode)

        def alone() -> tuple[Any, ...]:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return call()
            finally:
                torch.set_num_threads(threads)

        return alone

    return Rival(f"{rival.name} 1 thread", "the same on one thread", build, rival.dtype)


def load_linears(module: nn.Module, problem: Problem) -> tuple[Tensor, ...]:
    """Copies the problem's parameters into the trunk's and the head's nn.Linear; returns them."""
    leaves = [p for m in module.modules() if isinstance(m, nn.Linear) for p in (m.weight, m.bias)]
    with torch.no_grad():
        for leaf, value in zip(leaves, problem.parameters, strict=True):
            if leaf.shape != value.shape:
                raise ValueError(f"a parameter is {tuple(leaf.shape)}, not {tuple(value.shape)}")
            leaf.copy_(value)
    return tuple(leaves)
