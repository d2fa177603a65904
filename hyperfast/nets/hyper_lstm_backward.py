"""The derivative of a HyperLSTM's steps, by hand: the gradient of a large matrix is one product
over all steps, where autograd would make and add up one a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.nets.hyper_lstm_steps import Cell, Norm, State, Step, Weights, by_gate

aten = torch.ops.aten


def backward(
    x: Tensor,
    keep: Tensor | None,
    start: State,
    sizes: Sequence[int],
    w: Weights,
    h: Tensor,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x``, ``keep`` (which has none), ``start`` and ``w``, by those of ``h`` and of
    the last states, which :func:`unroll` returned. Those of ``x`` and of large matrices are
    ``None`` unless ``wanted``. ``kept`` are the input times its weights, and the tensors of all
    steps."""
    H, at = start.h.shape[1], len(x)
    of_x, *kept = kept
    grad_h, *of_ends = grads
    # What comes from later steps, of all sequences.
    carried = State(
        *(
            torch.zeros_like(t) if g is None else g.clone()
            for t, g in zip(start, of_ends, strict=True)
        )
    )
    each = len(kept) // len(sizes)
    steps = [Step.of(kept[first : first + each]) for first in range(0, len(kept), each)]
    sums = Weights.of([None] * 6 + [torch.zeros_like(t) for t in w.tensors()[6:]])
    dx, dp, dz = torch.empty_like(of_x), torch.empty_like(of_x), x.new_empty(len(x), len(w.z))
    for b, made in zip(reversed(sizes), reversed(steps), strict=True):
        at -= b
        rows = slice(at, at + b)
        later = carried.first(b)
        if grad_h is not None:
            later.h.add_(grad_h[rows])
        mask = None if keep is None else keep[rows]
        dy = _update(made.main, later.h, later.c, w.norm, mask, sums.norm)
        sums.bias.add_(dy.sum(1, keepdim=True))
        d_h, d_x = torch.bmm(made.z[:8], w.d[:8].mT).split(4)
        dd = dy.new_empty(12, b, H)
        torch.mul(dy, by_gate(made.p), out=dd[:4])
        torch.mul(dy, by_gate(of_x[rows, : 4 * H]), out=dd[4:8])
        dd[8:] = dy
        torch.mul(dy, d_h, out=by_gate(dp[rows, : 4 * H]))
        torch.mul(dy, d_x, out=by_gate(dx[rows, : 4 * H]))
        sums.d.baddbmm_(dd.mT, made.z)
        dz[rows].unflatten(1, (12, -1)).transpose(0, 1).copy_(torch.bmm(dd, w.d))
        later.hyper_h.addmm_(dz[rows], w.z)
        dy = _update(made.hyper, later.hyper_h, later.hyper_c, w.hyper_norm, None, sums.hyper_norm)
        for t in (dx, dp):
            by_gate(t[rows, 4 * H :]).copy_(dy)
        torch.mm(dp[rows], w.hh, out=later.h)
        torch.mm(dp[rows, 4 * H :], w.hyper_hh, out=later.hyper_h)
    hyper_h = torch.cat([made.hyper_h for made in steps])
    of_hyper = dx[:, 4 * H :]
    products = (
        lambda: dx @ w.ih,
        lambda: dx.mT @ x,
        lambda: dp.mT @ _before(start.h, h, sizes),
        lambda: of_hyper.mT @ _before(start.hyper_h, hyper_h, sizes),
        lambda: of_hyper.sum(0),
        lambda: dz.mT @ hyper_h,
        lambda: dz.sum(0),
    )
    which = wanted[0], *wanted[6:12]
    by_x, *made_all = (f() if want else None for f, want in zip(products, which, strict=True))
    return by_x, None, *carried, *made_all, *sums.tensors()[6:]


def _before(start: Tensor, states: Tensor, sizes: Sequence[int]) -> Tensor:
    """``(R, .)``: of every row, the state of the step before."""
    steps = zip(states.split(sizes), sizes[1:], strict=False)
    return torch.cat([start, *(t[:b] for t, b in steps)])


def _update(
    made: Cell, dh: Tensor, dc: Tensor, norm: Norm | None, keep: Tensor | None, sums: Norm | None
) -> Tensor:
    """The gradient ``(4, b, n)`` of what :func:`update` was given; that of the cell before replaces
    ``dc``, and those of ``norm`` are added to ``sums``."""
    i, f = made.i_f
    shown = aten.tanh_backward(dh * made.o, made.shown)
    if norm is not None and sums is not None:
        by = made.c, made.c.shape[-1:], made.c_mean, made.c_rstd, norm.c_scale, norm.c_shift
        shown, scale, shift = aten.native_layer_norm_backward(shown, *by, [True, True, True])
        sums.c_scale.add_(scale)
        sums.c_shift.add_(shift)
    dc += shown
    dy = dh.new_empty(4, *dh.shape)
    torch.mul(dc, made.g if keep is None else made.g * keep, out=dy[0])
    torch.mul(dc, made.before, out=dy[1])
    torch.mul(dc, i if keep is None else i * keep, out=dy[2])
    torch.mul(dh, made.shown, out=dy[3])
    dc *= f
    aten.sigmoid_backward.grad_input(dy[:2], made.i_f, grad_input=dy[:2])
    aten.tanh_backward.grad_input(dy[2], made.g, grad_input=dy[2])
    aten.sigmoid_backward.grad_input(dy[3], made.o, grad_input=dy[3])
    if norm is None or sums is None or made.unit is None:
        return dy
    sums.shift.add_(dy.sum(1, keepdim=True))
    sums.scale.add_((dy * made.unit).sum(1, keepdim=True))
    dy *= norm.scale
    moments = dy.shape[-1:], made.mean, made.rstd
    wanted = [True, False, False]
    return aten.native_layer_norm_backward(dy, made.y, *moments, None, None, wanted)[0]
