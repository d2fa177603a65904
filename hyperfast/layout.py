"""Where every number of a network lies, and the one text that describes a network."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import KNOWN, named
from hyperfast.checks import Weights


@dataclass(frozen=True)
class ParamSpec:
    """An ordered list of parameter shapes and their layout, back to back, in one flat vector.

    Args:
        shapes: shape of each parameter, in the order in which they are laid out, row-major.

    Attributes:
        numels: number of elements of each parameter.
        numel: length ``P`` of the flat vector.
    """

    shapes: tuple[tuple[int, ...], ...]
    # No cached properties: Dynamo sees through none.
    numels: tuple[int, ...] = field(init=False, repr=False, compare=False)
    numel: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numels", tuple(math.prod(shape) for shape in self.shapes))
        object.__setattr__(self, "numel", sum(self.numels))

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of ``flat (..., P)``, one a parameter, each of shape ``(..., *shape)``.

        Raises:
            ValueError: the last dimension of ``flat`` is not ``P``.
        """
        if checks.check_tensor("flat", flat).ndim == 0 or flat.shape[-1] != self.numel:
            raise ValueError(
                f"flat must have {self.numel} elements in its last dimension, "
                f"got shape {tuple(flat.shape)}"
            )
        pieces = flat.split(self.numels, dim=-1)
        # Splitting a dimension needs no copy, whatever its stride.
        return tuple(p.view((*p.shape[:-1], *s)) for p, s in zip(pieces, self.shapes, strict=True))

    def flatten(self, weights: Weights) -> Tensor:
        """The flat vector ``(..., P)`` that :meth:`split` would split into ``weights``.

        Raises:
            ValueError: wrong number of tensors, wrong shapes, or leading dimensions that disagree.
        """
        weights = checks.check_tensors("weights", weights)
        if len(weights) != len(self.shapes):
            raise ValueError(
                f"weights must hold {len(self.shapes)} tensors, one a parameter, got {len(weights)}"
            )
        batch = weights[0].shape[: weights[0].ndim - len(self.shapes[0])]
        for n, (w, shape) in enumerate(zip(weights, self.shapes, strict=True)):
            if w.shape != (*batch, *shape):
                raise ValueError(
                    f"weights[{n}] must have shape {(*batch, *shape)}, got {tuple(w.shape)}"
                )
        pieces = [w.reshape(*batch, n) for w, n in zip(weights, self.numels, strict=True)]
        return torch.cat(pieces, dim=-1)


class MLPSpec(ParamSpec):
    """Layout of an MLP's parameters: layer by layer, weight ``(out, in)`` row-major, then bias.

    Args:
        sizes: widths ``(in, hidden, ..., out)``, at least two.
        bias: whether every layer has a bias; or a sequence of that, one a layer.

    Attributes:
        sizes: the widths.
        bias: one bool, or a tuple of them where layers differ.
        biases: a tuple of them, one a layer.

    Raises:
        TypeError: a width is not an int.
        ValueError: fewer than two widths, a width below one, biases that are not one a layer.

    Example:
        >>> spec = hyperfast.MLPSpec((64, 64, 10))
        >>> spec.numel, [tuple(w.shape) for w in spec.split(torch.zeros(spec.numel))]
        (4810, [(64, 64), (64,), (10, 64), (10,)])
    """

    sizes: tuple[int, ...]
    bias: bool | tuple[bool, ...]
    biases: tuple[bool, ...]

    def __init__(self, sizes: Sequence[int], bias: bool | Sequence[bool] = True):
        if not isinstance(sizes, Iterable) or getattr(sizes, "ndim", None) == 0:
            raise TypeError(f"sizes must be a sequence of ints, got {sizes!r}")
        sizes = tuple(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output width, got {sizes}")
        sizes = tuple(positive("sizes", s) for s in sizes)
        biases = one_each("bias", bias, len(sizes) - 1)
        if not all(isinstance(b, bool | int) for b in biases):
            raise TypeError(f"bias must be a bool, or one a layer, got {bias!r}")
        biases = tuple(map(bool, biases))
        shapes: list[tuple[int, ...]] = []
        for i, o, has_bias in zip(sizes, sizes[1:], biases, strict=False):
            shapes += [(o, i), (o,)] if has_bias else [(o, i)]
        super().__init__(tuple(shapes))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "biases", biases)
        object.__setattr__(self, "bias", biases[0] if len({*biases}) == 1 else biases)

    def __repr__(self) -> str:
        return f"MLPSpec(sizes={self.sizes}, bias={self.bias})"

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, input side first; it does not know their activations."""
        return self.network((("identity", 1.0),) * (len(self.sizes) - 1)).layers

    def network(self, activations: tuple[tuple[str, float], ...]) -> Network:
        """The network of these parameters, with the name and parameter of each activation."""
        return _network(self.sizes, self.biases, activations)

    def describe(self, activations: Sequence[nn.Module | None], transform: str = "") -> str | None:
        """The text of the network with these modules as activations, and a transform of every
        matrix; ``None`` where kernels do not know an activation."""
        names = []
        for activation in activations:
            name = named(activation)
            if name is None:
                return None
            names.append(name)
        if torch.compiler.is_compiling():  # Dynamo sees no cache
            return _text(self.sizes, self.biases, names, transform)
        return _known_text(self.sizes, self.biases, tuple(names), transform)


class Place(NamedTuple):
    """Where a layer's numbers begin in the rows of a stored network: its matrix in ``weights``, its
    scales in ``scales_and_biases``, its bias there too if there are scales, else in ``weights``."""

    matrix: int
    scale: int
    bias: int


@dataclass(frozen=True)
class Layer:
    """One layer of a network: ``act(W x + c)``.

    Attributes:
        bias: ``"b"``, each task has its own; ``"s"``, all tasks share one; ``""``, none.
        activation, parameter: what follows, an entry of :data:`hyperfast.activations.KNOWN`.
        transform: of the matrix before it is used, a key of :data:`TRANSFORMS`, or ``""``.
        begin: where its parameters begin in the network's flat vector: the matrix ``(out, in)``
            row-major, then its own bias.
    """

    in_features: int
    out_features: int
    bias: str = "b"
    activation: str = "identity"
    parameter: float = 1.0
    transform: str = ""
    begin: int = 0

    @property
    def weight_numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def numel(self) -> int:
        return self.weight_numel + self.out_features * (self.bias == "b")

    @property
    def end(self) -> int:
        return self.begin + self.numel

    @property
    def text(self) -> str:
        named = self.activation, self.parameter
        return _layer_text(self.out_features, self.bias, named, self.transform)

    @property
    def activate(self) -> Callable[[Tensor], Tensor]:
        return partial(_call, KNOWN[self.activation].value, self.parameter)

    @property
    def slope(self) -> Callable[[Tensor], Tensor]:
        """The derivative of :attr:`activate`."""
        return partial(_call, KNOWN[self.activation].slope, self.parameter)


def _layer_text(out: int, bias: str, named: tuple[str, float], transform: str = "") -> str:
    text = f"{out} {bias}" if bias else f"{out}"
    name, parameter = named
    if name != "identity":
        text += f" {name}:{parameter!r}" if KNOWN[name].parameter else f" {name}"
    return f"{text} {transform}(W)" if transform else text


def _call(function: Callable[[Tensor, float], Tensor], parameter: float, pre: Tensor) -> Tensor:
    return function(pre, parameter)


class Known(NamedTuple):
    """A transform that kernels know, and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


# What becomes of a generated or stored matrix before it is used.
Transform: TypeAlias = str | Callable[[Tensor], Tensor]

TRANSFORMS: dict[str, Known] = {
    "abs": Known(torch.abs, torch.sign),
    "exp": Known(torch.exp, torch.exp),
    "softplus": Known(nn.functional.softplus, lambda w: torch.sigmoid(w).where(w <= 20, 1.0)),
    "square": Known(torch.square, lambda w: 2 * w),
}


def check_transform(name: str, transform: Transform | None) -> str | None:
    """How kernels are told of a transform: a key of :data:`TRANSFORMS`, ``""`` for none; ``None``
    for a function, which they cannot run.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if transform is None:
        return ""
    if isinstance(transform, str):
        if transform and transform not in TRANSFORMS:
            raise ValueError(
                f"{name} must be one of {sorted(TRANSFORMS)} or a function, got {transform!r}"
            )
        return transform
    if not callable(transform):
        raise TypeError(f"{name} must be callable, got {transform!r}")
    return None


def transformed(transform: Transform | None, w: Tensor, name: str = "weight_transform") -> Tensor:
    """``transform`` of matrices; ``name`` is that of the argument.

    Raises:
        ValueError: it is a function that does not keep their shape.
    """
    if not transform:
        return w
    if isinstance(transform, str):
        return TRANSFORMS[transform].value(w)
    y = transform(w)
    if not isinstance(y, Tensor) or y.shape != w.shape:
        got = checks.shape(y) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name} must keep the shape of a weight, {checks.shape(w)}, got {got}")
    return y


_FLOAT = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?")  # as Python writes them
_WIDTH = r"[1-9]\d{0,17}"
_LAYER = re.compile(
    rf"(?P<out>{_WIDTH})"
    r"(?: (?P<bias>[bs]))?(?: (?P<name>[a-z_]+)(?::(?P<number>\S+))?)?"
    rf"(?: (?P<transform>{'|'.join(TRANSFORMS)})\(W\))?"
)


@dataclass(frozen=True)
class Network:
    """A network as its layers; :attr:`text` is how ops, files and the C++ kernels are told of it:

        network    := INT " > " layer (", " layer)*
        layer      := OUT [" " BIAS] [" " ACTIVATION] [" " TRANSFORM]
        BIAS       := "b" (each task has its own) | "s" (all share one)
        ACTIVATION := NAME [":" FLOAT]
        TRANSFORM  := ("abs" | "exp" | "softplus" | "square") "(W)"

    For instance ``"64 > 64 b relu, 32 b sin:30.0, 10"``.
    """

    layers: tuple[Layer, ...]

    @cached_property
    def text(self) -> str:
        return f"{self.sizes[0]} > {', '.join(layer.text for layer in self.layers)}"

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return (self.layers[0].in_features, *(layer.out_features for layer in self.layers))

    @property
    def numel(self) -> int:
        """Parameters of one network."""
        return self.layers[-1].end

    @property
    def weight_numel(self) -> int:
        """Entries of its matrices."""
        return sum(layer.weight_numel for layer in self.layers)

    @property
    def vector_numel(self) -> int:
        """Scales of its outputs and own biases: what stands beside matrices of int8."""
        return sum(self.sizes[1:]) + self.numel - self.weight_numel

    @cached_property
    def kept(self) -> list[int]:
        """The widths of the pre-activations that a backward pass needs: of every layer but a last
        one that nothing follows. Kernels keep them layer by layer, of each all rows."""
        last = len(self.layers) - (self.layers[-1].activation == "identity")
        return [layer.out_features for layer in self.layers[:last]]

    @cached_property
    def spec(self) -> MLPSpec:
        """The layout of the parameters.

        Raises:
            ValueError: it is not that of an MLPSpec: there are shared biases.
        """
        if any(layer.bias == "s" for layer in self.layers):
            raise ValueError(f"network must have no shared biases (s), got {self.text!r}")
        return MLPSpec(self.sizes, [layer.bias == "b" for layer in self.layers])

    @property
    def transform(self) -> str:
        """Of all matrices, ``""`` for none.

        Raises:
            ValueError: layers differ.
        """
        (first, *others) = {layer.transform for layer in self.layers}
        if others:
            raise ValueError(f"network must have one transform, got {self.text!r}")
        return first

    def modules(self) -> list[nn.Module | None]:
        """The activation after each layer, ``None`` for none."""
        return [
            None if v.activation == "identity" else KNOWN[v.activation].make(v.parameter)
            for v in self.layers
        ]

    def places(self, scaled: bool) -> tuple[Place, ...]:
        """Where each layer lies in a stored network. With ``scaled``, matrices alone are in one
        row, and of each layer the scales ``(out,)``, then the biases ``(out,)``, in another."""
        places, matrix, vector = [], 0, 0
        for layer in self.layers:
            if not scaled:
                places.append(Place(layer.begin, 0, layer.begin + layer.weight_numel))
                continue
            places.append(Place(matrix, vector, vector + layer.out_features))
            matrix += layer.weight_numel
            vector += layer.out_features * (1 + (layer.bias == "b"))
        return tuple(places)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Network:
        """The network that ``text`` describes.

        Raises:
            ValueError: it does not follow the grammar, or names an activation that is not known.
        """
        first, arrow, rest = text.partition(" > ")
        if not arrow or not re.fullmatch(_WIDTH, first):
            raise ValueError(f"network must begin with its input width and ' > ', got {text!r}")
        layers: list[Layer] = []
        for entry in rest.split(", "):
            found = _LAYER.fullmatch(entry)
            if found is None:
                raise ValueError(
                    "network must describe its layers as 'OUT [b|s] [ACTIVATION[:NUMBER]] "
                    f"[TRANSFORM(W)]', got {entry!r} in {text!r}"
                )
            name = found["name"] or "identity"
            if name not in KNOWN or found["name"] == "identity":
                raise ValueError(
                    f"network must have activations among {sorted(KNOWN)}, got {text!r}"
                )
            known, number = KNOWN[name], found["number"]
            if number is not None and (
                not known.parameter or not _FLOAT.fullmatch(number) or math.isinf(float(number))
            ):
                raise ValueError(
                    "network must have a number such as 30.0 behind the ':' of activations that "
                    f"take one, got {text!r}"
                )
            parameter = known.default if number is None else float(number)
            before = layers[-1] if layers else None
            layers.append(
                Layer(
                    before.out_features if before else int(first),
                    int(found["out"]),
                    found["bias"] or "",
                    name,
                    parameter,
                    found["transform"] or "",
                    before.end if before else 0,
                )
            )
        return Network(tuple(layers))

    @staticmethod
    @lru_cache(maxsize=4096)
    def for_kernels(text: str) -> Network:
        """:meth:`parse`, for ops that run a network whole.

        Raises:
            ValueError: also for shared biases, which they do not know.
        """
        network = Network.parse(text)
        if any(layer.bias == "s" for layer in network.layers):
            raise ValueError(
                f"network must have no shared biases (s) to run as one op, got {text!r}"
            )
        return network


def _text(
    sizes: Sequence[int],
    biases: Sequence[bool],
    names: Sequence[tuple[str, float]],
    transform: str,
) -> str:
    layers = [
        _layer_text(o, "b" if has_bias else "", name, transform)
        for o, has_bias, name in zip(sizes[1:], biases, names, strict=True)
    ]
    return f"{sizes[0]} > {', '.join(layers)}"


_known_text = lru_cache(maxsize=4096)(_text)


def text_of_one(in_features: int, out_features: int, has_bias: bool, transform: str) -> str:
    """The text of a network of one layer that nothing follows."""
    text = _text if torch.compiler.is_compiling() else _known_text
    sizes = in_features, out_features
    return text(sizes, (has_bias,), (("identity", 1.0),), transform)


class Trunk(NamedTuple):
    """A trunk of linear layers and activations: a network of one task whose rows are latents.

    Attributes:
        tensors: matrices and biases, layer by layer.
        features: how many it makes.
        numel: of all tensors.
        text: of the network.
    """

    tensors: list[Tensor]
    features: int
    numel: int
    text: str

    @classmethod
    def of(
        cls,
        tensors: list[Tensor],
        sizes: Sequence[int],
        biases: Sequence[bool],
        names: Sequence[tuple[str, float]],
    ) -> Trunk:
        """That of these tensors, for a network of such layers."""
        return cls(tensors, *_facts(tuple(sizes), tuple(biases), tuple(names)))


@lru_cache(maxsize=4096)
def _facts(
    sizes: tuple[int, ...], biases: tuple[bool, ...], names: tuple[tuple[str, float], ...]
) -> tuple[int, int, str]:
    """Features, parameters and text of a trunk."""
    return sizes[-1], MLPSpec(sizes, biases).numel, _text(sizes, biases, names, "")


@lru_cache(maxsize=4096)
def _network(
    sizes: tuple[int, ...], biases: tuple[bool, ...], activations: tuple[tuple[str, float], ...]
) -> Network:
    layers: list[Layer] = []
    for n, (name, parameter) in enumerate(activations):
        begin, bias = layers[-1].end if layers else 0, "b" if biases[n] else ""
        layers.append(Layer(sizes[n], sizes[n + 1], bias, name, parameter, begin=begin))
    return Network(tuple(layers))


LAYOUTS = ("oi", "io")


class Generated(NamedTuple):
    """What makes a generated layer of features ``h (B, K)``: four tensors of any strides, of which
    the matrix alone must be there.

    ``W_b = matrix . h_b + matrix_bias`` and ``c_b = vector . h_b + vector_bias``. A ``vector_bias``
    without a ``vector`` is a bias that all tasks share.
    """

    matrix: Tensor  # (O, I, K)
    matrix_bias: Tensor | None = None  # (O, I)
    vector: Tensor | None = None  # (O, K)
    vector_bias: Tensor | None = None  # (O,)

    @classmethod
    def of_head(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        in_features: int,
        has_bias: bool,
        layout: str = "oi",
    ) -> Generated:
        """Views of the rows ``weight (P, K)`` and ``bias (P,)`` of a head that make one layer; the
        matrix lies ``(out, in)`` in them, or ``(in, out)`` in layout ``"io"``."""
        per_output = in_features + int(has_bias)  # a trace adds no bool
        out = weight.shape[0] // per_output if per_output else 0
        matrix, vector, shared, constant = weight, None, bias, None
        if has_bias:  # a split's gradient is a copy
            sizes = [out * in_features, out]
            matrix, vector = weight.split(sizes)
            shared, constant = (None, None) if bias is None else bias.split(sizes)
        lies = (out, in_features) if layout == "oi" else (in_features, out)
        matrix = matrix.view(*lies, weight.shape[1])  # needs no copy, whatever its strides
        shared = None if shared is None else shared.view(lies)
        if layout == "io":
            matrix, shared = matrix.transpose(0, 1), None if shared is None else shared.mT
        return cls(matrix, shared, vector, constant)

    def check(self, in_features: int, features: int) -> None:
        """Raises ValueError unless all shapes agree, with these numbers of inputs and features."""
        out = self.matrix.shape[0] if self.matrix.ndim else 0
        shapes = (out, in_features, features), (out, in_features), (out, features), (out,)
        for name, t, shape in zip(self._fields, self, shapes, strict=True):
            if t is not None and t.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")

    @property
    def transposed(self) -> Generated:
        """What maps gradients of outputs to those of inputs."""
        shared = self.matrix_bias
        return Generated(self.matrix.transpose(0, 1), None if shared is None else shared.mT)


def of_layer(weight: Tensor, bias: Tensor | None, layer: Layer) -> Generated:
    """What makes one layer: its rows of ``weight (P, K)`` and ``bias (P,)``, a network's head."""
    part = slice(layer.begin, layer.end)
    shared = None if bias is None else bias[part]
    return Generated.of_head(weight[part], shared, layer.in_features, layer.bias == "b")


def one_each(name: str, value: Any, count: int) -> tuple:
    """``value`` for each of ``count`` layers: itself where it is no sequence, else its entries;
    raises ValueError naming ``name`` where they are not as many."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (value,) * count
    entries = tuple(value)
    if len(entries) != count:
        raise ValueError(f"{name} must hold {count} entries, one a layer, got {len(entries)}")
    return entries


def boolean(name: str, value: bool) -> bool:
    """``value`` if it is a bool; raises TypeError naming ``name``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def widths(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """One width or several as a tuple; raises as :func:`positive`."""
    # An array of rank 0 is one int.
    one = isinstance(value, str) or not isinstance(value, Iterable)
    if one or getattr(value, "ndim", None) == 0:
        return (positive(name, value),)  # type: ignore[arg-type]
    return tuple(positive(name, w) for w in value)  # type: ignore[union-attr]


def positive(name: str, value: int) -> int:
    """``value`` as an int, of at least 1; raises TypeError or ValueError naming ``name``."""
    return at_least(name, value, 1)


def at_least(name: str, value: int, least: int) -> int:
    """``value`` as an int, not below ``least``; raises as :func:`positive`."""
    exact = type(value) is int or isinstance(value, torch.SymInt)
    try:  # index() would fix a dynamic size to what it is
        number = value if exact else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
