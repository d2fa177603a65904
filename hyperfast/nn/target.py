"""The target network: an MLP that owns no parameters and runs on those it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation, resolve, run_layers
from hyperfast.checks import Weights
from hyperfast.functional import stored_mlp, task_linear
from hyperfast.layout import MLPSpec, Transform, check_transform, transformed
from hyperfast.nn.copies import apart
from hyperfast.ops import backends

# Rows a task from which on a copy of the weights, side by side, costs little beside what one op
# saves in hidden layers: 100 tasks of 10-8-8-1 with 16,700 rows each train in half the time.
ROWS = 16


class TargetNet(nn.Module):
    """An MLP without parameters: ``forward(x, weights)`` takes them.

    Args:
        activation: a name, a module or a function, applied after every layer but the last; or a
            sequence of them, one a layer. A sequence as long as the network has layers also covers
            the output, one shorter leaves it linear. Where a module with parameters comes again in
            the sequence, a copy takes its place.
        weight_transform: a function of every weight matrix, not of the biases, before it is used;
            or its name, ``"abs"``, ``"exp"``, ``"softplus"`` or ``"square"``: monotonic mixers
            (QMIX, Rashid et al. 2018) use ``"abs"``.

    Raises:
        ValueError: an unknown name.
        TypeError: an activation or a transform that cannot be called.

    Example:
        >>> hyper, target = hyperfast.HyperNet(16, 2, 32, 1), hyperfast.TargetNet("relu")
        >>> target(torch.rand(1000, 64, 2), hyper(torch.randn(1000, 16))).shape
        torch.Size([1000, 64, 1])
    """

    def __init__(
        self,
        activation: Activation | Sequence[Activation] | nn.ModuleList = "relu",
        weight_transform: Transform | None = None,
    ):
        super().__init__()
        several = isinstance(activation, Sequence | nn.ModuleList)
        self.per_layer = several and not isinstance(activation, str)
        activations = activation if self.per_layer else [activation]
        self.activations = nn.ModuleList(apart(resolve(a) for a in activations))  # type: ignore[union-attr, arg-type]
        check_transform("weight_transform", weight_transform)
        self.weight_transform = weight_transform

    def forward(self, x: Tensor, weights: Weights, task_ids: Tensor | None = None) -> Tensor:
        """Runs one network, or one for every task.

        Args:
            x: with unbatched weights ``(N, in)`` or ``(in,)``; with batched ones ``(B, N, in)``,
                ``(B, in)``, ``(1, N, in)``, the same rows for all, a jagged NestedTensor ``(B, j,
                in)``, or ``(R, in)`` with ``task_ids``.
            weights: ``(w1, b1, w2, b2, ...)`` or ``(w1, w2, ...)``: ``w (out, in)``, ``b (out,)``,
                all with a leading ``B`` or none. Also an ``nn.ParameterList``, or a dict with its
                values in this order, as ``torch.func.stack_module_state`` returns.
            task_ids: ``(R,)`` int64: row ``r`` runs through network ``task_ids[r]``.

        Returns:
            ``x`` with its last dimension replaced by the output width.

        Raises:
            ValueError: shapes that disagree.
            TypeError: dtypes that disagree.
            IndexError: a task id out of range.
        """
        weights = checks.check_tensors("weights", weights)
        layers = _pairs(weights)
        activations = self.layer_activations(len(layers))
        if layers[0][0].ndim == 2:
            if task_ids is not None:
                raise ValueError(
                    "task_ids needs weights with a leading task dimension, "
                    f"got weights[0] of shape {checks.shape(weights[0])}"
                )
            return _unbatched(x, self._transformed(layers), activations)
        if checks.check_tensor("x", x).is_nested:
            tasks = weights[0].shape[0]
            return from_jagged(x, task_ids, tasks, lambda r, ids: self.forward(r, weights, ids))
        flat = _flat(layers)
        # A size that is compared is fixed in a graph.
        many = not torch.compiler.is_compiling() and math.prod(x.shape[:-1]) >= ROWS * len(
            weights[0]
        )
        if flat is None and many and x.ndim > 1:
            checks.check_and_cast(x=x, **{f"weights[{n}]": w for n, w in enumerate(weights)})
            flat = torch.cat([w.flatten(1) for w in weights], 1)
        if flat is not None:
            sizes = (layers[0][0].shape[2], *(w.shape[1] for w, _ in layers))
            spec = MLPSpec(sizes, [b is not None for _, b in layers])
            return stored_mlp(x, flat, spec, activations, task_ids, self.weight_transform)
        linears = [
            partial(task_linear, weight=w, bias=b, task_ids=task_ids)
            for w, b in self._transformed(layers)
        ]
        return run_layers(x, linears, activations)

    def _transformed(
        self, layers: list[tuple[Tensor, Tensor | None]]
    ) -> list[tuple[Tensor, Tensor | None]]:
        return [(transformed(self.weight_transform, w), b) for w, b in layers]

    def layer_activations(self, layers: int) -> list[nn.Module | None]:
        """The activation after each of ``layers`` layers, ``None`` after a linear output.

        Raises:
            ValueError: the sequence given does not fit that many layers.
        """
        if not self.per_layer:
            own: Any = self._modules["activations"]
            (activation,) = own._modules.values()
            return [*[activation] * (layers - 1), None]
        if len(self.activations) not in (layers - 1, layers):
            raise ValueError(
                f"activation must hold {layers - 1} or {layers} entries for a network of "
                f"{layers} layers, got {len(self.activations)}"
            )
        return [*self.activations, None][:layers]


def from_jagged(
    x: Tensor,
    task_ids: Tensor | None,
    tasks: int,
    apply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """``apply(rows, task_ids)`` to the rows of a jagged NestedTensor, whose component is its task.

    Raises:
        ValueError: ``task_ids`` given as well, a layout other than ``torch.jagged``, or a shape
            other than ``(tasks, j, in)``.
    """
    if task_ids is not None:
        raise ValueError("task_ids must be None for a NestedTensor x, whose components are tasks")
    if x.layout != torch.jagged:
        raise ValueError(f"a NestedTensor x must have layout torch.jagged, got {x.layout}")
    if x.ndim != 3 or x._ragged_idx != 1 or x.shape[0] != tasks:  # type: ignore[attr-defined]
        raise ValueError(
            f"a NestedTensor x must have shape ({tasks}, j, in), jagged in j, as there are {tasks} "
            f"tasks, got {checks.shape(x)}"
        )
    if x.lengths() is not None:  # type: ignore[attr-defined]  # gaps between the components
        x = x.contiguous()
    offsets, values = x.offsets(), x.values()  # type: ignore[attr-defined]
    component = torch.arange(tasks, device=offsets.device)
    ids = component.repeat_interleave(offsets.diff(), output_size=values.shape[0])
    return torch.nested.nested_tensor_from_jagged(apply(values, ids), offsets)


def _flat(layers: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The flat vectors ``(B, P)`` that the weights are consecutive pieces of, as a HyperNet makes
    them and a bank keeps them; ``None`` where they are not, or where a gradient or a transform
    must see each of them."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state()
    if traced or backends.forced == "reference":
        return None
    first = layers[0][0]
    if type(first) is not Tensor or checks.is_transformed():
        return None
    storage, step, start = (
        first.untyped_storage().data_ptr(),
        first.stride(0),
        first.storage_offset(),
    )
    place, trains = start, torch.is_grad_enabled()
    for w, b in layers:
        for t in (w, b):
            if t is None:
                continue
            rows = (t.shape[2], 1) if t.ndim == 3 else (1,)
            if (
                t.storage_offset() != place
                or t.stride() != (step, *rows)
                or t.dtype != first.dtype
                or t.untyped_storage().data_ptr() != storage
                or (trains and t.requires_grad)
            ):
                return None
            place += math.prod(t.shape[1:])
    return first.as_strided((first.shape[0], place - start), (step, 1), start)


def _unbatched(
    x: Tensor,
    layers: list[tuple[Tensor, Tensor | None]],
    activations: list[nn.Module | None],
) -> Tensor:
    return run_layers(x, [partial(_linear, w, b) for w, b in layers], activations)


def _linear(w: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    checks.check_same_kind(x=x, weight=w, bias=b)
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x must have {w.shape[1]} features in its last dimension, as the weight has shape "
            f"{checks.shape(w)}, got shape {checks.shape(x)}"
        )
    return F.linear(x, w, b)


def _pairs(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """``(w1, b1, ...)`` or ``(w1, w2, ...)`` as pairs; a bias has one rank less than a weight."""
    rank = weights[0].ndim
    if rank not in (2, 3):
        raise ValueError(
            f"weights[0] must have shape (out, in) or (B, out, in), got {checks.shape(weights[0])}"
        )
    layers: list[tuple[Tensor, Tensor | None]] = []
    for n, w in enumerate(weights):
        if w.ndim == rank:
            ins, before = w.shape[-1], layers[-1][0].shape[-2] if layers else w.shape[-1]
            if ins != before or w.shape[:-2] != weights[0].shape[:-2]:
                batch = f" and {weights[0].shape[0]} tasks" if rank == 3 else ""
                raise ValueError(
                    f"weights[{n}] must have {before} input features{batch}, like the layer "
                    f"before it, got shape {checks.shape(w)}"
                )
            layers.append((w, None))
        elif w.ndim == rank - 1 and layers[-1][1] is None:
            out = layers[-1][0].shape[:-1]
            if w.shape != out:
                raise ValueError(
                    f"weights[{n}] must have shape {tuple(out)}, the bias of the weight before it, "
                    f"got {checks.shape(w)}"
                )
            layers[-1] = (layers[-1][0], w)
        else:
            raise ValueError(
                f"weights[{n}] must be a weight of rank {rank} or a bias of rank {rank - 1}, "
                f"got shape {checks.shape(w)}"
            )
    return layers
