"""What storing costs in accuracy, and whether to keep weights or to generate them again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperfast.bank.rows import stack
from hyperfast.layout import MLPSpec
from hyperfast.nn.copies import clone
from hyperfast.plans.choose import DEVICES

if TYPE_CHECKING:
    from hyperfast.bank import TaskBank

TASKS = 256  # compared at a time


@dataclass(frozen=True)
class LayerError:
    """Largest absolute error, and root mean square of the error over that of the reference."""

    layer: str
    weight_max: float
    weight_relative: float
    output_max: float
    output_relative: float


@dataclass(frozen=True)
class ErrorReport:
    """Stored against exact networks, layer by layer; ``print`` shows it as a table.

    Outputs are those after the activation, on standard normal inputs of the first layer, with the
    errors of the layers before.
    """

    title: str
    layers: tuple[LayerError, ...]

    def __str__(self) -> str:
        head = (
            f"{'layer':>12} {'weight max':>11} {'relative':>11} {'output max':>11} {'relative':>11}"
        )
        rows = [
            f"{e.layer:>12} {e.weight_max:>11.2e} {e.weight_relative:>11.2e} "
            f"{e.output_max:>11.2e} {e.output_relative:>11.2e}"
            for e in self.layers
        ]
        return "\n".join([self.title, head, *rows])

    __repr__ = __str__


class _Error:
    """Accumulates a largest error and two sums of squares."""

    def __init__(self) -> None:
        self.max = self.error = self.size = 0.0

    def add(self, value: Tensor, exact: Tensor) -> None:
        error = value.double() - exact
        self.max = max(self.max, float(error.abs().max()))
        self.error += float(error.square().sum())
        self.size += float(exact.square().sum())

    @property
    def relative(self) -> float:
        return (self.error / self.size) ** 0.5 if self.size else 0.0


@torch.no_grad()
def error_report(bank: TaskBank, ids: Tensor, weights: Tensor | None, rows: int) -> ErrorReport:
    """See :meth:`hyperfast.TaskBank.error_report`."""
    layers, activations = bank.spec.layers, bank._activations
    hyper = clone(bank.hyper).double() if bank.hyper is not None else None
    generator = torch.Generator(bank.device).manual_seed(0)
    errors = [(_Error(), _Error()) for _ in layers]
    for n in range(0, len(ids), TASKS):
        some = ids[n : n + TASKS]
        stored = bank.weights(some)
        if weights is not None:
            exact = weights[n : n + TASKS].double()
        else:
            assert hyper is not None
            exact = bank.spec.flatten(hyper(bank.latents(some).double()))
        tasks = torch.arange(len(some), device=bank.device).repeat_interleave(rows)
        right = torch.randn(
            len(tasks), layers[0].in_features,
            generator=generator, dtype=torch.float64, device=bank.device,
        )  # fmt: skip
        x, start = right.to(stored.dtype), 0
        for layer, activation, (of_weight, of_output) in zip(
            layers, activations, errors, strict=True
        ):
            piece = slice(start, start + layer.numel)
            spec = MLPSpec((layer.in_features, layer.out_features), bank.spec.bias)
            x = stack(spec, [activation], stored[:, piece], x, tasks)
            right = stack(spec, [_double(activation)], exact[:, piece], right, tasks)
            of_weight.add(stored[:, piece], exact[:, piece])
            of_output.add(x, right)
            start = piece.stop
    found = tuple(
        LayerError(f"{s.in_features} -> {s.out_features}", w.max, w.relative, y.max, y.relative)
        for s, (w, y) in zip(layers, errors, strict=True)
    )
    return ErrorReport(f"{bank} against float64: {len(ids)} tasks, {rows} rows each", found)


def _double(activation: nn.Module | None) -> nn.Module | None:
    return copy.deepcopy(activation).double() if activation is not None else None


@dataclass(frozen=True)
class Costs:
    """Regenerate or keep: what a task costs either way; ``print`` shows it.

    Seconds are those of touching a task once, by the figures of `plans`: reading its
    stored weights, or its latent and the products of the hypernetwork. The model orders the two; it
    does not predict seconds.
    """

    tasks: int
    resident: int
    keep_bytes: int
    keep_seconds: float
    regenerate_bytes: int
    regenerate_seconds: float

    @property
    def choice(self) -> str:
        """``"keep"`` or ``"regenerate"``: which is faster where memory is no concern."""
        return "keep" if self.keep_seconds <= self.regenerate_seconds else "regenerate"

    @property
    def factor(self) -> float:
        """How many times as many tasks fit into memory when weights are generated again."""
        return self.keep_bytes / self.regenerate_bytes

    def __str__(self) -> str:
        total = self.tasks * self.keep_bytes / 1e6
        return "\n".join(
            [
                f"{self.tasks} tasks, {self.resident} with weights in memory",
                f"{'':>12} {'bytes/task':>12} {'us/task':>10} {'MB in all':>12}",
                f"{'keep':>12} {self.keep_bytes:>12} {self.keep_seconds * 1e6:>10.3f} "
                f"{total:>12.3f}",
                f"{'regenerate':>12} {self.regenerate_bytes:>12} "
                f"{self.regenerate_seconds * 1e6:>10.3f} {total / self.factor:>12.3f}",
                f"faster: {self.choice}; regenerating holds {self.factor:.1f} times the tasks",
            ]
        )

    __repr__ = __str__


def explain(bank: TaskBank) -> Costs:
    """See :meth:`hyperfast.TaskBank.explain`."""
    assert bank.hyper is not None
    machine = DEVICES.get(bank.device.type, DEVICES["cuda"])
    linears = [m for m in bank.hyper.generator.modules() if isinstance(m, nn.Linear)]
    flops = sum(2 * m.in_features * m.out_features for m in linears)
    row, item = bank._format.row_bytes, bank.hyper.dtype.itemsize
    latent = bank.hyper.z_dim * item
    return Costs(
        tasks=len(bank),
        resident=bank._table.resident,
        keep_bytes=row,
        keep_seconds=row / machine.bandwidth,
        regenerate_bytes=latent,
        regenerate_seconds=flops / machine.flops + (latent + 2 * row) / machine.bandwidth,
    )
