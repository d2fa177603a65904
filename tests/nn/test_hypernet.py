"""The hypernetwork: its parts, and the variance of the weights that it generates at the start."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import activations

# 2**-60 of the features, summed: a billionth of what float32 tells from 1.
NEXT_TO_ZERO = 1e-15


@pytest.mark.parametrize("hidden", [(), 7, (7,), (9, 7)], ids=str)
def test_generator_is_trunk_and_head(hidden):
    hyper = hyperfast.HyperNet(5, 4, 8, 3, hidden=hidden, dtype=torch.float64)
    z = torch.randn(6, 5, dtype=torch.float64)
    flat = hyper.generator(z)
    assert flat.shape == (6, hyper.total_target_params)
    assert torch.equal(hyper.spec.flatten(hyper(z)), flat)
    assert torch.equal(hyper.head(hyper.features(z)), flat)
    widths = [m.out_features for m in hyper.generator if isinstance(m, nn.Linear)]
    trunk = (hidden,) if isinstance(hidden, int) else hidden
    assert widths == [*trunk, hyper.total_target_params]
    assert all(p.dtype == torch.float64 for p in hyper.parameters())


@pytest.mark.parametrize(
    ("hidden", "sizes"), [(8, (4, 8, 3)), ((8, 6), (4, 8, 6, 3)), ((), (4, 3))]
)
def test_target_hidden(hidden, sizes):
    hyper = hyperfast.HyperNet(5, 4, hidden, 3)
    assert hyper.spec == hyperfast.MLPSpec(sizes)
    assert len(hyper(torch.randn(5))) == 2 * (len(sizes) - 1)


def test_without_biases():
    weights = hyperfast.HyperNet(5, 4, 8, 3, bias=False)(torch.randn(2, 5))
    assert [tuple(w.shape) for w in weights] == [(2, 8, 4), (2, 3, 8)]


@pytest.mark.parametrize(
    "activation", ["tanh", nn.Tanh(), torch.tanh], ids=["name", "module", "fn"]
)
def test_trunk_activation(activation):
    hyper = hyperfast.HyperNet(5, 4, 8, 3, activation=activation, hidden=(7, 6))
    z = torch.randn(2, 5)
    linears = [m for m in hyper.generator if isinstance(m, nn.Linear)]
    expected = linears[2](torch.tanh(linears[1](torch.tanh(linears[0](z)))))
    torch.testing.assert_close(hyper.generator(z), expected)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 5)])
def test_batches_of_latents(shape):
    weights = hyperfast.HyperNet(5, 4, 8, 3)(torch.randn(shape))
    assert all(w.shape[: len(shape) - 1] == shape[:-1] for w in weights)


def test_device_and_default_dtype():
    hyper = hyperfast.HyperNet(5, 4, 8, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in hyper.parameters()} == {("meta", torch.bfloat16)}


def test_reset_parameters_draws_again():
    hyper = hyperfast.HyperNet(5, 4, 8, 3)
    before = hyper.head.weight.clone()
    torch.manual_seed(1)
    hyper.reset_parameters()
    assert not torch.equal(before, hyper.head.weight)


# Second moments under the standard normal, known in closed form.
MOMENTS = {
    "identity": 1.0,
    "relu": 0.5,
    "leaky_relu": (1 + 0.01**2) / 2,
    "sin": (1 - math.exp(-2)) / 2,
}


@pytest.mark.parametrize("name", sorted(activations.KNOWN))
def test_second_moment(name):
    module = activations.resolve(name)
    moment = activations.second_moment(module)
    if name in MOMENTS:
        assert moment == pytest.approx(MOMENTS[name], abs=1e-6)
    g = torch.randn(1_000_000, dtype=torch.float64)
    squares = module(g) ** 2
    assert abs(moment - squares.mean()) < 5 * squares.std() / 1000


def z_score(samples, expected):
    """Distance of the mean of independent samples from ``expected``, in standard errors; and the
    standard error relative to ``expected``, which says how small a mistake would show."""
    error = samples.std() / len(samples) ** 0.5
    return (abs(samples.mean() - expected) / error).item(), (error / expected).item()


SEEDS = 40


@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
@pytest.mark.parametrize("trunk", [(), (64,), (96, 48)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 16, 2), (8, 64, 64, 4), (16, 16, 16, 16, 16)], ids=str)
def test_generated_weights_have_the_variance_of_kaiming_normal(sizes, trunk, init):
    """Every seed is an independent estimate of each layer's variance. Their mean must lie within 5
    standard errors (one false alarm in 10^6) of gain^2 / fan; an error of 20% would show."""
    variances = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        hyper = hyperfast.HyperNet(32, sizes[0], sizes[1:-1], sizes[-1], hidden=trunk, init=init)
        weights = hyper(torch.randn(64, 32))
        variances.append(torch.stack([w.detach().var() for w in weights[::2]]))
        assert all(b.abs().max() < NEXT_TO_ZERO for b in weights[1::2])
    mode = init.removeprefix("hyper")
    fan = "fan_in" if mode == "fan_in" else "fan_out"
    for (i, o), samples in zip(pairwise(sizes), torch.stack(variances).T, strict=True):
        direct = nn.init.kaiming_normal_(torch.empty(o, i), mode=fan, nonlinearity="relu")
        expected = 2 / (i if fan == "fan_in" else o)
        # What kaiming_normal draws: a normal's sample variance has relative error sqrt(2 / n).
        assert direct.var().item() == pytest.approx(expected, rel=6 * (2 / direct.numel()) ** 0.5)
        score, resolution = z_score(samples, expected)
        assert score < 5
        assert resolution < 0.04


@pytest.mark.parametrize(("activation", "gain2"), [("relu", 2.0), ("identity", 1.0)])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("width", [16, 64])
def test_signal_passes_the_layers_as_in_a_directly_initialised_mlp(width, depth, activation, gain2):
    """The growth of the pre-activations' second moment from layer to layer: a paired difference of
    independent seeds, within 5 standard errors of zero."""
    widths = (width,) * depth
    ours, theirs = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        hyper = hyperfast.HyperNet(32, width, widths, width, target_activation=activation)
        x, generated = torch.randn(16, 64, width), hyper(torch.randn(16, 32))[::2]
        direct = [torch.randn(16, width, width) * (gain2 / width) ** 0.5 for _ in generated]
        ours.append(growth(x, generated, activation))
        theirs.append(growth(x, direct, activation))
    difference = torch.stack(ours) - torch.stack(theirs)
    for layer in difference.T:
        error = layer.std() / SEEDS**0.5
        assert layer.mean().abs() < 5 * error
        assert error < 0.06


@torch.no_grad()
def growth(x, weights, activation):
    """Second moment of a layer's output over that of the one before, mean over tasks."""
    module, ratios = activations.resolve(activation), []
    for n, w in enumerate(weights):
        y = torch.bmm(module(x) if n else x, w.mT)
        ratios.append((y.square().mean((1, 2)) / x.square().mean((1, 2))).mean())
        x = y
    return torch.stack(ratios)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "sin"])
def test_gain_follows_the_activations(activation):
    """Trunk and target activation both enter; a smooth trunk keeps the variance to O(1 / z_dim)."""
    options = {"activation": activation, "target_activation": activation}
    moment = activations.second_moment(activations.resolve(activation))
    variances = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        hyper = hyperfast.HyperNet(256, 16, 32, 16, hidden=(256,), **options)
        variances.append(hyper(torch.randn(16, 256))[0].detach().var())
    assert torch.stack(variances).mean().item() == pytest.approx(1 / (16 * moment), rel=0.03)


@pytest.mark.parametrize("kind", [nn.SiLU, nn.ELU, nn.Mish, nn.ReLU], ids=lambda k: k.__name__)
def test_an_activation_in_place_has_the_same_moment(kind):
    assert activations.second_moment(kind(inplace=True)) == activations.second_moment(kind())


# What an activation is asked at the start


SLOPES = torch.linspace(-1, 1, 8)


def prelu(width):
    module = nn.PReLU(width)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 1, width))
    return module


def test_second_moment_of_a_slope_a_column():
    expected = (1 + SLOPES.square().mean().item()) / 2
    assert activations.second_moment(prelu(8), 8) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (torch.tanh, activations.second_moment(nn.Tanh())),
        (nn.LayerNorm(16), 1),
        (nn.Sequential(nn.BatchNorm1d(16), nn.ReLU()), 0.5),
        (lambda x: x / x.norm(dim=1, keepdim=True), 1 / 16),
    ],
    ids=["function", "layer norm", "batch norm", "unit length"],
)
def test_second_moment_of_what_sees_whole_rows(activation, expected):
    module = activations.resolve(activation)
    before = [t.clone() for t in module.state_dict().values()]
    state = torch.random.get_rng_state()
    assert activations.second_moment(module, 16) == pytest.approx(expected, rel=0.01)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, module.state_dict().values()))


def test_the_gain_of_an_activation_that_cannot_be_asked():
    for module in (nn.PReLU(8, device="meta"), nn.PReLU(7), nn.GLU()):
        assert activations.second_moment(module, 9) == 1


def test_activations_with_a_slope_a_feature():
    """They start as with the same slopes one by one; slopes that are given stay."""
    hyper = hyperfast.HyperNet(5, 4, 8, 3, activation=prelu(64), target_activation=prelu(8))
    model = hyperfast.HyperMLP(hyper)
    assert torch.equal(model.target.activations[0].weight, SLOPES)
    x, z = torch.randn(6, 7, 4), torch.randn(6, 5)
    torch.testing.assert_close(model(x, z), model.target(x, hyper(z)), rtol=1e-4, atol=1e-4)


# The meta device


@pytest.mark.parametrize("where", ["activation", "target_activation"])
def test_a_prelu_on_meta(where):
    with torch.device("meta"):
        hyper = hyperfast.HyperNet(5, 4, 8, 3, **{where: nn.PReLU(init=0.1)})
    model = hyperfast.HyperMLP(hyper).to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, math.nan)  # which is what empty memory may hold
    hyper.reset_parameters()
    slope = hyper.generator[1] if where == "activation" else model.target.activations[0]
    assert slope.weight == torch.tensor(0.1)
    assert model(torch.randn(6, 4), torch.randn(6, 5)).isfinite().all()


@pytest.mark.parametrize("how", ["to_empty", "device"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_a_net_on_meta(norm, how):
    """Its parameters start as its modules would have set them."""
    with torch.device("meta"):
        parts = nn.Linear(4, 8), nn.LayerNorm(8) if norm else nn.ReLU(), nn.Linear(8, 3)
        net = nn.Sequential(*parts)
    torch.manual_seed(0)
    if how == "device":
        hyper, target = hyperfast.HyperNet.for_module(net, 5, device="cpu")
    else:
        hyper, target = hyperfast.HyperNet.for_module(net, 5)
        hyper.to_empty(device="cpu")
        hyper.reset_parameters()
    weights = hyper(torch.randn(6, 5))
    assert all(w.isfinite().all() for w in weights)
    first = weights[1]
    assert (first == first[0]).all()
    assert 0 < first.abs().max() <= 0.5  # uniform in +-1 / sqrt(4)
    if norm:
        assert (weights[2] == 1).all()
        assert weights[3].abs().max() < NEXT_TO_ZERO
    assert target(torch.randn(6, 7, 4), weights).isfinite().all()


def test_what_a_meta_net_does_not_say_starts_at_zero():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        net = Scaled()
    hyper, target = hyperfast.HyperNet.for_module(net, 5, device="cpu")
    weights = dict(zip(target.names, hyper(torch.randn(6, 5)), strict=True))
    assert weights["scale"].abs().max() < NEXT_TO_ZERO
    assert weights["linear.bias"].any()


# Sizes


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, torch.tensor, np.array], ids=lambda k: k.__name__
)
def test_sizes_from_other_libraries(kind):
    five, four, eight, three = (kind(n) for n in (5, 4, 8, 3))
    hyper = hyperfast.HyperNet(five, four, eight, three, hidden=(eight,))
    assert hyper.spec == hyperfast.MLPSpec((4, 8, 3)) == hyperfast.MLPSpec([four, eight, three])
    assert {type(n) for n in (*hyper.spec.sizes, hyper.z_dim)} == {int}
    several = hyperfast.HyperNet(5, 4, np.array([8, 6]), 3, hidden=np.array([7, 9]))
    assert several.spec == hyperfast.MLPSpec(np.array([4, 8, 6, 3]))
    assert [m.out_features for m in several.generator[::2]] == [7, 9, several.spec.numel]


@pytest.mark.parametrize("size", [np.float64(8), np.bool_(True), torch.tensor(8.0)], ids=repr)
def test_sizes_that_are_no_ints(size):
    with pytest.raises(TypeError, match="target_hidden must be an int"):
        hyperfast.HyperNet(5, 4, size, 3)
