"""Hypernetwork and target as one module, whose weights are stored only where that is faster."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hyperfast import checks
from hyperfast.functional import generated_mlp
from hyperfast.layout import MLPSpec
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet, from_jagged


class HyperMLP(nn.Module):
    """``model(x, z)`` equals ``target(x, hyper(z))``, fused.

    Every layer of the target is generated and applied in one op, by the plan that
    :func:`hyperfast.explain` shows. A target with a ``weight_transform``, or one that is not an
    MLP, is not linear in the generated weights; for these the weights are formed.

    Args:
        hyper: generates the weights.
        target: applies them: a module called as ``target(x, weights, task_ids)``; by default a
            ``TargetNet(hyper.target_activation)``.

    Raises:
        TypeError: ``hyper`` is not a HyperNet, or ``target`` is not a module.
        ValueError: no ``target`` for a ``hyper`` that does not generate an MLP.
    """

    def __init__(self, hyper: HyperNet, target: nn.Module | None = None):
        super().__init__()
        if not isinstance(hyper, HyperNet):
            raise TypeError(f"hyper must be a HyperNet, got {type(hyper).__name__}")
        if target is None:
            if not isinstance(hyper.spec, MLPSpec):
                raise ValueError(
                    "target must be given for a hyper that does not generate an MLP: "
                    "HyperNet.for_module returns the two together"
                )
            target = TargetNet(hyper.target_activation)
        if not isinstance(target, nn.Module):
            raise TypeError(f"target must be a module, got {type(target).__name__}")
        self.hyper = hyper
        self.target = target
        if self.mlp is not None:
            spec, mlp, _ = self.mlp
            mlp.layer_activations(len(spec.layers))  # raises now what would raise later

    @property
    def mlp(self) -> tuple[MLPSpec, TargetNet, nn.Linear] | None:
        """Layout, target and head where the network is generated and applied in one op."""
        hyper, target = self.hyper, self.target
        if not isinstance(target, TargetNet) or not isinstance(spec := hyper.spec, MLPSpec):
            return None
        generator, head = hyper.generator, hyper.head
        written = (
            type(hyper).forward is HyperNet.forward
            and type(head).forward is nn.Linear.forward
            and type(target).forward is TargetNet.forward
        )
        # Pruning and adapters are hooks; what they change is not what the layers' op computes.
        if not written or target.weight_transform is not None:
            return None
        return None if checks.hooked(hyper, generator, head, target) else (spec, target, head)

    @property
    def fused(self) -> bool:
        """Whether the network is generated and applied in one op."""
        return self.mlp is not None

    def forward(self, x: Any, z: Tensor, task_ids: Tensor | None = None) -> Any:
        """Generates a network from every latent and runs it on its rows.

        Args:
            x: with ``z (B, z_dim)``: ``(B, N, in)``, ``(B, in)``, a jagged NestedTensor
                ``(B, j, in)``, or ``(R, in)`` with ``task_ids``. With ``z (z_dim,)``: ``(N, in)``
                or ``(in,)``. A target other than a TargetNet says itself what it takes and returns.
            z: ``(B, z_dim)``, or ``(z_dim,)`` for a single network.
            task_ids: ``(R,)`` int64: row ``r`` runs through the network of ``z[task_ids[r]]``.

        Returns:
            ``x`` with its last dimension replaced by the output width.

        Raises:
            ValueError: shapes that disagree.
            TypeError: dtypes that disagree.
            IndexError: a task id outside ``[0, B)``.
        """
        mlp = self.mlp
        if mlp is None or (checks.tensor("z", z).ndim == 1 and task_ids is None):
            return self.target(x, self.hyper(z), task_ids)
        if z.ndim == 1:
            raise ValueError(
                f"z must have shape (B, {self.hyper.z_dim}) when task_ids is given, "
                f"got {checks.shape(z)}"
            )
        spec, target, head = mlp
        h = self.hyper.features(z)
        weight, bias = head.weight, head.bias
        checks.like_weight(weight, x=x)
        activations = target.layer_activations(len(spec.layers))

        def run(rows: Tensor, ids: Tensor | None) -> Tensor:
            return generated_mlp(rows, h, weight, bias, spec, activations, ids, "z")

        return from_jagged(x, task_ids, h.shape[0], run) if x.is_nested else run(x, task_ids)
