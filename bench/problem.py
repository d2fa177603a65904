"""One workload made concrete: parameters, inputs, and what the right answer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .workloads import Workload

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sin": torch.sin}

# A pre-activation closer than this to relu's corner lets rounding choose the derivative. It is a
# hundred times the fp32 error of one (sqrt(128) eps), and redraws about 2 % of the rows at most.
CORNER = 1e-4


@dataclass(frozen=True)
class Problem:
    """Leaf values in the order in which gradients are reported, then the inputs."""

    workload: Workload
    trunk_weight: Tensor  # (H, z_dim)
    trunk_bias: Tensor  # (H,)
    head_weight: Tensor  # (P, H)
    head_bias: Tensor  # (P,)
    z: Tensor  # (B, z_dim)
    x: Tensor  # (B, N, in)
    grad: Tensor  # (B, N, out): the gradient that reaches y

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.trunk_weight, self.trunk_bias, self.head_weight, self.head_bias

    def with_leaves(self, leaves: Sequence[Tensor]) -> Problem:
        """The same with other parameters and another z."""
        trunk_weight, trunk_bias, head_weight, head_bias, z = leaves
        return Problem(
            self.workload, trunk_weight, trunk_bias, head_weight, head_bias, z, self.x, self.grad
        )

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "workload"}
        return Problem(self.workload, **{name: t.to(dtype) for name, t in tensors.items()})


def target_weights(flat: Tensor, workload: Workload) -> list[tuple[Tensor, Tensor]]:
    """(B, P) -> per layer a weight (B, out, in) and a bias (B, out), as views.

    One split, not a slice for each: the gradient of a slice is a zero-filled (B, P) tensor, which
    costs bmm a third of its forward+backward time on mlp128_n1.
    """
    pieces = iter(flat.split([size for i, o in workload.layers for size in (o * i, o)], dim=1))
    return [(next(pieces).unflatten(1, (o, i)), next(pieces)) for i, o in workload.layers]


def _corner_distance(problem: Problem) -> tuple[Tensor, Tensor]:
    """How near the nearest pre-activation comes to zero: of the trunk (B,), of each row (B, N)."""
    trunk = torch.addmm(problem.trunk_bias, problem.z, problem.trunk_weight.T)
    flat = torch.addmm(problem.head_bias, trunk.relu(), problem.head_weight.T)
    rows = torch.full(problem.x.shape[:2], math.inf, dtype=problem.x.dtype)
    x = problem.x
    for weight, bias in target_weights(flat, problem.workload)[:-1]:
        pre = torch.einsum("bni,boi->bno", x, weight) + bias.unsqueeze(1)
        if problem.workload.activation == "relu":
            rows = torch.minimum(rows, pre.abs().amin(-1))
        x = ACTIVATIONS[problem.workload.activation](pre)
    return trunk.abs().amin(-1), rows


def make_problem(workload: Workload, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """Random values of the size training starts from, with no pre-activation on relu's corner."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).mul_(std).to(dtype).double()

    w = workload
    # Half of a weight's variance comes from the head's bias, half from its H features.
    fan_in = torch.cat([torch.full((i * o + o,), float(i)) for i, o in w.layers]).double()
    problem = Problem(
        workload,
        trunk_weight=normal(w.H, w.z_dim, std=w.z_dim**-0.5),
        trunk_bias=normal(w.H, std=0.1),
        head_weight=(normal(w.P, w.H) / fan_in.mul(w.H).sqrt()[:, None]).to(dtype).double(),
        head_bias=(normal(w.P) / fan_in.sqrt()).to(dtype).double(),
        z=normal(w.B, w.z_dim),
        x=normal(w.B, w.N, w.sizes[0]),
        grad=normal(w.B, w.N, w.sizes[-1]),
    )
    while (bad := _corner_distance(problem)[0] < CORNER).any():
        problem.z[bad] = normal(int(bad.sum()), w.z_dim)
    while (bad := _corner_distance(problem)[1] < CORNER).any():
        problem.x[bad] = normal(int(bad.sum()), w.sizes[0])
    return problem.to(dtype)


def plain_forward(problem: Problem) -> Tensor:
    """y by the definition: generate every weight, then apply them."""
    p = problem
    features = torch.relu(p.z @ p.trunk_weight.T + p.trunk_bias)
    x = p.x
    layers = target_weights(features @ p.head_weight.T + p.head_bias, p.workload)
    for index, (weight, bias) in enumerate(layers):
        x = torch.einsum("bni,boi->bno", x, weight) + bias.unsqueeze(1)
        if index + 1 < len(layers):
            x = ACTIVATIONS[p.workload.activation](x)
    return x


def answer(problem: Problem, mode: str) -> tuple[Tensor, ...]:
    """(y,), or (y, gradient of each parameter, gradient of z), in the problem's dtype."""
    if mode == "forward":
        return (plain_forward(problem),)
    leaves = [t.detach().requires_grad_() for t in (*problem.parameters, problem.z)]
    y = plain_forward(problem.with_leaves(leaves))
    return (y.detach(), *torch.autograd.grad(y, leaves, problem.grad))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest exact value; infinite where shapes differ."""
    if value.shape != exact.shape:
        return math.inf
    error = float((value.double() - exact).abs().max() / exact.abs().max())
    return math.inf if math.isnan(error) else error


class Judge:
    """Holds outputs against float64, within twice the error that plain PyTorch makes in the
    problem's own precision plus one rounding of the longest sum (n terms round by sqrt(n) eps)."""

    def __init__(self, problem: Problem, mode: str):
        w = problem.workload
        self.exact = answer(problem.to(torch.float64), mode)
        eps = torch.finfo(problem.z.dtype).eps
        longest = max(w.z_dim, w.H, *w.sizes)
        self.budgets = [
            2 * (relative_error(plain, exact) + eps * math.sqrt(terms))
            for plain, exact, terms in zip(
                answer(problem, mode),
                self.exact,
                [longest] + [max(longest, w.B * w.N)] * (len(self.exact) - 1),
                strict=True,
            )
        ]

    def share(self, outputs: tuple[Tensor, ...]) -> float:
        """The error as a share of its budget, the worst over all outputs; up to 1 is right."""
        if len(outputs) != len(self.exact):
            return math.inf
        return max(
            relative_error(out, exact) / budget
            for out, exact, budget in zip(outputs, self.exact, self.budgets, strict=True)
        )
