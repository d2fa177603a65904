"""The hypernetwork: a latent in, the weights of a target network out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation, resolve, second_moment
from hyperfast.layout import MLPSpec, ParamSpec, positive
from hyperfast.nn.any_module import ModuleTarget, Params, as_mlp, select
from hyperfast.nn.copies import apart, clone
from hyperfast.nn.target import TargetNet

INITS = ("hyperfan_in", "hyperfan_out")


class HyperNet(nn.Module):
    """A trunk MLP ``z -> h`` and a linear head ``h -> flat weights`` (Ha, Dai, Le 2016).

    The ``generator`` may be changed or replaced; it is called and must return the flat vector.

    Args:
        z_dim: size of the latent of one task.
        target_in: input features of the target MLP.
        target_hidden: width of its hidden layer, or a tuple of widths, one a hidden layer; the
            empty tuple makes the target a single linear layer.
        target_out: output features of the target MLP.
        hidden: widths of the trunk; the last is ``H``. With ``()``, ``h`` is ``z`` itself.
        activation: activation of the trunk: a name, a module or a function. A module with
            parameters is that of the first layer; the others have copies.
        target_activation: activation of the target. It sets the gain of the initialisation, and is
            what a :class:`hyperfast.HyperMLP` without an explicit target applies. Its parameters
            are the target's: no part of ``parameters()`` and ``state_dict()`` of the hypernetwork.
        bias: whether the target's layers have biases.
        init: ``"hyperfan_in"`` or ``"hyperfan_out"`` (Chang, Flokas, Lipson 2020), the case in
            which generated biases start at zero: the generated weights start with the variance
            ``gain**2 / fan`` of a directly initialised MLP, for latents of unit variance. (Zero is
            ``2**-60`` of the features, so that rows of the head have a direction, which weight
            normalisation asks for.)
        device, dtype: of the parameters.

    Attributes:
        generator: ``nn.Sequential``, trunk and head; ``generator(z)`` is the flat vector.
        spec: the layout of that vector.
        total_target_params: its length ``P``.

    Raises:
        ValueError: a size below one, an unknown activation or initialisation.
        TypeError: a size that is not an int.

    Example:
        >>> hyper = hyperfast.HyperNet(16, 2, (32, 32), 1)  # z of size 16 -> a 2-32-32-1 MLP
        >>> [tuple(w.shape) for w in hyper(torch.randn(1000, 16))][:2]  # w1, b1
        [(1000, 32, 2), (1000, 32)]
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
        sizes = positive("target_in", target_in), *_widths("target_hidden", target_hidden)
        spec = MLPSpec((*sizes, positive("target_out", target_out)), bias)
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
        start random, by fan as ``init`` says; in a net that is no plain stack with gain 1. Values
        of a net on the meta device are those that its modules' ``reset_parameters`` sets, zero
        where none does.

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

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.Flatten())
            >>> model = hyperfast.HyperMLP(*hyperfast.HyperNet.for_module(net, z_dim=16))
            >>> model(torch.rand(5, 7, 1, 8), torch.randn(5, 16)).shape  # 7 rows a task
            torch.Size([5, 7, 24])
        """
        names = select(net, params)
        first = net.get_parameter(names[0])
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
            first.device if device is None else device,
            first.dtype if dtype is None else dtype,
            tuple(_starts(net, names)),
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
        of_target = resolve(target_activation, "target_activation")
        super().__init__()
        self.spec = spec
        self.z_dim = widths[0]
        self.init = init
        # What a generated parameter starts as, where it does not start as random weights.
        self._start = start or [None] * len(spec.shapes)
        *activations, of_target = apart([*(resolve(activation) for _ in widths[1:]), of_target])
        given = isinstance(target_activation, nn.Module)
        self.target_activation = of_target if given else target_activation
        layers: list[nn.Module] = []
        for (i, o), module in zip(pairwise(widths), activations, strict=True):
            layers += [nn.Linear(i, o, device=device, dtype=dtype), module]
        head = nn.Linear(widths[-1], spec.numel, device=device, dtype=dtype)
        self.generator = nn.Sequential(*layers, head)
        self._reset()

    @property
    def total_target_params(self) -> int:
        return self.spec.numel

    @property
    def head(self) -> nn.Linear:
        """The last module of the generator, ``h -> flat weights``.

        Raises:
            TypeError: the generator is no ``nn.Sequential`` any more.
        """
        return self._in_a_row()[-1]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the generator's first floating-point parameter; PyTorch's default where it has none,
        as a quantised one may."""
        parameter = _first_parameter(self.generator)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device:
        """Of that parameter; the CPU where there is none."""
        parameter = _first_parameter(self.generator)
        return torch.device("cpu") if parameter is None else parameter.device

    def _in_a_row(self) -> list[nn.Module]:
        """The modules that the generator calls one after the other."""
        if type(self.generator).forward is not nn.Sequential.forward or not self.generator._modules:
            raise TypeError(
                "hyper.generator must be an nn.Sequential of a trunk and a head, "
                f"got {type(self.generator).__name__}"
            )
        return list(self.generator._modules.values())

    def reset_parameters(self) -> None:
        """Initialises trunk and head; see ``init``. So are the activations that have a
        ``reset_parameters`` themselves, that of the target included.

        Raises:
            TypeError: the generator is not as it was built: linear layers with weights of their own
                and activations between them.
        """
        *trunk, _ = self._in_a_row()
        for activation in [*trunk[1::2], self.target_activation]:
            for module in activation.modules() if isinstance(activation, nn.Module) else ():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        moment = 1.0  # of the features that enter a layer; latents are taken to have variance 1
        *trunk, last = self._in_a_row()
        linears = [
            m for m in (*trunk[::2], last) if isinstance(m, nn.Linear) and "weight" in m._parameters
        ]
        if len(linears) != len(trunk) // 2 + 1 or len(trunk) % 2:
            raise TypeError(
                "hyper.generator must be linear layers with weights of their own, and activations "
                f"between them, to be initialised, got {self.generator}"
            )
        head = linears.pop()
        for linear, activation in zip(linears, trunk[1::2], strict=True):
            nn.init.normal_(linear.weight, std=(moment * linear.in_features) ** -0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            moment = second_moment(activation, linear.out_features)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        width = self.spec.sizes[1] if isinstance(self.spec, MLPSpec) else 1
        gain2 = 1 / second_moment(resolve(self.target_activation), width)
        pieces = zip(
            head.weight.split(self.spec.numels),
            [None] * len(self._start) if head.bias is None else head.bias.split(self.spec.numels),
            self.spec.shapes,
            self._start,
            strict=True,
        )
        for rows, bias, shape, start in pieces:
            if len(shape) < 2 or start is not None:
                nn.init.constant_(rows, _next_to_zero(rows.dtype))
                if start is not None and bias is not None:
                    bias.copy_(start.flatten())
                continue
            receptive = rows.shape[0] // (shape[0] * shape[1])
            fan = receptive * shape[1 if self.init == "hyperfan_in" else 0]
            nn.init.normal_(rows, std=(gain2 / (fan * moment * head.in_features)) ** 0.5)

    def features(self, z: Tensor) -> Tensor:
        """``h``: the trunk's output, ``(..., H)``.

        Raises:
            TypeError: the generator is no ``nn.Sequential`` any more, which has no trunk.
        """
        self.check_latents(z)
        for module in self._in_a_row()[:-1]:
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
        self.check_latents(z)
        if z.ndim == 1:  # layers of one's own may want a batch: quantised ones do, and norms
            return self.spec.split(self.generator(z.unsqueeze(0)).squeeze(0))
        return self.spec.split(self.generator(z))

    def check_latents(self, z: Tensor, parameter: Tensor | None = None) -> None:
        """``z`` has the right shape, and the dtype and device of ``parameter``, by default of the
        first there is.

        Raises:
            ValueError: it has another shape, or lies elsewhere.
            TypeError: it is of another dtype.
        """
        if checks.check_tensor("z", z).ndim not in (1, 2) or z.shape[-1] != self.z_dim:
            raise ValueError(
                f"z must have shape ({self.z_dim},) or (B, {self.z_dim}), got {checks.shape(z)}"
            )
        if parameter is None:
            parameter = _first_parameter(self.generator)
        if parameter is None:
            checks.check_same_kind(z=z)
        else:
            checks.check_like_weight(parameter, z=z)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "target_activation":  # is the target's: nn.Module would register it here as well
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> HyperNet:
        """As of nn.Module; the target's activation moves along."""
        super()._apply(fn, recurse)
        if isinstance(self.target_activation, nn.Module):
            self.target_activation._apply(fn)
        return self

    def train(self, mode: bool = True) -> HyperNet:
        """As of nn.Module; the target's activation follows."""
        super().train(mode)
        if isinstance(self.target_activation, nn.Module):
            self.target_activation.train(mode)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As of nn.Module. State dicts once held the target's activation here as well."""
        mine = f"{prefix}target_activation."
        old = {
            key.removeprefix(mine): state_dict.pop(key)
            for key in [*state_dict]
            if key.startswith(mine)
        }
        if old and isinstance(self.target_activation, nn.Module):
            self.target_activation.load_state_dict(old, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"spec={self.spec}, init={self.init!r}"


def _next_to_zero(dtype: torch.dtype) -> float:
    """An entry of head rows that generate zero. The sum of squares of a row must not vanish in
    float32, or weight normalisation divides zero by zero; 2**-24 is the least that float16 has."""
    limits = torch.finfo(dtype)
    return max(2**-60, limits.tiny * limits.eps)


def _first_parameter(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter that is stored; none is computed."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def _starts(net: nn.Module, names: Sequence[str]) -> Iterator[Tensor | None]:
    """The value at which each parameter starts for every latent, ``None`` for a random one."""
    again: dict[str, nn.Module] = {}
    for name in names:
        value = net.get_parameter(name).detach()
        if value.is_meta:
            path, _, own = name.rpartition(".")
            if path not in again:
                again[path] = _initialised(net.get_submodule(path))
            value = again[path].get_parameter(own).detach()
        known = not value.isnan().any()
        yield value.clone() if known and (value.ndim < 2 or _constant(value)) else None


@torch.no_grad()
def _initialised(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device with values, NaN where it does not set them itself."""
    module = clone(module).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.fill_(math.nan)
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    return module


def _constant(value: Tensor) -> bool:
    return value.numel() > 1 and bool(value.min() == value.max())


def _widths(name: str, widths: int | Sequence[int]) -> tuple[int, ...]:
    # An array of rank 0 is one int.
    one = isinstance(widths, str) or not isinstance(widths, Iterable)
    if one or getattr(widths, "ndim", None) == 0:
        return (positive(name, widths),)  # type: ignore[arg-type]
    return tuple(positive(name, w) for w in widths)  # type: ignore[union-attr]
