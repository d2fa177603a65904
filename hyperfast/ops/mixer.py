"""QMIX's mixer as one op, and its derivative as another, on the CPU in float32 and float64.

``q (R, agents)`` are the values and ``s (R, state)`` the states of all rows. ``weights`` are weight
and bias of seven layers: the two that make W1, the two that make W2, the two of V, and the one that
makes b1.
"""

from __future__ import annotations

from hyperfast.ops.define import count_flops, define_for_cpu

GIVEN = "Tensor q, Tensor s, Tensor[] weights"


def _fake(q, s, weights, keep):
    """``y (R, 1)``, and what the derivative needs, if it is to be kept: of each row what the hidden
    layers make and what enters the elu, in pieces of multiples of 16 columns."""
    hyper, embed = (-(-weights[n].shape[0] // 16) * 16 for n in (0, 12))
    rows = q.shape[0]
    return [q.new_empty(rows, 1), q.new_empty(rows if keep else 0, 2 * (hyper + embed))]


def _backward_fake(grad, q, s, weights, kept, output_mask):
    """Gradients of ``q``, of ``s``, and of ``weights``, all or none."""
    of_q, of_s, of_weights = output_mask
    made = (t.new_empty(t.shape if wanted else (0,)) for t, wanted in ((q, of_q), (s, of_s)))
    return [*made, *(w.new_empty(w.shape) for w in weights if of_weights)]


mixer = define_for_cpu("mixer", f"({GIVEN}, bool keep) -> Tensor[]", _fake)
mixer_backward = define_for_cpu(
    "mixer_backward",
    f"(Tensor grad, {GIVEN}, Tensor kept, bool[3] output_mask) -> Tensor[]",
    _backward_fake,
)


def _flops(q, s, weights, keep):
    return len(q) * (sum(w.numel() for w in weights[::2]) + weights[2].shape[0])


def _backward_flops(grad, q, s, weights, kept, output_mask):
    """As autograd does it: each matrix for what it multiplied, and for itself."""
    of_q, of_s, of_weights = output_mask
    reading = sum(weights[n].numel() for n in (0, 4, 8, 12))
    heads, mixing = sum(weights[n].numel() for n in (2, 6, 10)), weights[2].shape[0]
    hidden = (mixing + heads) * (of_s or of_weights)
    return len(q) * (of_q * mixing + hidden + of_s * reading + of_weights * (heads + reading))


count_flops(mixer, _flops)
count_flops(mixer_backward, _backward_flops)
