"""Value and every gradient of every op, in every variant, against the specification in fp64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfast.kernels import eager, reference
from hyperfast.plans.sizes import PLANS
from tests.support.cases import (
    Sizes,
    close,
    every_size,
    every_variant,
    floats,
    unplanned,
    value_and_gradients,
)
from tests.support.draw import draw

SMALL = Sizes(3, 2, 2, 3, 2)


@every_size
@every_variant
def test_value_and_gradients(variant, sizes):
    args, expected = value_and_gradients(variant, sizes)
    with torch.no_grad():
        close(variant.eager(*args), expected)


@every_variant
def test_many_small_blocks(variant, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK", 40)
    args = variant.random(Sizes(7, 5, 3, 4, 6))
    close(variant.eager(*args), variant.expected(*args))


@every_variant
def test_gradcheck(variant):
    args = variant.random(SMALL, grad=True)
    assert gradcheck(variant.op, args)


@every_variant
def test_gradgradcheck(variant):
    args = variant.random(SMALL, grad=True)
    assert gradgradcheck(variant.op, args, fast_mode=True)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@unplanned
def test_opcheck(variant, grad, dynamo):
    torch.library.opcheck(variant.op, variant.random(SMALL, grad=grad))


@every_variant
def test_third_derivative(variant):
    args = variant.random(SMALL, grad=True)

    def third(f):
        y = f(*args).sin().sum()
        for _ in range(3):
            y = sum(g.sin().sum() for g in torch.autograd.grad(y, floats(args), create_graph=True))
        return y

    close(third(variant.op), third(variant.expected))


def test_few_mixed_rows_do_not_visit_all_tasks(monkeypatch):
    """In plain PyTorch, by every plan: nothing that is made has as many rows as there are tasks."""
    tasks, sizes = 5000, []
    x, h, ids = draw(3, 4), draw(tasks, 6), torch.tensor([17, 4999, 17])
    matrix, vector = draw(5, 4, 6), draw(5, 6)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (y if isinstance(y, tuple) else (y,)))
            return y

    for plan in PLANS:
        sizes.clear()
        with Largest():
            y = eager.hyper_linear(x, h, matrix, None, vector, None, ids, "", plan)
        assert max(sizes) < tasks
        close(y, reference.hyper_linear(x, h, matrix, None, vector, None, ids))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sizes", [(0, 5, 16, 0, 8), (3, 5, 4, 6, 0), (3, 5, 0, 6, 2)], ids=str)
def test_empty_sizes_by_every_plan(sizes, plan):
    rows, tasks, ins, outs, features = sizes
    x, h, ids = draw(rows, ins), draw(tasks, features), torch.zeros(rows, dtype=torch.int64)
    matrix, vector, grad = draw(outs, ins, features), draw(outs, features), draw(rows, outs)
    for call, plain in (
        (eager.hyper_linear, reference.hyper_linear),
        (torch.ops.hyperfast.hyper_linear, reference.hyper_linear),
    ):
        args = (x, h, matrix, None, vector, None, ids, "")
        close(call(*args, plan), plain(*args))
    close(
        eager.hyper_linear_grad_h(grad, x, matrix, vector, ids, tasks, plan),
        reference.hyper_linear_grad_h(grad, x, matrix, vector, ids, tasks),
    )
    close(
        eager.hyper_linear_grad_weight(grad, x, h, ids, True, plan),
        reference.hyper_linear_grad_weight(grad, x, h, ids, True),
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_what_an_op_returns_can_be_changed_in_place(ragged):
    ids = torch.tensor([1, 0]) if ragged else None
    x, w = draw(*([2, 3] if ragged else [2, 1, 3])), draw(2, 4, 3, grad=True)
    y = torch.ops.hyperfast.task_linear(x, w, None, ids)
    y.relu_().sum().backward()
    assert w.grad is not None
