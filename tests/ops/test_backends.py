"""The choice of backend."""

import re
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import hyperfast
from hyperfast import functional, use_backend
from hyperfast.ops import backends as backend
from hyperfast.plans import cpu
from tests.support.budget import close
from tests.support.draw import draw

AVAILABLE = [b for b in backend.BACKENDS if not backend.why_missing(b)]


rand = partial(draw, grad=True)


CALLS = {
    "task_linear": lambda ids: (
        (rand(6, 4) if ids is not None else rand(3, 2, 4), rand(3, 5, 4), rand(3, 5)),
        functional.task_linear,
    ),
    "hyper_linear": lambda ids: (
        (rand(6, 4) if ids is not None else rand(3, 2, 4), rand(3, 7), rand(25, 7), rand(25)),
        functional.hyper_linear,
    ),
}
IDS = torch.tensor([2, 0, 0, 1, 2, 2])


@pytest.mark.parametrize("ids", [None, IDS], ids=["batched", "ragged"])
@pytest.mark.parametrize("name", CALLS)
def test_reference_equals_default(name, ids):
    args, call = CALLS[name](ids)
    y = call(*args, ids)
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad(y, args, weight)
    with use_backend("reference"):
        z = call(*args, ids)
    close(z, y)
    close(torch.autograd.grad(z, args, weight), gradients)
    ours = re.compile("hyperfast|HyperMlp")
    assert not any(map(ours.search, graph(z)))
    assert any(map(ours.search, graph(y)))


def graph(y):
    """Names of the nodes of the autograd graph."""
    names, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [n for n, _ in node.next_functions if n is not None]
    return names


def test_the_reference_honours_target_bias_and_plan():
    x, h, weight = rand(3, 2, 4), rand(3, 7), rand(20, 7)
    y = functional.hyper_linear(x, h, weight, None, target_bias=False, plan="tile")
    with use_backend("reference"):
        close(functional.hyper_linear(x, h, weight, None, target_bias=False, plan="tile"), y)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", [None, "reference"])
def test_task_ids_out_of_range(name, which, bad):
    ids = IDS.clone()
    ids[4] = bad
    args, call = CALLS[name](ids)
    with (
        pytest.raises(IndexError, match=rf"task_ids must be in \[0, 3\), got {bad}"),
        use_backend(which) if which else nullcontext(),
    ):
        call(*args, ids)


@pytest.mark.parametrize("name", ["", "cuda", "Reference", None])
def test_unknown(name):
    with (
        pytest.raises(ValueError, match=r"backend must be one of .*'reference'"),
        use_backend(name),
    ):
        pass


@pytest.mark.parametrize("name", [b for b in backend.BACKENDS if b not in AVAILABLE])
def test_missing_says_why(name):
    reason = {
        "cpp": "the C\\+\\+ extension is not loaded: .+",
        "triton": "torch sees no CUDA device.+|the package triton is not installed",
    }[name]
    with (
        pytest.raises(RuntimeError, match=f"backend '{name}' is not there: ({reason})"),
        use_backend(name),
    ):
        pass
    assert backend.forced is None


def test_a_failed_extension_is_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "has_kernel", lambda *_: False)
    monkeypatch.setattr(backend, "EXTENSION_ERROR", "undefined symbol: gone")
    with (
        pytest.raises(RuntimeError, match=r"the C\+\+ extension is not loaded: undefined symbol"),
        use_backend("cpp"),
    ):
        pass


def test_an_extension_that_was_not_built_says_how(monkeypatch):
    monkeypatch.delenv("HYPERFAST_NO_EXT", raising=False)
    monkeypatch.setitem(sys.modules, "hyperfast._C", None)  # importing it raises
    extension, reason = cpu._load()
    assert extension is None
    assert reason.startswith("it was not built, which `pip install .` does")


def test_a_backend_without_the_kernel(monkeypatch):
    """Insisting never falls back in silence."""
    monkeypatch.setattr(backend, "has_kernel", lambda name, op: op == "task_linear")
    args, call = CALLS["hyper_linear"](None)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' has no kernel of hyper_mlp"):
        call(*args)


def test_a_backend_for_another_device(monkeypatch):
    monkeypatch.setattr(backend, "why_missing", lambda _: "")
    args, call = CALLS["task_linear"](None)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"no kernel .* for cpu tensors"):
        call(*args)


@pytest.mark.parametrize("name", AVAILABLE)
def test_nested_contexts_restore(name):
    assert backend.forced is None
    with use_backend("reference"):
        with use_backend(name):
            assert backend.forced == name
        assert backend.forced == "reference"
        with pytest.raises(ValueError, match="backend"), use_backend("none such"):
            pass
        assert backend.forced == "reference"
    assert backend.forced is None


def test_an_exception_restores():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend.forced is None


def test_the_model_obeys():
    model = hyperfast.HyperMLP(hyperfast.HyperNet(5, 4, 8, 3))
    with use_backend("reference"):
        y = model(torch.randn(2, 7, 4), torch.randn(2, 5))
    assert not any("hyperfast" in n for n in graph(y))


def test_the_reference_serves_banks_too():
    bank = hyperfast.TaskBank.from_weights(hyperfast.MLPSpec((3, 4, 2)), torch.randn(5, 26))
    x, ids = torch.randn(7, 3), torch.tensor([4, 0, 1, 1, 3, 2, 0])
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    y = bank(x, ids)
    with hyperfast.use_backend("reference"), Spy():
        specified = bank(x, ids)
    assert "hyperfast" not in seen
    torch.testing.assert_close(specified, y)
