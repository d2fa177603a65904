"""One workload made concrete: parameters, inputs, and what the right answer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.real.real import Real, RealProblem
from bench.workloads import MLP, BankWorkload, Workload

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

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    def answer(self, mode: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(y,), or (y, gradient of each parameter, gradient of z), computed in `dtype`."""
        problem = self.to(dtype)
        if mode == "forward":
            return (plain_forward(problem),)
        leaves = [t.detach().requires_grad_() for t in (*problem.parameters, problem.z)]
        y = plain_forward(problem.with_leaves(leaves))
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.grad))

    def sums(self, mode: str) -> list[int]:
        """The number of terms of the longest sum behind each part of the answer."""
        w = self.workload
        longest = max(w.z_dim, w.H, *w.sizes)
        if mode == "forward":
            return [longest]
        return [longest, *[max(longest, w.B * w.N)] * (len(self.parameters) + 1)]


@dataclass(frozen=True)
class BankProblem:
    workload: BankWorkload
    flat: Tensor  # (tasks, P): the weights of each task, laid out as HyperNet's
    x: Tensor  # (requests, rows, in)
    task_ids: Tensor  # (requests, rows)

    def to(self, dtype: torch.dtype) -> BankProblem:
        flat, x = self.flat.to(dtype), self.x.to(dtype)
        return BankProblem(self.workload, flat, x, self.task_ids)

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    def answer(self, mode: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(y of all requests,), each row by the weights of its task, computed in `dtype`."""
        outputs = []
        for x, ids in zip(self.x.to(dtype), self.task_ids, strict=True):
            layers = target_weights(self.flat[ids].to(dtype), self.workload)
            outputs.append(apply_plainly(self.workload, layers, x.unsqueeze(1)).squeeze(1))
        return (torch.stack(outputs),)

    def sums(self, mode: str) -> list[int]:
        return [max(self.workload.sizes)]


AnyWorkload = MLP | Real
AnyProblem = Problem | BankProblem | RealProblem


def target_weights(flat: Tensor, workload: MLP) -> list[tuple[Tensor, Tensor]]:
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


def make_problem(
    workload: AnyWorkload, seed: int = 0, dtype: torch.dtype = torch.float32
) -> AnyProblem:
    if isinstance(workload, BankWorkload):
        return make_bank(workload, seed, dtype)
    if isinstance(workload, Real):
        return workload.problem(seed, dtype)
    return make_hyper(workload, seed, dtype)


def _fan_in(workload: MLP, like: Tensor) -> Tensor:
    """(P,): the inputs of the layer that each parameter belongs to."""
    return torch.cat([like.new_full((i * o + o,), float(i)) for i, o in workload.layers])


def make_bank(
    w: BankWorkload,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> BankProblem:
    """Random values of the size training starts from."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype, device=device)

    flat = normal(w.tasks, w.P)
    return BankProblem(
        w,
        flat.div_(_fan_in(w, flat).sqrt()),
        normal(w.requests, w.rows, w.sizes[0]),
        torch.randint(w.tasks, (w.requests, w.rows), generator=rng, device=device),
    )


def draw(w: Workload, normal: Callable[..., Tensor]) -> Problem:
    """Values of the size training starts from, made of what ``normal(*shape)`` draws."""
    head = normal(w.P, w.H)
    # Half of a weight's variance comes from the head's bias, half from its H features.
    fan_in = _fan_in(w, head)
    return Problem(
        w,
        trunk_weight=normal(w.H, w.z_dim) * w.z_dim**-0.5,
        trunk_bias=normal(w.H) * 0.1,
        head_weight=head / fan_in.mul(w.H).sqrt()[:, None],
        head_bias=normal(w.P) / fan_in.sqrt(),
        z=normal(w.B, w.z_dim),
        x=normal(w.B, w.N, w.sizes[0]),
        grad=normal(w.B, w.N, w.sizes[-1]),
    )


def make_hyper(workload: Workload, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """Random values of the size training starts from, with no pre-activation on relu's corner."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def rounded(tensor: Tensor) -> Tensor:
        """Numbers of `dtype`, in which no distance to the corner is lost."""
        return tensor.to(dtype).double()

    problem = draw(workload, normal).to(dtype).to(torch.float64)
    while (bad := _corner_distance(problem)[0] < CORNER).any():
        problem.z[bad] = rounded(normal(int(bad.sum()), workload.z_dim))
    while (bad := _corner_distance(problem)[1] < CORNER).any():
        problem.x[bad] = rounded(normal(int(bad.sum()), workload.sizes[0]))
    return problem.to(dtype)


def apply_plainly(workload: MLP, layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """x (B, N, in) through weights (B, out, in) and biases (B, out)."""
    for index, (weight, bias) in enumerate(layers):
        x = x if index == 0 else ACTIVATIONS[workload.activation](x)
        x = torch.einsum("bni,boi->bno", x, weight) + bias.unsqueeze(1)
    return x


def plain_forward(p: Problem) -> Tensor:
    """y by the definition: generate every weight, then apply them."""
    features = torch.relu(p.z @ p.trunk_weight.T + p.trunk_bias)
    flat = features @ p.head_weight.T + p.head_bias
    return apply_plainly(p.workload, target_weights(flat, p.workload), p.x)


def answer(problem: AnyProblem, mode: str) -> tuple[Tensor, ...]:
    """In the problem's own dtype."""
    return problem.answer(mode, problem.dtype)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest exact value; infinite where shapes differ."""
    if value.shape != exact.shape:
        return math.inf
    error = float((value.double() - exact).abs().max() / exact.abs().max())
    return math.inf if math.isnan(error) else error


class Judge:
    """Holds outputs against float64, within twice the error that plain PyTorch makes in the
    problem's own precision plus one rounding of the longest sum (n terms round by sqrt(n) eps)."""

    def __init__(self, problem: AnyProblem, mode: str):
        eps = torch.finfo(problem.dtype).eps
        self.exact = problem.answer(mode, torch.float64)
        self.budgets = [
            2 * (relative_error(plain, exact) + eps * math.sqrt(terms))
            for plain, exact, terms in zip(
                answer(problem, mode), self.exact, problem.sums(mode), strict=True
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
