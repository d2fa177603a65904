"""All steps of a HyperLSTM as one op, and their derivative as another, on the CPU in float32 and
float64.

R rows are those of a PackedSequence: one step's after another's, ``sizes`` of them each. ``start``
is the state ``(h, c, hyper_h, hyper_c)`` of all N sequences, and ``weights`` are the tensors of
:class:`hyperfast.nets.hyper_lstm_steps.Weights`.
"""

from __future__ import annotations

from hyperfast.ops.define import count_flops, define_for_cpu

GIVEN = "Tensor x, Tensor? keep, Tensor[] start, Tensor[] weights, int[] sizes"


def _fake(x, keep, start, weights, sizes, all):
    """``h (R, H)``, the state of every sequence after its last step, and what the derivative needs:
    ``c``, ``hyper_h``, ``hyper_c`` of all rows and ``(R, 4H + 4E)``, if ``all``."""
    H, E = start[0].shape[1], start[2].shape[1]
    kept = len(x) if all else 0
    rows = [x.new_empty(kept, width) for width in (H, E, E, 4 * (H + E))]
    return [x.new_empty(len(x), H), *(t.new_empty(t.shape) for t in start), *rows]


def _backward_fake(grad_h, grad_ends, x, keep, start, weights, sizes, kept, want_d):
    """Gradients of x; of h times its weights ``(R, 4H + 4E)`` and of the embeddings ``(R, 12
    n_z)``, of which those of ``weights[:4]`` are products; of start; of ``weights[4:]``, the first
    of them empty unless wanted."""
    d, *rest = weights[4:]
    shapes = [x.shape, x.shape, (len(x), len(weights[2])), *(t.shape for t in start)]
    shapes += [d.shape if want_d else (0,), *(t.shape for t in rest)]
    return [x.new_empty(shape) for shape in shapes]


hyper_lstm = define_for_cpu("hyper_lstm", f"({GIVEN}, bool all) -> Tensor[]", _fake)
hyper_lstm_backward = define_for_cpu(
    "hyper_lstm_backward",
    f"(Tensor? grad_h, Tensor[] grad_ends, {GIVEN}, Tensor[] kept, bool want_d) -> Tensor[]",
    _backward_fake,
)


def _flops(x, keep, start, weights, *rest):
    hh, hyper_hh, z, _, d, *_ = weights
    return len(x) * (hh.numel() + hyper_hh.numel() + z.numel() + d.numel())


def _backward_flops(grad_h, grad_ends, x, keep, start, weights, sizes, kept, want_d):
    """The embeddings, and what they scale, are made again; the gradients of the states' matrices
    and of the embeddings' are products of what is returned, and not counted here."""
    z, d = weights[2], weights[4]
    again = z.numel() + d.numel()
    return _flops(x, keep, start, weights) + len(x) * (again + (d.numel() if want_d else 0))


count_flops(hyper_lstm, _flops)
count_flops(hyper_lstm_backward, _backward_flops)
