"""The job in small: a latent becomes the weights of a network that runs and trains."""

import pytest
import torch

import hyperfast
from tests.support.draw import draw


@pytest.fixture
def nets():
    hyper = hyperfast.HyperNet(5, 4, 8, 3, dtype=torch.float64)
    return hyper, hyperfast.TargetNet()


def test_shapes(nets):
    hyper, target = nets
    single = [(8, 4), (8,), (3, 8), (3,)]
    assert [tuple(w.shape) for w in hyper(draw(5))] == single
    assert [tuple(w.shape) for w in hyper(draw(2, 5))] == [(2, *s) for s in single]
    assert hyper.total_target_params == 8 * 4 + 8 + 3 * 8 + 3
    assert target(draw(7, 4), hyper(draw(5))).shape == (7, 3)
    assert target(draw(4), hyper(draw(5))).shape == (3,)


def test_the_target_owns_nothing(nets):
    assert not list(nets[1].parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_reaches_every_parameter(nets, fused):
    hyper, target = nets
    model = hyperfast.HyperMLP(hyper, target)
    x, z = draw(6, 7, 4), draw(6, 5)
    y = model(x, z) if fused else target(x, hyper(z))
    y.square().mean().backward()
    for name, p in hyper.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_batched_equals_a_loop(nets):
    hyper, target = nets
    model = hyperfast.HyperMLP(hyper, target)
    x, z = draw(6, 7, 4), draw(6, 5)
    loop = torch.stack([target(x[b], hyper(z[b])) for b in range(6)])
    ids = torch.arange(6).repeat_interleave(7)
    for y in (
        target(x, hyper(z)),
        model(x, z),
        torch.stack([model(x[b], z[b]) for b in range(6)]),
        target(x.flatten(0, 1), hyper(z), ids).view(6, 7, 3),
        model(x.flatten(0, 1), z, ids).view(6, 7, 3),
    ):
        torch.testing.assert_close(y, loop, rtol=1e-12, atol=1e-12)


def test_one_row_a_task_needs_no_row_dimension(nets):
    hyper, target = nets
    model = hyperfast.HyperMLP(hyper, target)
    x, z = draw(6, 4), draw(6, 5)
    expected = torch.stack([target(x[b], hyper(z[b])) for b in range(6)])
    torch.testing.assert_close(target(x, hyper(z)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x, z), expected, rtol=1e-12, atol=1e-12)


def test_matches_a_network_written_out(nets):
    hyper, target = nets
    z, x = draw(5), draw(7, 4)
    flat = hyper.generator(z)
    w1, b1 = flat[:32].view(8, 4), flat[32:40]
    w2, b2 = flat[40:64].view(3, 8), flat[64:]
    expected = torch.relu(x @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(target(x, hyper(z)), expected, rtol=1e-12, atol=1e-12)


def test_it_learns():
    """Two tasks, two lines through the origin, one hypernetwork."""
    model = hyperfast.HyperMLP(hyperfast.HyperNet(2, 1, 8, 1))
    x, z = torch.linspace(-1, 1, 16).view(1, 16, 1).repeat(2, 1, 1), torch.eye(2)
    y = x * torch.tensor([1.0, -2.0]).view(2, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(200):
        loss = (model(x, z) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2 * y.var()
