"""All steps of a HyperLSTM as one op, and their derivative as another, on the CPU in float32 and
float64.

The rows of ``x (R, I)`` are those of a PackedSequence: one step's after another's, ``sizes`` of
them each. ``start`` is the state ``(h, c, hyper_h, hyper_c)`` of all sequences, and ``weights`` are
the tensors of :class:`hyperfast.nets.hyper_lstm_steps.Weights`.
"""

from __future__ import annotations

from hyperfast.ops.define import count_flops, define_for_cpu

GIVEN = "Tensor x, Tensor? keep, Tensor[] start, Tensor[] weights, int[] sizes"
MATRICES = 0, 1, 2, 4, 6  # among the weights: their gradients are made if they are wanted


def _fake(x, keep, start, weights, sizes, all):
    """``h (R, H)``, the state of every sequence after its last step, and what the derivative needs,
    if ``all``: ``c``, ``hyper_h`` and ``hyper_c`` of all rows, and ``(R, 8H + 4E)`` sums."""
    H, E = start[0].shape[1], start[2].shape[1]
    rows = x.shape[0]
    kept = [x.new_empty(rows if all else 0, width) for width in (H, E, E, 8 * H + 4 * E)]
    return [x.new_empty(rows, H), *(t.new_empty(t.shape) for t in start), *kept]


def _backward_fake(grad_h, grad_ends, x, keep, start, weights, sizes, kept, wanted):
    """Gradients of ``x``, of ``start`` and of ``weights``; ``wanted`` are those of ``x`` and of
    ``weights``, and empty are those of ``x`` and of matrices that are not."""
    of_x, *of_weights = wanted
    shapes = [x.shape if of_x else (0,), *(t.shape for t in start)]
    for n, (t, want) in enumerate(zip(weights, of_weights, strict=True)):
        shapes.append(t.shape if want or n not in MATRICES else (0,))
    return [x.new_empty(shape) for shape in shapes]


hyper_lstm = define_for_cpu("hyper_lstm", f"({GIVEN}, bool all) -> Tensor[]", _fake)
hyper_lstm_backward = define_for_cpu(
    "hyper_lstm_backward",
    f"(Tensor? grad_h, Tensor[] grad_ends, {GIVEN}, Tensor[] kept, bool[] wanted) -> Tensor[]",
    _backward_fake,
)


def _flops(x, keep, start, weights, *rest):
    return x.shape[0] * sum(weights[n].numel() for n in MATRICES)


def _backward_flops(grad_h, grad_ends, x, keep, start, weights, sizes, kept, wanted):
    """As autograd does it: each matrix once for what it multiplied, once for itself."""
    of_x, *of_weights = wanted
    sizes_of = [weights[n].numel() for n in MATRICES]
    back = sum(sizes_of) - (0 if of_x else sizes_of[0])
    return x.shape[0] * (back + sum(weights[n].numel() for n in MATRICES if of_weights[n]))


count_flops(hyper_lstm, _flops)
count_flops(hyper_lstm_backward, _backward_flops)
