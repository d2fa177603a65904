"""Hypernetwork and target as one module, whose weights are stored only where that is faster."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.functional import generated_mlp
from hyperfast.layout import MLPSpec
from hyperfast.nn import parts
from hyperfast.nn.copies import apart
from hyperfast.nn.gate import Fused, fused
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet, from_jagged


class HyperMLP(nn.Module):
    """``model(x, z)`` equals ``target(x, hyper(z))``, fused.

    Every layer of the target is generated and applied in one op, by the plan that
    :func:`hyperfast.explain` shows; layer by layer where they have a rank, shared biases or trunks
    of their own. A target that is not an MLP, or a transform that is a function, is not linear in
    the generated weights; for these the weights are formed. They are, too, where the hypernetwork
    is another than was built: a generator of one's own, a head that is pruned, normalised,
    quantised or adapted, hooks. Chunked weights of an MLP are formed a block at a time.

    Args:
        hyper: generates the weights.
        target: applies them: a module called as ``target(x, weights, task_ids)``; by default a
            ``TargetNet(hyper.target_activation)``. A TargetNet that has parameters in common with
            ``hyper`` is copied.

    Raises:
        TypeError: ``hyper`` is not a HyperNet, or ``target`` is not a module.
        ValueError: no ``target`` for a ``hyper`` that does not generate an MLP.

    Example:
        >>> model = hyperfast.HyperMLP(hyperfast.HyperNet(16, 2, (32, 32), 1))
        >>> model(torch.rand(1000, 64, 2), torch.randn(1000, 16)).shape  # 64 rows a task
        torch.Size([1000, 64, 1])
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
        if isinstance(target, TargetNet):
            (target,) = apart([target], hyper)
        self.hyper = hyper
        self.target = target
        if (mlp := self.mlp) is not None:
            mlp.target.layer_activations(len(mlp.spec.layers))  # raises now what would raise later

    @property
    def mlp(self) -> Fused | None:
        """Layout, target, head and trunk where layers are generated and applied in one op."""
        return fused(self.hyper, self.target)

    @property
    def fused(self) -> bool:
        """Whether layers are generated and applied in one op, without forming their weights."""
        return self.mlp is not None

    def forward(self, x: Any, z: Tensor, task_ids: Tensor | None = None) -> Any:
        """Generates a network from every latent and runs it on its rows.

        Args:
            x: with ``z (B, z_dim)``: ``(B, N, in)``, ``(B, in)``, ``(1, N, in)``, the same rows
                for all tasks, a jagged NestedTensor ``(B, j, in)``, or ``(R, in)`` with
                ``task_ids``. With ``z (z_dim,)``: ``(N, in)`` or ``(in,)``. A target other than a
                TargetNet says itself what it takes and returns.
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
        if mlp is None or (checks.check_tensor("z", z).ndim == 1 and task_ids is None):
            return parts.run(self.hyper, self.target, x, z, task_ids)
        if z.ndim == 1:
            raise ValueError(
                f"z must have shape (B, {self.hyper.z_dim}) when task_ids is given, "
                f"got {checks.shape(z)}"
            )
        spec, numels = mlp.spec, self.hyper.generated.numels
        wanted = numels if len(mlp.heads) > 1 else [sum(numels)]
        for head, numel in zip(mlp.heads, wanted, strict=True):
            if len(head.weight) != numel:
                raise ValueError(
                    f"hyper.generator must return {numel} numbers for {spec}, got a last layer of "
                    f"{len(head.weight)}"
                )
        weight, bias = mlp.heads[0].weight, mlp.heads[0].bias  # type: Tensor, Tensor | None
        self.hyper.check_latents(z, weight)
        features = []
        for trunk in mlp.trunks:
            h = z
            for module in trunk:
                h = module(h)
            features.append(h)
        checks.check_like_weight(weight, x=x)
        activations = mlp.target.layer_activations(len(spec.layers))
        base = self.hyper.base
        if mlp.whole and base is not None:
            bias = base if bias is None else bias + base

        def run(rows: Tensor, ids: Tensor | None) -> Tensor:
            if mlp.whole:
                return generated_mlp(
                    rows, features[0], weight, bias, spec, activations, ids, "z", mlp.transform
                )
            linears = self.hyper.linears(features, mlp.heads, mlp.transform, ids)
            return run_layers(rows, linears, activations)

        return from_jagged(x, task_ids, len(z), run) if x.is_nested else run(x, task_ids)
