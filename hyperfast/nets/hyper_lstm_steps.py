"""What a step of a HyperLSTM means: the equations of Ha, Dai, Le 2016, appendix A.2.2, those of all
gates and kinds at once. Gates lead, in the order i, f, g, o: ``(4, b, n)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the layer normalisations, nn.LayerNorm's


class Norm(NamedTuple):
    """Gains and shifts of the layer normalisations of an LSTM with n units: ``scale`` and ``shift
    (4, 1, n)`` are those of the gates, ``c_scale`` and ``c_shift (n,)`` those of its cell."""

    scale: Tensor
    shift: Tensor
    c_scale: Tensor
    c_shift: Tensor


class Weights(NamedTuple):
    """``ih (4H + 4E, I)`` and ``hh (4H + 4E, H)`` are of the main LSTM, then of the hyper LSTM;
    embeddings and what they scale are ordered by kind, h, x, b, then by gate."""

    ih: Tensor
    hh: Tensor
    hyper_hh: Tensor  # (4E, E)
    hyper_bias: Tensor  # (4E,)
    z: Tensor  # (12 n_z, E)
    z_bias: Tensor  # (12 n_z,)
    d: Tensor  # (12, H, n_z)
    bias: Tensor  # (4, 1, H)
    norm: Norm | None
    hyper_norm: Norm | None

    def tensors(self) -> tuple[Tensor, ...]:
        return *self[:8], *(self.norm or ()), *(self.hyper_norm or ())

    @staticmethod
    def of(tensors: Sequence[Any]) -> Weights:
        """The inverse of :meth:`tensors`."""
        first, norms = tensors[:8], tensors[8:]
        return Weights(*first, *((Norm(*norms[:4]), Norm(*norms[4:])) if norms else (None, None)))


class State(NamedTuple):
    """Of the main LSTM ``h, c (b, H)``, and of the hyper LSTM ``(b, E)``."""

    h: Tensor
    c: Tensor
    hyper_h: Tensor
    hyper_c: Tensor

    def first(self, rows: int) -> State:
        return State(*(t[:rows] for t in self))


class Cell(NamedTuple):
    """What :func:`update` saw and made; the derivative needs it."""

    i_f: Tensor  # (2, b, n)
    g: Tensor
    o: Tensor
    before: Tensor  # c of the step before
    c: Tensor
    shown: Tensor  # h is o times this
    # Of the normalisations: what enters that of the gates, its moments, what leaves it; that of c.
    y: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    unit: Tensor | None = None
    c_mean: Tensor | None = None
    c_rstd: Tensor | None = None


class Step(NamedTuple):
    """What :func:`step` made; the derivative needs it."""

    p: Tensor  # (b, 4H), h times its weights, not yet scaled
    z: Tensor  # (12, b, n_z)
    hyper_h: Tensor
    main: Cell
    hyper: Cell

    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self[:3], *self.main, *self.hyper

    @staticmethod
    def of(tensors: Sequence[Any]) -> Step:
        """The inverse of :meth:`tensors`."""
        n = len(Cell._fields)
        p, z, hyper_h, *cells = tensors
        return Step(p, z, hyper_h, Cell(*cells[:n]), Cell(*cells[n:]))


def by_gate(t: Tensor) -> Tensor:
    """``(b, 4n)`` as ``(4, b, n)``, a view."""
    return t.unflatten(1, (4, -1)).transpose(0, 1)


def update(
    y: Tensor, c: Tensor, norm: Norm | None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Cell]:
    """An LSTM's h and c by ``y (4, b, n)`` before normalisation: equations 10 and 13. ``keep (b,
    n)`` is what dropout multiplies the candidate with."""
    of_gates: tuple[Tensor, ...] = ()
    of_c: tuple[Tensor, ...] = ()
    if norm is not None:
        unit, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)
        of_gates = y, mean, rstd, unit
        y = torch.addcmul(norm.shift, unit, norm.scale)
    i_f, g, o = y.split([2, 1, 1])
    i_f, g, o = i_f.sigmoid(), g[0].tanh(), o[0].sigmoid()
    i, f = i_f.unbind()
    new = torch.addcmul(f * c, i, g if keep is None else g * keep)
    shown = new
    if norm is not None:
        scale, shift = norm.c_scale, norm.c_shift
        shown, *moments = torch.native_layer_norm(new, new.shape[-1:], scale, shift, EPS)
        of_c = (*moments,)
    shown = shown.tanh()
    return o * shown, new, Cell(i_f, g, o, c, new, shown, *of_gates, *of_c)


def of_input(x: Tensor, w: Weights) -> Tensor:
    """``x (R, I)`` of all steps, times its weights, and in the last 4E plus the hyper LSTM's
    bias."""
    return F.linear(x, w.ih, F.pad(w.hyper_bias, (w.bias.numel(), 0)))


def step(x: Tensor, keep: Tensor | None, state: State, w: Weights) -> tuple[State, Step]:
    """One step of ``b`` sequences.

    Args:
        x: ``(b, 4H + 4E)``, as :func:`of_input` makes it.
        keep: ``(b, H)``, of recurrent dropout.
    """
    sizes = [4 * state.h.shape[1], 4 * state.hyper_h.shape[1]]
    (x_main, x_hyper), (p, p_hyper) = x.split(sizes, 1), (state.h @ w.hh.mT).split(sizes, 1)
    y = torch.addmm(x_hyper, state.hyper_h, w.hyper_hh.mT) + p_hyper
    hyper_h, hyper_c, hyper = update(by_gate(y), state.hyper_c, w.hyper_norm)
    z = torch.addmm(w.z_bias, hyper_h, w.z.mT).unflatten(1, (12, -1)).transpose(0, 1)
    d = torch.bmm(z, w.d.mT)
    d_h, d_x, d_b = d.split(4)
    y = torch.addcmul(w.bias, d_h, by_gate(p))
    y = torch.addcmul(y, d_x, by_gate(x_main)).add_(d_b)
    h, c, main = update(y, state.c, w.norm, keep)
    return State(h, c, hyper_h, hyper_c), Step(p, z, hyper_h, main, hyper)
