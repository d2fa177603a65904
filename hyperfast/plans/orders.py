"""Which two of the three factors of a generated layer are multiplied first.

Of weights, inputs and features of ``R`` rows in ``B`` tasks, ``y[r,o] = sum_ik V[o,i,k] x[r,i]
h[b(r),k]``, what is shared decides:

``rows``          the plans of one layer, row by row or task by task, :mod:`hyperfast.plans.choose`
``destinations``  rows are summed by destination: sums of ``x (x) h`` first, then ``V`` once a
                  destination
``project``       all tasks have the same ``N`` rows: ``V x`` once a row, then the features of tasks
"""

from __future__ import annotations

from hyperfast.plans.sizes import Cost, Sizes

# Bytes of projected rows, which are there at once.
MOST = 64 << 20


def by_rows(s: Sizes) -> int:
    """Multiply-adds of the plans of one layer."""
    return min(s.tasks, s.rows) * s.params * s.features + s.rows * s.params


def destinations(s: Sizes, count: int, itemsize: int) -> Cost | None:
    """The cost of summing first, of rows that are summed into ``count``; ``None`` where it is not
    the least, or the weights are transformed, which is not linear."""
    outer = s.in_features * s.features
    macs = min(count, s.rows) * s.params * s.features + s.rows * outer
    if s.transform or macs >= by_rows(s):
        return None
    moved = s.rows * (s.in_features + s.features) + count * s.out_features + s.params * s.features
    return Cost("destinations", 2 * macs, moved * itemsize, 0, 0.0)


def project(s: Sizes, itemsize: int) -> Cost | None:
    """The cost of projecting first, of rows that all tasks share; ``None`` as above, or where the
    projected rows would take too much memory."""
    shared = s.rows // max(s.tasks, 1)
    outer = s.out_features * s.features
    macs = shared * s.in_features * outer + s.rows * outer
    extra = shared * outer * itemsize
    if s.transform or extra > MOST or macs >= by_rows(s):
        return None
    moved = shared * s.in_features + s.tasks * s.features + s.rows * s.out_features
    return Cost("project", 2 * macs, (moved + s.params * s.features) * itemsize, extra, 0.0)
