"""A generator that makes all parameters chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperfast.layout import ParamSpec
from hyperfast.nn.chunks import Blocks, Pieces
from hyperfast.nn.generator import is_linear
from hyperfast.nn.init import HeadRows


class Spread(NamedTuple):
    """The start of one parameter: its scale ``()`` and what is added to it, ``(numel,)``, ``(1,)``
    for all entries, or ``(0,)`` for nothing. What chunks hold has variance 1."""

    scale: Tensor
    offset: Tensor

    def fill(self, mean: float | Tensor, deviation: float) -> None:
        """It starts with this mean and deviation."""
        self.scale.fill_(deviation)
        if isinstance(mean, Tensor):
            self.offset.copy_(mean[: len(self.offset)])
        else:
            self.offset.fill_(mean)

    def zero(self) -> None:
        """It starts at zeros, exactly."""
        self.scale.zero_()


class Inside(NamedTuple):
    """What a :class:`Chunked` computes with: attributes of its own, or others in their place."""

    embeddings: Tensor
    scale: Tensor
    offset: Tensor | None
    trunk: Callable[[Tensor], Tensor]
    heads: Sequence[Callable[[Tensor], Tensor]]


class Chunked(nn.Module):
    """One small generator of all parameters: its trunk takes the latent and the embedding of a
    chunk, one behind the other, and a head makes the chunk.

    Every parameter has a scale of its own, by which layers of different fans start with the spread
    of each; and what starts at values of a net adds them.

    Args:
        trunk: modules ``(R, z_dim + chunk_dim) -> (R, features)``.
        layout: how parameters are cut.
        features: that enter the heads.
        chunk_dim: size of the embedding of a chunk.
        spec: the layout of what is generated.
        values: at which each parameter starts; ``None`` for a random one.

    Attributes:
        embeddings: ``(chunks, chunk_dim)``, those of one head behind those of another.
        heads: one for every kind of chunk.
        scale: ``(parameters,)``.
        offset: what is added, one behind another: all numbers of parameters of rank one, one of
            those that are constant, none of random ones; or ``None``.
    """

    def __init__(
        self,
        trunk: Sequence[nn.Module],
        layout: Pieces | Blocks,
        features: int,
        chunk_dim: int,
        spec: ParamSpec,
        values: Sequence[Tensor | None],
        **kind: Any,
    ):
        super().__init__()
        self.layout, self.numels = layout, spec.numels
        self.offsets = [0 if v is None else v.numel() if v.ndim < 2 else 1 for v in values]
        self.embeddings = nn.Parameter(torch.zeros(sum(layout.counts), chunk_dim, **kind))
        self.trunk = nn.Sequential(*trunk)
        self.heads = nn.ModuleList(layout.heads(features, **kind))
        self.scale = nn.Parameter(torch.zeros(len(self.numels), **kind))
        total = sum(self.offsets)
        self.offset = nn.Parameter(torch.zeros(total, **kind)) if total else None

    def forward(self, z: Tensor) -> Tensor:
        """The flat vectors ``(B, P)`` of latents ``(B, z_dim)``."""
        own = Inside(self.embeddings, self.scale, self.offset, self.trunk, [*self.heads])
        return self.flat(z, own)

    def flat(self, z: Tensor, own: Inside) -> Tensor:
        """What :meth:`forward` returns, of ``own``."""
        parts = self._features(z, own.embeddings, own).split(self.layout.counts, 1)
        flat = self.layout.join([head(h) for head, h in zip(own.heads, parts, strict=True)])
        scales = zip(own.scale.split(1), self.numels, strict=True)
        scale = torch.cat([scale.expand(n) for scale, n in scales])
        if own.offset is None:
            return flat * scale
        offsets = zip(own.offset.split(self.offsets), self.numels, strict=True)
        offset = torch.cat([o.expand(n) if len(o) else o.new_zeros(n) for o, n in offsets])
        return torch.addcmul(offset, flat, scale)

    def part(self, z: Tensor, n: int, first: int, last: int, own: Inside) -> Tensor:
        """Outputs ``first`` to ``last`` of parameter ``n``, which is of rank one or two: ``(B,
        outputs, ins)``."""
        head, chunks, join = self.layout.part(n, first, last)
        embeddings = own.embeddings.split(self.layout.counts)[head][chunks]
        made = join(own.heads[head](self._features(z, embeddings, own)))
        scale = own.scale.split(1)[n]
        if not self.offsets[n]:
            return made * scale
        assert own.offset is not None
        offset = own.offset.split(self.offsets)[n].unsqueeze(1)
        return torch.addcmul(offset if len(offset) == 1 else offset[first:last], made, scale)

    def _features(self, z: Tensor, embeddings: Tensor, own: Inside) -> Tensor:
        """``(B, chunks, K)``, the features of chunks with these embeddings."""
        tasks, count = z.shape[0], embeddings.shape[0]  # an export fixes what len() returns
        pairs = [z.unsqueeze(1).expand(-1, count, -1), embeddings.expand(tasks, -1, -1)]
        return own.trunk(torch.cat(pairs, -1).flatten(0, 1)).unflatten(0, (tasks, count))

    def chain(self) -> list[nn.Module]:
        """The trunk and the first layer behind it."""
        return [*self.trunk, self.heads[0][0]]  # type: ignore[index]

    @property
    def flops(self) -> int:
        """Of the linear layers, for one latent."""
        trunk = [m for m in self.trunk.modules() if isinstance(m, nn.Linear)]
        total = len(self.embeddings) * sum(2 * m.in_features * m.out_features for m in trunk)
        for head, count in zip(self.heads, self.layout.counts, strict=True):
            first, *others = (m for m in head.modules() if isinstance(m, nn.Linear))
            # The second of two runs once for every piece of what the first returns.
            per_output = first.in_features + sum(m.out_features for m in others)
            total += 2 * count * first.out_features * per_output
        return total

    def numbers(self, z_dim: int) -> tuple[int, ...]:
        """Of every head, how many numbers one of its chunks takes while it is made in training:
        latent and embedding, what layers return, activated or not, and the chunk three times, as it
        is made, joined and scaled."""
        entering = z_dim + self.embeddings.shape[1]
        trunk = [m for m in self.trunk.modules() if isinstance(m, nn.Linear)]
        found = []
        for head in self.heads:
            total = entering + sum(2 * m.out_features for m in trunk)
            first, *others = (m for m in head.modules() if isinstance(m, nn.Linear))
            chunk = first.out_features
            for second in others:  # runs once for every piece of what the first returns
                total += chunk
                chunk = chunk // second.in_features * second.out_features
            found.append(total + 3 * chunk)
        return tuple(found)

    def start(self, moment: float) -> list[Spread]:
        """Initialises embeddings and heads, which take features of this second moment; returns the
        start of every parameter, which is the caller's."""
        nn.init.normal_(self.embeddings)
        for head in self.heads:
            entering = moment
            for layer in head:  # type: ignore[attr-defined]
                if isinstance(layer, nn.Linear):
                    if not is_linear(layer):
                        raise TypeError(
                            "hyper.generator.heads must have weights of their own to be "
                            f"initialised, got {layer}"
                        )
                    HeadRows(layer.weight, layer.bias, entering).fill(0.0, 1.0)
                    entering = 1.0
        offset = self.scale.data[:0] if self.offset is None else self.offset.data
        return [*map(Spread, self.scale.data, offset.split(self.offsets))]

    def extra_repr(self) -> str:
        return f"chunks={len(self.embeddings)}"
