"""The table of activations: values as their modules have them, slopes as PyTorch differentiates."""

import numpy as np
import pytest
import torch
from torch import nn

from hyperfast import Sine
from hyperfast.activations import KNOWN, activate, named, resolve, second_moment

every = pytest.mark.parametrize("name", KNOWN)


def points():
    """Around zero, far out, and the special values."""
    special = torch.tensor([0.0, -0.0, 20.0, 20.5, -20.0, 300.0, -300.0], dtype=torch.float64)
    return torch.cat([torch.linspace(-12, 12, 999, dtype=torch.float64), special])


def test_a_sine_of_no_number():
    with pytest.raises(TypeError, match="w0 must be a number or a Tensor, got '30'"):
        Sine("30")


@every
def test_value_and_slope(name):
    known = KNOWN[name]
    for parameter in (known.default, 2.5) if known.parameter else (known.default,):
        x = points().requires_grad_()
        y = known.make(parameter)(x)
        (slope,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        torch.testing.assert_close(known.value(x.detach(), parameter), y.detach())
        torch.testing.assert_close(known.slope(x.detach(), parameter), slope, rtol=0, atol=1e-12)


@every
def test_an_activation_has_one_name(name):
    known = KNOWN[name]
    assert named(resolve(name)) == (name, known.default)
    if known.parameter:
        assert named(known.make(0.25)) == (name, 0.25)


def test_what_kernels_do_not_know():
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    own = nn.Tanh()
    own.forward = torch.cos
    grown = nn.SiLU()
    grown.scale = nn.Parameter(torch.ones(()))

    class Mine(nn.ReLU):
        pass

    for activation in (
        *(nn.ELU(2.0), nn.Softplus(beta=2), nn.PReLU(), nn.Hardtanh(), Mine(), hooked, own, grown),
        *(Sine(nn.Parameter(torch.ones(()))), Sine(torch.ones(())), Sine(float("nan"))),
    ):
        assert named(activation) is None
    assert named(None) == ("identity", 1.0)


def test_any_activation_sees_flat_rows():
    x = torch.randn(3, 4, 4)
    prelu = nn.PReLU(4)
    with torch.no_grad():
        prelu.weight.copy_(torch.linspace(-1, 1, 4))
    for activation in (prelu, nn.Softmax(dim=1), nn.BatchNorm1d(4).eval(), nn.LayerNorm(4)):
        rows = activation(x.reshape(-1, 4)).view_as(x)
        torch.testing.assert_close(activate(activation, x), rows)
    with pytest.raises(ValueError, match="keep the shape"):
        activate(nn.GLU(), x)


def test_moments():
    assert second_moment(nn.ReLU()) == pytest.approx(0.5, abs=1e-6)
    assert second_moment(nn.Identity()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5)])
def test_numbers_of_other_libraries(number):
    assert named(Sine(number)) == ("sin", 0.5)
    assert named(nn.LeakyReLU(number)) == ("leaky_relu", 0.5)
    assert named(Sine(np.int64(30))) == ("sin", 30.0)


def test_a_class_that_is_patched_later_is_not_known(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.cos())
    assert named(nn.ReLU()) is None


def test_a_method_of_a_module_is_the_module():
    """Or nobody could copy it, move it or put it in eval mode."""
    dropout = nn.Dropout()
    assert resolve(dropout.forward) is dropout
    assert resolve(dropout.__call__) is dropout
    assert resolve(dropout.extra_repr) is not dropout


def test_what_returns_no_tensor():
    with pytest.raises(TypeError, match="must return a Tensor, got NoneType"):
        activate(resolve(lambda x: None), torch.ones(2, 3))
