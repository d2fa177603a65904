"""Value and every gradient of every op, in every variant, against the specification in fp64."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfast.kernels import eager, reference
from hyperfast.layout import TRANSFORMS
from hyperfast.ops import hyper_linear
from hyperfast.plans.sizes import PLANS
from tests.support.cases import (
    Sizes,
    Variant,
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


MASKS = list(product((False, True), repeat=3))


def backward_args(sizes, ragged, transform, vector=True, bias=True, dtype=torch.float64):
    made = Variant("hyper_linear", ragged, bias, vector, "", transform)
    x, h, matrix, matrix_bias, of_vector, _, ids, *_ = made.random(sizes, dtype=dtype)
    grad = draw(*x.shape[:-1], len(matrix), dtype=dtype)
    return grad, x, h, matrix, matrix_bias, of_vector, ids, transform


@pytest.mark.parametrize("transform", ["", *TRANSFORMS])
@pytest.mark.parametrize("plan", ["", *PLANS])
@pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])
@every_size
def test_backward_is_all_gradients(sizes, ragged, plan, transform):
    """By either backend, whatever is wanted: what PyTorch makes of the specification."""
    for vector, bias in product((False, True), repeat=2):
        args = backward_args(sizes, ragged, transform, vector, bias)
        grad, x, h, matrix, matrix_bias, of_vector, ids, _ = args
        leaves = [t if t is None else t.detach().requires_grad_() for t in (h, matrix, matrix_bias)]
        of_vector = None if of_vector is None else of_vector.detach().requires_grad_()
        offset = draw(len(matrix), grad=True)
        y = reference.hyper_linear(x, *leaves, of_vector, offset, ids, transform)
        wanted = [t for t in (*leaves[:2], of_vector) if t is not None]
        gh, *rows = torch.autograd.grad(y, wanted, grad)
        found = torch.ops.hyperfast.hyper_linear_backward(*args, [True] * 3, plan)
        close(found[0], gh)
        close(found[1], torch.cat([g.flatten(0, -2) for g in rows]))
        if bias:
            shared = torch.autograd.grad(
                reference.hyper_linear(x, *leaves, of_vector, offset, ids, transform),
                [leaves[2], offset],
                grad,
            )
            close(found[2], torch.cat([g.flatten() for g in shared[: 1 + vector]]))
        close(eager.hyper_linear_backward(*args, [True] * 3, plan), found)
        for mask in MASKS:
            some = torch.ops.hyperfast.hyper_linear_backward(*args, mask, plan)
            for part, whole, want in zip(some, found, mask, strict=True):
                close(part, whole if want else x.new_empty(0))


def test_abs_has_slope_0_at_0():
    x, h, matrix = draw(2, 3, 4), torch.zeros(2, 5, dtype=torch.float64), draw(6, 4, 5)
    grad = draw(2, 3, 6)
    for plan in PLANS:
        found = torch.ops.hyperfast.hyper_linear_backward(
            grad, x, h, matrix, None, None, None, "abs", [True] * 3, plan
        )
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("transform", ["", *TRANSFORMS])
def test_one_op_makes_first_gradients(transform):
    """Once, where the gradient is not differentiated."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    args = Variant("hyper_linear", False, transform=transform).random(SMALL, grad=True)
    y = torch.ops.hyperfast.hyper_linear(*args)
    with Names():
        torch.autograd.grad(y.sum(), floats(args))
    ours = [n.split(".")[1] for n in names if n.startswith("hyperfast")]
    assert sorted(ours) == ["hyper_linear", "hyper_linear_backward"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_under_every_other_transformation(transform, dynamo):
    args = Variant("hyper_linear", False, transform=transform).random(SMALL)
    x, h, *made = args[:6]
    call = lambda x, h: hyper_linear(x, h, *made, None, transform, "")  # noqa: E731
    plain = lambda x, h: reference.hyper_linear(x, h, *made, None, transform)  # noqa: E731
    loss = lambda f: lambda h: f(x, h).sin().sum()  # noqa: E731
    close(torch.func.jvp(call, (x, h), (x, h)), torch.func.jvp(plain, (x, h), (x, h)))
    close(torch.func.grad(loss(call))(h), torch.func.grad(loss(plain))(h))
    close(torch.func.hessian(loss(call))(h), torch.func.hessian(loss(plain))(h))
    many = torch.stack([h, 2 * h])
    close(torch.vmap(call, (None, 0))(x, many), torch.vmap(plain, (None, 0))(x, many))
    close(
        torch.vmap(torch.func.grad(loss(call)))(many),
        torch.vmap(torch.func.grad(loss(plain)))(many),
    )
    leaf = h.clone().requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(x, leaf).sin().sum(), leaf)[0],
        torch.func.grad(loss(plain))(h),
    )


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
