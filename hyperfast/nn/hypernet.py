"""The hypernetwork: a latent in, the weights of a target network out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation, resolve, second_moment
from hyperfast.layout import MLPSpec, ParamSpec, positive
from hyperfast.nn.any_module import ModuleTarget, Params, as_mlp, select
from hyperfast.nn.target import TargetNet

INITS = ("hyperfan_in", "hyperfan_out")


class HyperNet(nn.Module):
    """A trunk MLP ``z -> h`` and a linear head ``h -> flat weights`` (Ha, Dai, Le 2016).

    Args:
        z_dim: size of the latent of one task.
        target_in: input features of the target MLP.
        target_hidden: width of its hidden layer, or a tuple of widths, one a hidden layer; the
            empty tuple makes the target a single linear layer.
        target_out: output features of the target MLP.
        hidden: widths of the trunk; the last is ``H``. With ``()``, ``h`` is ``z`` itself.
        activation: activation of the trunk: a name, a module or a function.
        target_activation: activation of the target. It sets the gain of the initialisation, and is
            what a :class:`hyperfast.HyperMLP` without an explicit target applies.
        bias: whether the target's layers have biases.
        init: ``"hyperfan_in"`` or ``"hyperfan_out"`` (Chang, Flokas, Lipson 2020), the case in
            which generated biases start at zero: the generated weights start with the variance
            ``gain**2 / fan`` of a directly initialised MLP, for latents of unit variance.
        device, dtype: of the parameters.

    Attributes:
        generator: ``nn.Sequential``, trunk and head; ``generator(z)`` is the flat vector.
        spec: the layout of that vector.
        total_target_params: its length ``P``.

    Raises:
        ValueError: a size below one, an unknown activation or initialisation.
        TypeError: a size that is not an int.
    """

    def __init__(
        self,
        z_dim: int,
        target_in: int,
        target_hidden: int | Sequence[int],
        target_out: int,
        *,
        hidden: int | Sequence[int] = (64,),
        activation: Activation = "relu",
        target_activation: Activation = "relu",
        bias: bool = True,
        init: str = "hyperfan_in",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        positive("target_in", target_in)
        positive("target_out", target_out)
        widths = _widths("target_hidden", target_hidden)
        spec = MLPSpec((target_in, *widths, target_out), bias)
        self._build(spec, z_dim, hidden, activation, target_activation, init, device, dtype)

    @classmethod
    def for_module(
        cls,
        net: nn.Module,
        z_dim: int,
        *,
        params: Params = None,
        hidden: int | Sequence[int] = (64,),
        activation: Activation = "relu",
        init: str = "hyperfan_in",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[HyperNet, nn.Module]:
        """A hypernetwork for any module, and the target that applies its weights.

        ``HyperMLP(*HyperNet.for_module(net, z_dim))`` is the model of both. A plain stack of
        ``nn.Linear`` and activations, all generated, becomes a :class:`hyperfast.TargetNet`, with
        its shapes of ``x``, and takes the fused path; any other net a
        :class:`hyperfast.ModuleTarget`.

        Parameters of rank below two, and those that are constant in ``net`` (scales of norms,
        layers that start at zero), start at their values in ``net`` for every latent. The others
        start random, by fan as ``init`` says; in a net that is no plain stack with gain 1.

        Args:
            net: the module. It is left as it is.
            z_dim: size of the latent of one task.
            params: which parameters are generated: ``None`` for all; a name, a glob pattern or a
                sequence of them; or a predicate ``(name, parameter) -> bool``. The others are
                trained with the target and shared by all tasks.
            hidden, activation, init: as of the constructor.
            device, dtype: of the hypernetwork and of the target, by default those of the first
                generated parameter of ``net``.

        Raises:
            TypeError: ``net`` is not a module, or a chosen parameter is not floating-point.
            ValueError: ``params`` that match nothing, or lazy parameters.
        """
        names = select(net, params)
        values = [net.get_parameter(name).detach() for name in names]
        mlp = as_mlp(net) if len(names) == len(list(net.parameters())) else None
        target: TargetNet | ModuleTarget
        if mlp is None:
            target = ModuleTarget(net, names)
            spec, gain = target.spec, resolve("identity")
        else:
            spec, target = mlp
            gain = target.activations[0]
        hyper = cls.__new__(cls)
        hyper._build(
            *(spec, z_dim, hidden, activation, gain, init),
            values[0].device if device is None else device,
            values[0].dtype if dtype is None else dtype,
            tuple(v.clone() if v.ndim < 2 or _constant(v) else None for v in values),
        )
        return hyper, target.to(device=device, dtype=dtype)

    def _build(
        self,
        spec: ParamSpec,
        z_dim: int,
        hidden: int | Sequence[int],
        activation: Activation,
        target_activation: Activation,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        start: Sequence[Tensor | None] | None = None,
    ) -> None:
        if init not in INITS:
            raise ValueError(f"init must be one of {list(INITS)}, got {init!r}")
        widths = (positive("z_dim", z_dim), *_widths("hidden", hidden))
        resolve(target_activation, "target_activation")
        super().__init__()
        self.spec = spec
        self.z_dim = z_dim
        self.target_activation = target_activation
        self.init = init
        # What a generated parameter starts as, where it does not start as random weights.
        self._start = start or [None] * len(spec.shapes)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [
                nn.Linear(i, o, device=device, dtype=dtype),
                resolve(activation),
            ]
        head = nn.Linear(widths[-1], spec.numel, device=device, dtype=dtype)
        self.generator = nn.Sequential(*layers, head)
        self.reset_parameters()

    @property
    def total_target_params(self) -> int:
        return self.spec.numel

    @property
    def head(self) -> nn.Linear:
        """The last linear layer, ``h -> flat weights``."""
        *_, head = self.generator._modules.values()
        return head  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises trunk and head; see ``init``."""
        moment = 1.0  # of the features that enter a layer; latents are taken to have variance 1
        trunk = list(self.generator)[:-1]
        for linear, activation in zip(trunk[::2], trunk[1::2], strict=True):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=(moment * linear.in_features) ** -0.5)
            nn.init.zeros_(linear.bias)
            moment = second_moment(activation)
        nn.init.zeros_(self.head.bias)
        gain2 = 1 / second_moment(resolve(self.target_activation))
        weights, biases = (t.split(self.spec.numels) for t in (self.head.weight, self.head.bias))
        for rows, bias, shape, start in zip(
            weights, biases, self.spec.shapes, self._start, strict=True
        ):
            if len(shape) < 2 or start is not None:
                nn.init.zeros_(rows)
                if start is not None:
                    bias.copy_(start.flatten())
                continue
            receptive = rows.shape[0] // (shape[0] * shape[1])
            fan = receptive * shape[1 if self.init == "hyperfan_in" else 0]
            nn.init.normal_(rows, std=(gain2 / (fan * moment * self.head.in_features)) ** 0.5)

    def features(self, z: Tensor) -> Tensor:
        """``h``: the trunk's output, ``(..., H)``."""
        self._check(z)
        *trunk, _ = self.generator._modules.values()
        for module in trunk:
            z = module(z)
        return z

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """The target's weights for one latent or for a batch of them.

        Args:
            z: ``(z_dim,)`` or ``(B, z_dim)``.

        Returns:
            ``(w1, b1, w2, b2, ...)``, views of one flat vector: ``w (out, in)``, ``b (out,)``, with
            a leading ``B`` where ``z`` has one.

        Raises:
            ValueError: ``z`` has another shape.
            TypeError: ``z`` is not of the parameters' dtype.
        """
        self._check(z)
        return self.spec.split(self.generator(z))

    def _check(self, z: Tensor) -> None:
        weight = self.head.weight
        if checks.tensor("z", z).ndim not in (1, 2) or z.shape[-1] != self.z_dim:
            raise ValueError(
                f"z must have shape ({self.z_dim},) or (B, {self.z_dim}), got {checks.shape(z)}"
            )
        checks.like_weight(weight, z=z)

    def extra_repr(self) -> str:
        return f"spec={self.spec}, init={self.init!r}"


def _constant(value: Tensor) -> bool:
    return not value.is_meta and value.numel() > 1 and bool(value.min() == value.max())


def _widths(name: str, widths: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(widths, int):
        widths = (widths,)
    if not isinstance(widths, Sequence):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {widths!r}")
    return tuple(positive(name, w) for w in widths)
