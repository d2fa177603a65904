"""Tensor parallelism: a HyperMLP whose head is too large for one device, on PyTorch's DTensor.

Data parallelism needs nothing from here: ``DistributedDataParallel(HyperMLP(...))``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.placement_types import Partial

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.functional import hyper_linear
from hyperfast.kernels import reference
from hyperfast.layout import Generated, Layer
from hyperfast.nn.model import HyperMLP
from hyperfast.nn.target import from_jagged

__all__ = ["ColwiseHyperMLP", "parallelize"]


def parallelize(model: HyperMLP, mesh: DeviceMesh) -> ColwiseHyperMLP:
    """Shares the head of ``model`` among the ranks of ``mesh``, column-parallel.

    Every rank must call it, with a model of the same sizes; the values are those of the mesh's
    first rank. ``model`` is used up: its trunk becomes part of what is returned.

    Args:
        model: its target must be a TargetNet without transform, of any number of layers.
        mesh: one-dimensional, for instance ``init_device_mesh("cuda", (8,))`` or one dimension
            ``mesh["tp"]`` of a larger one.

    Raises:
        TypeError: ``model`` is not such a HyperMLP, or its hypernetwork was changed; ``mesh`` is no
            DeviceMesh.
        ValueError: ``mesh`` has more than one dimension.

    Example:
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))  # under torchrun, of all ranks
        >>> model = hyperfast.HyperMLP(hyperfast.HyperNet(16, 64, 64, 10))
        >>> model = hyperfast.distributed.parallelize(model, mesh)
        >>> model(torch.rand(9, 64), torch.randn(9, 16)).shape
        torch.Size([9, 10])
    """
    mlp = model.mlp if isinstance(model, HyperMLP) else None
    if mlp is None or not mlp.whole or mlp.transform or model.hyper.base is not None:
        raise TypeError(
            "model must be a HyperMLP whose target is a TargetNet without transform, and whose "
            "hypernetwork has one head, neither rank nor base nor shared biases, and no hooks"
        )
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: name one, as mesh['tp']")
    return ColwiseHyperMLP(model, mesh)


class ColwiseHyperMLP(nn.Module):
    """Equals the HyperMLP that it was made of, in value and in every gradient.

    Each target layer's outputs are cut into one slice a rank (as ``torch.chunk`` does), so that
    all ranks work on every layer. A rank holds the head's rows of its slices, ``P * H / ranks``
    numbers, and generates and applies just these, fused as in a HyperMLP; the trunk is replicated.
    What is exchanged are rows, never weights: forward, a layer gathers its outputs, ``rows * out``;
    backward, it sums the gradient of its inputs, ``rows * in``, and once that of the features,
    ``tasks * H``, is summed.

    Parameters are DTensors, the trunk's replicated and the head's ``Shard(0)``, for optimizers,
    ``clip_grad_norm_`` and ``torch.distributed.checkpoint``. First derivatives only.

    Attributes:
        trunk: latents to features.
        layers: of each target layer its slice of the head.
        target: gives the activations.
    """

    def __init__(self, model: HyperMLP, mesh: DeviceMesh):
        super().__init__()
        assert model.mlp is not None
        self.spec, self.target = model.mlp.spec, model.mlp.target
        (trunk,), (head,) = model.mlp.trunks, model.mlp.heads
        self.z_dim = model.hyper.z_dim
        self.mesh = mesh
        self.trunk = nn.Sequential(*trunk)
        distribute_module(self.trunk, mesh)  # replicates it
        numels = [layer.numel for layer in self.spec.layers]
        weights = head.weight.split(numels)
        biases = [None] * len(numels) if head.bias is None else head.bias.split(numels)
        self.layers = nn.ModuleList(
            _Slice(layer, weight, bias, mesh)
            for layer, weight, bias in zip(self.spec.layers, weights, biases, strict=True)
        )

    def forward(self, x: Any, z: Tensor, task_ids: Tensor | None = None) -> Any:
        """As :meth:`HyperMLP.forward`; all ranks of the mesh must be given the same arguments.

        Raises:
            ValueError: shapes that disagree.
            TypeError: dtypes that disagree.
            IndexError: a task id outside ``[0, B)``.
        """
        if checks.check_tensor("z", z).ndim not in (1, 2) or z.shape[-1] != self.z_dim:
            raise ValueError(
                f"z must have shape ({self.z_dim},) or (B, {self.z_dim}), got {checks.shape(z)}"
            )
        if z.ndim == 1:
            if task_ids is not None:
                raise ValueError(f"z must have shape (B, {self.z_dim}) when task_ids is given")
            return self(checks.check_tensor("x", x).unsqueeze(0), z.unsqueeze(0)).squeeze(0)
        weight = next(self.layers.parameters())
        checks.check_like_weight(weight, x=x, z=z)
        h = self.trunk(DTensor.from_local(z, self.mesh, [Replicate()])).to_local()
        h = _shared(h, self.mesh)
        if x.is_nested:
            return from_jagged(x, task_ids, len(z), lambda rows, ids: self._apply_to(rows, h, ids))
        return self._apply_to(x, h, task_ids)

    def _apply_to(self, x: Tensor, h: Tensor, task_ids: Tensor | None) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.spec.sizes[0]:
            raise ValueError(
                f"x must have {self.spec.sizes[0]} features in its last dimension, "
                f"got shape {checks.shape(x)}"
            )
        activations = self.target.layer_activations(len(self.layers))
        return run_layers(
            x, [partial(v, h=h, task_ids=task_ids) for v in self._slices], activations
        )

    @property
    def _slices(self) -> list[_Slice]:
        return list(self.layers)  # type: ignore[arg-type]

    def full_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the HyperMLP that this was made of, whole on every rank, which must
        all call it: what ``HyperMLP.load_state_dict`` takes."""
        named = {
            f"hyper.generator.{name}": value.full_tensor()
            for name, value in self.trunk.state_dict().items()
        }
        head = f"hyper.generator.{len(self.trunk)}"
        kinds = ("weight",) if self._slices[0].bias is None else ("weight", "bias")
        for kind in kinds:
            named[f"{head}.{kind}"] = torch.cat(
                [layer.rows(getattr(layer, kind).detach().full_tensor()) for layer in self._slices]
            )
        return named | {f"target.{name}": t for name, t in self.target.state_dict().items()}


class _Slice(nn.Module):
    """The head of one target layer, shared by its outputs.

    ``weight (out, in + 1, H)`` and ``bias (out, in + 1)``, sharded along ``out``: in the last of
    the ``in + 1`` places is what makes the target's bias, whose input is a constant 1. (``in``
    places for a target without biases; ``bias`` is ``None`` for a head without.)
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(self, spec: Layer, weight: Tensor, bias: Tensor | None, mesh: DeviceMesh):
        super().__init__()
        self.spec = spec
        for name, rows in (("weight", weight), ("bias", bias)):
            if rows is None:
                self.register_parameter(name, None)
                continue
            shards = distribute_tensor(self._by_output(rows.detach()), mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(shards, rows.requires_grad))

    def _by_output(self, rows: Tensor) -> Tensor:
        out, weights = self.spec.out_features, self.spec.weight_numel
        parts = rows[:weights].unflatten(0, (out, -1)), rows[weights:]
        return torch.cat([parts[0], parts[1].unsqueeze(1)], 1) if self.spec.bias else parts[0]

    def rows(self, by_output: Tensor) -> Tensor:
        """The head's rows in their order in a HyperNet."""
        matrix, vector = by_output.tensor_split([self.spec.in_features], 1)
        return torch.cat([matrix.flatten(0, 1), vector.flatten(0, 1)])

    def forward(self, x: Tensor, h: Tensor, task_ids: Tensor | None) -> Tensor:
        mesh = self.weight.device_mesh
        x = _shared(x, mesh)
        if self.spec.bias:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        weight = self.weight.to_local().flatten(0, 1)
        bias = None if self.bias is None else self.bias.to_local().flatten()
        if len(weight):
            y = hyper_linear(x, h, weight, bias, task_ids, target_bias=False)
        else:  # fewer outputs than ranks; gradients of zero keep the ranks' collectives in step
            one = task_ids is None and x.ndim == 2
            made = Generated.of_head(weight, bias, x.shape[-1], False)
            y = reference.hyper_linear(x.unsqueeze(1) if one else x, h, *made, task_ids)
            y = y.squeeze(1) if one else y
        shape = torch.Size((*y.shape[:-1], self.spec.out_features))
        stride = torch.empty(shape, device="meta").stride()
        placement = [Shard(y.ndim - 1)]
        return DTensor.from_local(y, mesh, placement, shape=shape, stride=stride).full_tensor()

    def extra_repr(self) -> str:
        return f"{self.spec}"


def _shared(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """``value``, the same on all ranks, each of which uses it for outputs of its own: backward, the
    gradients are summed over the ranks."""
    shared = DTensor.from_local(value, mesh, [Replicate()])
    return shared.to_local(grad_placements=[Partial()])
