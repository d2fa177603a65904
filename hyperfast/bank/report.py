"""What storing costs in accuracy, and whether to keep weights or to generate them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast.bank.contents import Contents, copy_module, own_activations
from hyperfast.bank.formats import run_by_layers
from hyperfast.layout import MLPSpec
from hyperfast.nn.chunked import Chunked
from hyperfast.plans.choose import DEVICES

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


# What is known of an error while it is measured: the largest, its sum of squares, and that of the
# exact values.
MAX, ERROR, SIZE = range(3)


@torch.no_grad()
def measure(contents: Contents, ids: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    """Errors ``(layers, 2, 3)`` float64, on the CPU, of the weights and of the outputs of every
    layer; :func:`joined` puts those of several banks together.

    Args:
        weights: the exact networks ``(n, P)``; ``None`` where the hypernetwork is to make them.
        rows: random inputs of each task.
    """
    spec, device = contents.spec, contents.device
    activations, transform = contents.activations, contents.format.transform
    exactly = own_activations(activations, torch.float64, device)
    hyper = contents.hyper
    if hyper is not None:
        hyper = copy_module("hyper", hyper, torch.float64)
    generator = torch.Generator(device).manual_seed(0)
    errors = torch.zeros(len(spec.layers), 2, 3, dtype=torch.float64, device="cpu")
    for n in range(0, len(ids), TASKS):
        some = ids[n : n + TASKS]
        stored = contents.weights(some)
        if weights is not None:
            exact = weights[n : n + TASKS].double()
        else:
            assert hyper is not None
            exact = spec.flatten(hyper(contents.latents(some).double()))
        tasks = torch.arange(len(some), dtype=torch.int64, device=device).repeat_interleave(rows)
        right = torch.randn(
            len(tasks), spec.sizes[0], generator=generator, dtype=torch.float64, device=device
        )
        x = right.to(stored.dtype)
        for layer, activation, in_double, of_layer in zip(
            spec.layers, activations, exactly, errors, strict=True
        ):
            piece = slice(layer.begin, layer.end)
            one = MLPSpec((layer.in_features, layer.out_features), layer.bias == "b")
            x = run_by_layers(one, [activation], stored[:, piece], x, tasks, transform)
            right = run_by_layers(one, [in_double], exact[:, piece], right, tasks, transform)
            _add(of_layer[0], stored[:, piece], exact[:, piece])
            _add(of_layer[1], x, right)
    return errors


def _add(sums: Tensor, value: Tensor, exact: Tensor) -> None:
    error = value.double() - exact
    sums[MAX] = max(float(sums[MAX]), float(error.abs().max()))
    sums[ERROR] += float(error.square().sum())
    sums[SIZE] += float(exact.square().sum())


def joined(errors: Tensor) -> Tensor:
    """``errors (n, layers, 2, 3)`` of ``n`` banks as those of one."""
    whole = errors.sum(0)
    whole[..., MAX] = errors[..., MAX].amax(0)
    return whole


def error_report(title: str, spec: MLPSpec, errors: Tensor) -> ErrorReport:
    """What :func:`measure` has found, for users."""

    def found(sums: Tensor) -> tuple[float, float]:
        largest, error, size = sums.tolist()
        return largest, (error / size) ** 0.5 if size else 0.0

    return ErrorReport(
        title,
        tuple(
            LayerError(f"{v.in_features} -> {v.out_features}", *found(weight), *found(output))
            for v, (weight, output) in zip(spec.layers, errors, strict=True)
        ),
    )


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


def explain(contents: Contents) -> Costs:
    """See :meth:`hyperfast.TaskBank.explain`."""
    hyper, latents = contents.hyper, contents.table.latents
    if hyper is None or latents is None:
        raise ValueError("only a bank with a hypernetwork can generate weights again")
    machine = DEVICES.get(contents.device.type, DEVICES["cuda"])
    if isinstance(hyper.generator, Chunked):
        flops = hyper.generator.flops
    else:
        linears = [m for m in hyper.generator.modules() if isinstance(m, nn.Linear)]
        flops = sum(2 * m.in_features * m.out_features for m in linears)
    width, dtype = latents.columns[0]
    stored, latent = contents.format.task_bytes, width * dtype.itemsize
    return Costs(
        tasks=contents.table.count,
        resident=contents.table.resident,
        keep_bytes=stored,
        keep_seconds=stored / machine.bandwidth,
        regenerate_bytes=latent,
        regenerate_seconds=flops / machine.flops + (latent + 2 * stored) / machine.bandwidth,
    )
