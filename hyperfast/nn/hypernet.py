"""The hypernetwork: a latent in, the weights of a target network out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation, resolve, second_moment
from hyperfast.layout import (
    MLPSpec,
    ParamSpec,
    Transform,
    at_least,
    boolean,
    one_each,
    positive,
    widths,
)
from hyperfast.nn.any_module import ModuleTarget, Params, as_mlp, select
from hyperfast.nn.chunked import Chunked
from hyperfast.nn.chunks import Chunks, check_chunks, layout_of
from hyperfast.nn.copies import apart
from hyperfast.nn.generator import (
    Separate,
    anew,
    features_of,
    first_parameter,
    given_trunk,
    modules_of,
    reset_all,
    start_trunk,
    trunk_of,
)
from hyperfast.nn.heads import Bias, LayerHead, Rows, cut
from hyperfast.nn.init import HeadRows, Start, start_at, start_layers, starts
from hyperfast.nn.target import TargetNet

INITS = ("hyperfan_in", "hyperfan_out")
BASES = (None, "net")


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
        trunk: a module ``(B, z_dim) -> (B, H)`` in place of the MLP of ``hidden`` and
            ``activation``. It is not initialised.
        separate: a generator of its own, trunk and head, for every generated tensor; of a given
            trunk they have copies, initialised anew where its modules have a
            ``reset_parameters``.
        bias: ``True`` or ``"generated"``; ``"shared"``, one parameter for all tasks; ``False`` or
            ``None``: or a sequence of these, one a layer.
        transform: of the generated matrices: ``"abs"``, ``"softplus"``, ``"exp"``, ``"square"``,
            or a function.
        rank: generated matrices are products ``B A`` with this many columns of ``B``.
        base: whether generated numbers are added to weights that all tasks share; then all tasks
            start as one network, initialised as one of its own would be (bias-HyperInit, Beck et
            al. 2023). ``hyper.base`` may be frozen.
        init: ``"hyperfan_in"`` or ``"hyperfan_out"`` (Chang, Flokas, Lipson 2020), the case in
            which generated biases start at zero: the generated weights start with the variance
            ``gain**2 / fan`` of a directly initialised MLP, for latents of unit variance. (Zero is
            ``2**-60`` of the features, so that rows of the head have a direction, which weight
            normalisation asks for.)
        device, dtype: of the parameters.

    Attributes:
        generator: ``nn.Sequential``, trunk and head, or with ``separate`` one of these for every
            tensor, or with ``chunks`` a module that makes all of them chunk by chunk;
            ``generator(z)`` is the flat vector of what is generated.
        spec: the layout of the weights; that vector's too, unless there are ranks, shared biases.
        total_target_params: the number ``P`` of a target's weights.
        base: ``(P,)``, laid out as ``spec`` says, or ``None``.
        biases: of every layer its shared bias ``(out,)``, empty where it has none; or ``None``.

    Raises:
        ValueError: a size below one, an unknown activation, bias, transform or initialisation, a
            transform with a rank, or one that is nowhere zero with a base.
        TypeError: a size that is not an int, a trunk that is not a module.

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
        trunk: nn.Module | None = None,
        separate: bool = False,
        bias: Bias | Sequence[Bias] = True,
        transform: Transform | None = None,
        rank: int | None = None,
        base: bool | None = None,
        init: str = "hyperfan_in",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = positive("target_in", target_in), *widths("target_hidden", target_hidden)
        sizes = *sizes, positive("target_out", target_out)
        layers = [
            LayerHead(i, o, kind, transform, rank)
            for (i, o), kind in zip(
                pairwise(sizes), one_each("bias", bias, len(sizes) - 1), strict=True
            )
        ]
        base = base is not None and boolean("base", base)
        super().__init__()
        self._describe(MLPSpec(sizes, [v.bias is not None for v in layers]), init, layers)
        if base:
            layers[0].check_base()
        self._build(
            *(z_dim, hidden, activation, target_activation, trunk, separate, base),
            device=device,
            dtype=dtype,
        )

    @classmethod
    def for_module(
        cls,
        net: nn.Module,
        z_dim: int,
        *,
        params: Params = None,
        hidden: int | Sequence[int] = (64,),
        activation: Activation = "relu",
        trunk: nn.Module | None = None,
        separate: bool = False,
        chunks: Chunks | None = None,
        chunk_dim: int | None = None,
        base: str | None = None,
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

        With ``chunks``, one small generator makes all parameters, chunk by chunk, each of the
        latent and a learned embedding of the chunk: far fewer parameters than a head that has a row
        for every weight. Parameters have a learned scale each, by which they start as above,
        whatever layers their chunks belong to. No path is fused, and there is nothing to
        :func:`hyperfast.explain`. A plain stack runs a block of tasks at a time where there are
        many, or a block of a layer's outputs where it is large: weights are made, applied and
        forgotten, and made again in the backward pass, so that memory is that of a block, some 100
        MiB in fp32 (not in compiled graphs and under transforms of ``torch.func``, nor where the
        trunk has anything but linear layers and elementwise activations, named or modules of
        PyTorch's). The weights of other nets are formed. A small net may need fewer parameters
        without chunks.

        Args:
            net: the module. It is left as it is.
            z_dim: size of the latent of one task. With ``chunks`` it may be 0: then the weights are
                made of the embeddings alone, as those of :class:`hyperfast.nets.StaticHyperNet`.
            params: which parameters are generated: ``None`` for all; a name, a glob pattern or a
                sequence of them; or a predicate ``(name, parameter) -> bool``. The others are
                trained with the target and shared by all tasks.
            hidden, activation, trunk, separate, init: as of the constructor. With ``chunks``, a
                given trunk takes latent and embedding, ``(R, z_dim + chunk_dim)``.
            chunks: a size: the flat vector of all chosen parameters, those of norms and biases too,
                is cut into pieces of so many numbers, the last of which is padded: numbers beyond
                the end are made and left out (von Oswald et al. 2020). Or ``(rows, cols)``: every
                matrix or kernel ``(out, in, ...)`` is cut into blocks of so many outputs and
                inputs, and vectors into ``rows`` numbers, padded likewise where these do not
                divide; then the head is that of Ha, Dai, Le 2016, section 3.1, of features ``h``:
                ``a_i = W_i h + b_i`` for each input, and ``W_out a_i + b_out``. Kernels of
                another size have a head of their own, as have vectors, unless ``cols`` is 1.
            chunk_dim: size of a chunk's embedding; by default ``z_dim``.
            base: ``"net"``: generated numbers are added to the parameters of ``net``, from which
                all tasks start.
            device, dtype: of the hypernetwork and of the target, by default those of the first
                generated parameter of ``net``.

        Raises:
            TypeError: ``net`` is not a module, or a chosen parameter is not floating-point; a size
                that is not an int.
            ValueError: ``params`` that match nothing, lazy parameters, an unknown base; a size
                below one, ``chunks`` of another form or with ``separate``, ``chunk_dim`` alone.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.Flatten())
            >>> model = hyperfast.HyperMLP(*hyperfast.HyperNet.for_module(net, z_dim=16))
            >>> model(torch.rand(5, 7, 1, 8), torch.randn(5, 16)).shape  # 7 rows a task
            torch.Size([5, 7, 24])
            >>> wide = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 10))
            >>> hyper, target = hyperfast.HyperNet.for_module(wide, z_dim=16, chunks=99)
            >>> hyper.total_target_params, sum(p.numel() for p in hyper.parameters())
            (19210, 11937)
        """
        if base not in BASES:
            raise ValueError(f"base must be one of {list(BASES)}, got {base!r}")
        if chunks is not None:
            chunks, z_dim = check_chunks(chunks), at_least("z_dim", z_dim, 0)
            if chunk_dim is None and z_dim == 0:
                raise ValueError("chunk_dim must be given where z_dim is 0, got None")
            chunk_dim = positive("chunk_dim", z_dim if chunk_dim is None else chunk_dim)
            if separate:
                raise ValueError("separate must be False with chunks, which one generator makes")
        elif chunk_dim is not None:
            raise ValueError(f"chunk_dim must be None without chunks, got {chunk_dim!r}")
        names = select(net, params)
        first = net.get_parameter(names[0])
        mlp = as_mlp(net) if len(names) == len(list(net.parameters())) else None
        target: TargetNet | ModuleTarget
        layers = None
        if mlp is None:
            target = ModuleTarget(net, names)
            spec, gain = target.spec, resolve("identity")
        else:
            spec, target = mlp
            gain = target.activations[0]
            layers = [
                LayerHead(v.in_features, v.out_features, "generated" if v.bias else None)
                for v in spec.layers
            ]
        device = first.device if device is None else device
        dtype = first.dtype if dtype is None else dtype
        hyper = cls.__new__(cls)
        nn.Module.__init__(hyper)
        hyper._describe(spec, init, layers, tuple(starts(net, names, whole=base is not None)))
        hyper._build(
            *(z_dim, hidden, activation, gain, trunk, separate, base is not None),
            *(chunks, chunk_dim or 0),
            device=device,
            dtype=dtype,
        )
        return hyper, target.to(device=device, dtype=dtype)

    def _describe(
        self,
        spec: ParamSpec,
        init: str,
        layers: Sequence[LayerHead] | None,
        start: Sequence[Tensor | None] | None = None,
    ) -> None:
        """What is generated, and what becomes of it: the weights themselves without ``layers``."""
        if init not in INITS:
            raise ValueError(f"init must be one of {list(INITS)}, got {init!r}")
        self.spec = spec
        self.init = init
        self.layers = None if layers is None else tuple(layers)
        shapes = spec.shapes if layers is None else sum((v.spec.shapes for v in layers), ())
        self.generated = ParamSpec(shapes)
        self.transform = layers[0].transform if layers else None
        self.rank = layers[0].rank if layers else None
        # What a generated parameter starts as, where it does not start as random weights.
        self._start = start or [None] * len(spec.shapes)

    def _build(
        self,
        z_dim: int,
        hidden: int | Sequence[int],
        activation: Activation,
        target_activation: Activation,
        trunk: nn.Module | None,
        separate: bool,
        base: bool,
        chunks: Chunks | None = None,
        chunk_dim: int = 0,
        **kind: Any,
    ) -> None:
        self.z_dim = at_least("z_dim", z_dim, 1 if chunks is None else 0)
        self.chunk_dim = chunk_dim
        self.given_trunk = trunk is not None
        numels = self.generated.numels if boolean("separate", separate) else (self.generated.numel,)
        sizes = self.z_dim + chunk_dim, *widths("hidden", hidden)
        depth = 0 if trunk is not None else len(sizes) - 1
        *activations, of_target = apart(
            [
                *(resolve(activation) for _ in range(depth * len(numels))),
                resolve(target_activation, "target_activation"),
            ]
        )
        given = isinstance(target_activation, nn.Module)
        self.target_activation = of_target if given else target_activation
        if trunk is None:
            features = sizes[-1]
            trunks = [
                trunk_of(sizes, activations[n * depth : (n + 1) * depth], **kind)
                for n in range(len(numels))
            ]
        else:
            features = features_of(trunk, sizes[0])
            trunks = [[trunk], *([anew(trunk)] for _ in numels[1:])]
        self.generator: Any
        if chunks is not None:
            values = [None] * len(self._start) if base else self._start
            made = layout_of(self.spec, chunks), features, chunk_dim, self.spec, values
            self.generator = Chunked(trunks[0], *made, **kind)
        else:
            chains = [
                nn.Sequential(*own, nn.Linear(features, numel, **kind))
                for own, numel in zip(trunks, numels, strict=True)
            ]
            self.generator = Separate(chains) if separate else chains[0]
        zeros = partial(torch.zeros, **kind)
        shared = [v.out_features * (v.bias == "shared") for v in self.layers or ()]
        self.biases = nn.ParameterList(map(zeros, shared)) if any(shared) else None
        self.base = nn.Parameter(zeros(self.spec.numel)) if base else None
        self._reset()

    @property
    def total_target_params(self) -> int:
        return self.spec.numel

    @property
    def head(self) -> nn.Linear:
        """The last module of the generator, ``h -> flat weights``.

        Raises:
            AttributeError: the generator is no ``nn.Sequential``, and has no one head: there are
                chunks, or a generator for every tensor.
        """
        try:
            return modules_of(self.generator)[-1]  # type: ignore[return-value]
        except TypeError:
            raise AttributeError("head") from None  # hasattr, as torch.jit asks, knows no other

    @property
    def dtype(self) -> torch.dtype:
        """Of the generator's first floating-point parameter; PyTorch's default where it has none,
        as a quantised one may."""
        parameter = first_parameter(self.generator)
        return torch.get_default_dtype() if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device:
        """Of that parameter; the CPU where there is none."""
        parameter = first_parameter(self.generator)
        return torch.device("cpu") if parameter is None else parameter.device

    def _chains(self) -> list[list[nn.Module]]:
        """Trunk and head of the generator, or of each."""
        if isinstance(self.generator, Chunked):
            return [self.generator.chain()]
        several = type(self.generator) is Separate
        return [modules_of(g) for g in (self.generator if several else [self.generator])]

    def reset_parameters(self) -> None:
        """Initialises trunks and heads; see ``init``. So are the activations that have a
        ``reset_parameters`` themselves, that of the target included. A trunk that was given stays
        as it is.

        Raises:
            TypeError: the generator is not as it was built: linear layers with weights of their own
                and activations between them.
        """
        chains = [] if self.given_trunk else self._chains()
        for activation in [*(m for c in chains for m in c[1:-1:2]), self.target_activation]:
            if isinstance(activation, nn.Module):
                reset_all(activation)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        heads = []
        for modules in self._chains():
            head, moment = (
                given_trunk(modules, self.z_dim + self.chunk_dim)
                if self.given_trunk
                else start_trunk(modules)
            )
            heads.append(HeadRows(head.weight, head.bias, moment))
        rows: Sequence[Start] = heads
        if isinstance(self.generator, Chunked):
            rows = self.generator.start(heads[0].moment)
        elif type(self.generator) is not Separate:
            rows = heads[0].split(self.generated)
        width = self.spec.sizes[1] if isinstance(self.spec, MLPSpec) else 1
        gain2 = 1 / second_moment(resolve(self.target_activation), width)
        base = None if self.base is None else self.spec.split(self.base.data)
        out_fan = self.init == "hyperfan_out"
        if self.layers is None or any(start is not None for start in self._start):
            start_at(self._start, self.spec, rows, base, gain2, out_fan)
        else:
            start_layers(self.layers, rows, base, gain2, out_fan)
        for bias in self.biases or ():
            nn.init.zeros_(bias)

    def features(self, z: Tensor) -> Tensor:
        """``h``: the trunk's output, ``(..., H)``.

        Raises:
            TypeError: the generator is no ``nn.Sequential``, which has one trunk.
        """
        self.check_latents(z)
        for module in modules_of(self.generator)[:-1]:
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
            return self._weights(self.generator(z.unsqueeze(0)).squeeze(0))
        return self._weights(self.generator(z))

    def _weights(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The target's weights, of what the generator returns."""
        base = None if self.base is None else self.spec.split(self.base)
        if self.layers is None or all(v.plain for v in self.layers):
            made = self.spec.split(flat)
        else:
            numels = [v.spec.numel for v in self.layers]
            if flat.shape[-1] != self.generated.numel:
                self.generated.split(flat)  # raises
            made = ()
            for n, (v, piece) in enumerate(
                zip(self.layers, flat.split(numels, dim=-1), strict=True)
            ):
                w, b = v.weights(piece)
                if v.bias == "shared":
                    assert self.biases is not None
                    b = self.biases[n].expand(*flat.shape[:-1], -1)
                made += (w,) if b is None else (w, b)
        return made if base is None else tuple(w + b for w, b in zip(made, base, strict=True))

    def linears(
        self,
        features: Sequence[Tensor],
        heads: Sequence[nn.Linear],
        transform: str,
        task_ids: Tensor | None,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """The linear part of every layer as a function of its rows, which does not form the
        weights; of the features that enter the one head, or the head of every tensor."""
        assert self.layers is not None
        rows = [
            Rows(*checks.check_and_cast(h=h, weight=head.weight, bias=head.bias))
            for h, head in zip(features, heads, strict=True)
        ]
        made = rows if type(self.generator) is Separate else cut(*rows[0], self.generated)
        base = iter(() if self.base is None else self.spec.split(self.base))
        at = 0
        for n, v in enumerate(self.layers):
            own = made[at : at + len(v.spec.shapes)]
            at += len(own)
            layer = v if v.transform == (transform or None) else replace(v, transform=transform)
            shared = None if self.biases is None or v.bias != "shared" else self.biases[n]
            own_base = (
                (next(base), next(base) if v.bias else None) if self.base is not None else None
            )

            def linear(
                x: Tensor,
                layer: LayerHead = layer,
                own: Sequence[Rows] = own,
                shared: Tensor | None = shared,
                base: tuple[Tensor, Tensor | None] | None = own_base,
            ) -> Tensor:
                x = x.to(own[0].h.dtype)  # that of autocast
                if shared is not None:
                    shared = shared.to(x.dtype)
                y = layer.apply(x, own, shared, task_ids)
                return y if base is None else y + F.linear(x, *base)

            yield linear

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
            parameter = first_parameter(self.generator)
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
