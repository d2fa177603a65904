"""Checks by themselves: what they let through, and that what they refuse is told by its name.
What users meet of them is in ``test_errors.py``."""

import re
from itertools import product

import pytest
import torch
from torch import nn

from hyperfast import checks

X, IDS = torch.zeros(3, 2, 4), torch.tensor([0, 2, 1])
ROWS = torch.zeros(3, 4)


@pytest.mark.parametrize("x", [X, X[:, 0], torch.zeros(3, 0, 4)], ids=str)
def test_rows_of_every_task(x):
    checks.check_rows(x, 4, 3, None, "h")


@pytest.mark.parametrize(
    ("x", "ids", "error", "message"),
    [
        (X[:2], None, ValueError, "as h holds 3 tasks, or (R, 4) with task_ids, got (2, 2, 4)"),
        (X[..., :3], None, ValueError, "x must have shape (3, N, 4) or (3, 4)"),
        (X[0, 0], None, ValueError, "got (4,)"),
        (X, IDS, ValueError, "x must have shape (R, 4) when task_ids is given, got (3, 2, 4)"),
        (ROWS, IDS.int(), TypeError, "task_ids must have dtype torch.int64, got torch.int32"),
        (ROWS, IDS[:2], ValueError, "task_ids must have shape (3,), one id a row of x, got (2,)"),
        (ROWS, IDS.to("meta"), ValueError, "task_ids must be on the device of x, cpu, got meta"),
        (ROWS, [0, 2, 1], TypeError, "task_ids must be a Tensor, got list"),
    ],
)
def test_rows_that_do_not_fit(x, ids, error, message):
    with pytest.raises(error) as told:
        checks.check_rows(x, 4, 3, ids, "h")
    assert message in str(told.value)


def test_ids_in_range():
    checks.check_in_range(None, 0)
    checks.check_in_range(IDS[:0], 0)
    checks.check_in_range(IDS, 3)
    for bad in (-1, 3, 2**62):
        with pytest.raises(IndexError, match=rf"task_ids must be in \[0, 3\), got {bad}"):
            checks.check_in_range(torch.tensor([0, bad, 1]), 3)


def test_tensors_in_any_container():
    ones = [torch.ones(2), torch.zeros(3)]
    parameters = [nn.Parameter(t) for t in ones]
    for container in (
        ones,
        tuple(ones),
        dict(enumerate(ones)),
        iter(ones),
        nn.ParameterList(parameters),
        nn.ParameterDict({"a": parameters[0], "b": parameters[1]}),
    ):
        found = checks.check_tensors("weights", container)
        assert all(map(torch.equal, found, ones))
    for bad in ([], {}, "weights", None, 3):
        message = f"weights must be a non-empty sequence of tensors, got {re.escape(repr(bad))}"
        with pytest.raises(ValueError, match=message):
            checks.check_tensors("weights", bad)
    with pytest.raises(ValueError, match=r"sequence of tensors, got one of shape \(2,\)"):
        checks.check_tensors("weights", torch.ones(2))
    with pytest.raises(TypeError, match=r"weights\[1\] must be a Tensor, got int"):
        checks.check_tensors("weights", [ones[0], 1])


KINDS = {
    "plain": torch.ones(2, 3),
    "double": torch.ones(2, 3, dtype=torch.float64),
    "int": torch.ones(2, 3, dtype=torch.int64),
    "meta": torch.ones(2, 3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "jagged": torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged),
    "none": None,
    "list": [1.0],
}


@pytest.mark.parametrize(("first", "second"), list(product(KINDS, repeat=2)))
def test_what_is_plain_passes_every_check(first, second):
    """The quick test is right in both directions, but for devices without autocast."""
    x, bias = KINDS[first], KINDS[second]
    plain = checks.is_plain(x, bias)
    assert plain == (first in ("plain", "double") and second in (first, "none"))
    if plain:
        assert checks.check_operands(x=x, bias=bias) is None
    elif first != "meta" or second not in ("meta", "none"):
        with pytest.raises((TypeError, ValueError), match=r"^(x|bias) must"):
            checks.check_operands(x=x, bias=bias)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "x",
            "jagged",
            r"got a NestedTensor; give its rows, x.values\(\), and the task_ids",
        ),
        ("agent_qs", "jagged", "got a NestedTensor$"),
        ("x", "sparse", "got layout torch.sparse_coo$"),
    ],
)
def test_what_is_not_dense(name, kind, message):
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor, {message}"):
        checks.check_dense(**{name: KINDS[kind]})


def test_autocast_casts_all_but_fp64():
    x, bias = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"bias must have the dtype of x, torch.float32"):
        checks.check_and_cast(x=x, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not checks.is_plain(x)
        cast = checks.check_and_cast(x=x, bias=bias)
        assert [t.dtype for t in cast] == [torch.bfloat16] * 2
        (double,) = checks.check_and_cast(x=x.double())
        assert double.dtype == torch.float64
    assert checks.check_and_cast(x=x, bias=None) == (x, None)


def test_hooks_are_seen():
    layer = nn.Linear(2, 2)
    assert not checks.is_hooked(layer, nn.ReLU())
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        layer.register_full_backward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        assert checks.is_hooked(layer)
        handle.remove()
        assert not checks.is_hooked(layer)
    layer.forward = lambda x: x
    assert checks.is_hooked(nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("rows", "per_task", "tasks", "ids"),
    [
        ([X, X[:, :1]], [ROWS], 3, None),
        ([X], [ROWS[:2]], 3, None),
        ([X[:2]], [ROWS], 3, None),
        ([ROWS], [ROWS], 3, IDS[:2]),
        ([X], [ROWS], 3, IDS),
        ([X[:0]], [], -1, None),
    ],
)
def test_kernels_read_in_bounds(rows, per_task, tasks, ids):
    checks.check_rows_match([X, X], [ROWS], 3, None)
    checks.check_rows_match([ROWS, ROWS], [ROWS], 3, IDS)
    with pytest.raises(ValueError, match="rows, tasks and task_ids must agree"):
        checks.check_rows_match(rows, per_task, tasks, ids)
