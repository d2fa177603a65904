"""Hypernetwork and target as one module, whose weights are stored only where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.functional import generated_mlp, latent_mlp
from hyperfast.layout import MLPSpec
from hyperfast.nn import parts
from hyperfast.nn.copies import apart
from hyperfast.nn.gate import Fused, fused, plain_trunk, weight_and_bias
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
        own = self._modules  # its own question for an attribute takes 1 us
        hyper: Any = own["hyper"]
        target: Any = own["target"]
        mlp = fused(hyper, target)
        if mlp is None or (checks.check_tensor("z", z).ndim == 1 and task_ids is None):
            return parts.run(hyper, target, x, z, task_ids)
        if z.ndim == 1:
            raise ValueError(
                f"z must have shape (B, {hyper.z_dim}) when task_ids is given, "
                f"got {checks.shape(z)}"
            )
        made, heads = hyper.generated, mlp.heads
        weights = [weight_and_bias(head)[0] for head in heads]
        wanted = made.numels if len(heads) > 1 else (made.numel,)
        for weight, numel in zip(weights, wanted, strict=True):
            if weight.shape[0] != numel:
                raise ValueError(
                    f"hyper.generator must return {numel} numbers for {mlp.spec}, got a last layer "
                    f"of {weight.shape[0]}"
                )
        hyper.check_latents(z, weights[0])
        checks.check_like_weight(weights[0], x=x)
        if x.is_nested:
            return from_jagged(
                x, task_ids, len(z), lambda rows, ids: _run(mlp, hyper, rows, z, ids)
            )
        return _run(mlp, hyper, x, z, task_ids)


def _run(mlp: Fused, hyper: HyperNet, x: Tensor, z: Tensor, task_ids: Tensor | None) -> Tensor:
    """The networks of latents that have been checked, on dense rows."""
    spec, transform = mlp.spec, mlp.transform
    activations = mlp.target.layer_activations(len(spec.sizes) - 1)
    if mlp.whole:
        (weight, bias), base = weight_and_bias(mlp.heads[0]), hyper.base
        if base is not None:
            bias = base if bias is None else bias + base
        head = weight, bias, spec, activations, task_ids
        if z.is_cpu and not torch.compiler.is_compiling():
            plain = plain_trunk(mlp.trunks[0], z.shape[1])
            y = None if plain is None else latent_mlp(x, z, plain, *head, transform)
            if y is not None:
                return y
        return generated_mlp(x, _through(mlp.trunks[0], z), *head, "z", transform)
    features = [_through(trunk, z) for trunk in mlp.trunks]
    linears = hyper.linears(features, mlp.heads, transform, task_ids)
    return run_layers(x, linears, activations)


def _through(modules: Sequence[nn.Module], z: Tensor) -> Tensor:
    for module in modules:
        z = module(z)
    return z
