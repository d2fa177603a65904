"""Networks that own their weights and train together."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperfast import Sine, TaskMLP
from tests.support.budget import close
from tests.support.draw import draw

T, N, INS, OUTS = 5, 3, 4, 2
IDS = torch.tensor([2, 0, 2, 4, 2, 1])  # task 3 has no rows


def make(activation="tanh", hidden=(7, 6), **options):
    return TaskMLP(T, INS, hidden, OUTS, activation, dtype=torch.float64, **options)


def alone(net, n, x):
    """Network ``n``, layer by layer in plain PyTorch."""
    views = iter(net.spec.split(net.weight[n]))
    activations = net.target.layer_activations(len(net.spec.layers))
    for has_bias, activation in zip(net.spec.biases, activations, strict=True):
        x = F.linear(x, next(views), next(views) if has_bias else None)
        x = x if activation is None else activation(x)
    return x


def same(net, y, wanted, leaves):
    close(y, wanted)
    grad = draw(*y.shape)
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize("bias", [True, False, [True, False, True]], ids=str)
@pytest.mark.parametrize(
    "activation", ["tanh", Sine(3.0), torch.atan], ids=["name", "module", "function"]
)
def test_each_network_runs_on_its_rows(activation, bias):
    net = make(activation, bias=bias)
    x = draw(T, N, INS, grad=True)
    each = torch.stack([alone(net, n, x[n]) for n in range(T)])
    same(net, net(x), each, [x, net.weight])
    x = draw(T, INS, grad=True)
    each = torch.stack([alone(net, n, x[n]) for n in range(T)])
    same(net, net(x), each, [x, net.weight])
    x = draw(1, N, INS, grad=True)
    same(net, net(x), torch.stack([alone(net, n, x[0]) for n in range(T)]), [x, net.weight])
    x = draw(len(IDS), INS, grad=True)
    each = torch.stack([alone(net, n, row) for n, row in zip(IDS, x, strict=True)])
    same(net, net(x, IDS), each, [x, net.weight])


def test_training_is_that_of_a_loop():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double() for _ in range(T)]
    many = TaskMLP.from_modules(nets)
    x, target = draw(T, 20, 3), draw(T, 20, 1)
    ours = torch.optim.Adam(many.parameters(), 0.01)
    theirs = torch.optim.Adam([p for net in nets for p in net.parameters()], 0.01)
    for _ in range(10):
        ours.zero_grad()
        (many(x) - target).square().mean((1, 2)).sum().backward()
        ours.step()
        theirs.zero_grad()
        sum(
            (net(a) - b).square().mean() for net, a, b in zip(nets, x, target, strict=True)
        ).backward()
        theirs.step()
    for net, trained in zip(nets, many.to_modules(), strict=True):
        for p, q in zip(net.parameters(), trained.parameters(), strict=True):
            close(q, p)


@pytest.mark.parametrize(
    "one",
    [
        lambda: nn.Linear(3, 2),
        lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.GELU(), nn.Linear(5, 2)),
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True)), nn.Linear(5, 2)
        ),
    ],
)
def test_from_modules_and_back(one):
    nets = [one() for _ in range(T)]
    many = TaskMLP.from_modules(nets)
    x = torch.randn(T, N, 3)
    torch.testing.assert_close(
        many(x), torch.stack([net(r) for net, r in zip(nets, x, strict=True)])
    )
    again = many.to_modules()
    assert [type(net) for net in again] == [type(net) for net in nets]
    for net, copy in zip(nets, again, strict=True):
        assert net.state_dict().keys() == copy.state_dict().keys()
        assert all(map(torch.equal, net.parameters(), copy.parameters()))
        assert all(p is not q for p, q in zip(net.parameters(), copy.parameters(), strict=True))
    with torch.no_grad():
        many.weight.zero_()
    assert all(p.any() for p in nets[0].parameters())


def test_modules_that_were_given_are_no_part_of_the_network():
    net = TaskMLP.from_modules([nn.Linear(INS, OUTS, dtype=torch.float64) for _ in range(T)])
    assert [*net.state_dict()] == [name for name, _ in net.named_parameters()] == ["weight"]
    again = TaskMLP(T, INS, (), OUTS, dtype=torch.float64)
    again.load_state_dict(net.state_dict())
    x = draw(T, N, INS)
    close(again(x), net(x))


def test_to_modules_without_a_template():
    net = make(bias=[True, False, True])
    nets, x = net.to_modules(), draw(T, N, INS)
    close(torch.stack([one(r) for one, r in zip(nets, x, strict=True)]), net(x))


def test_to_modules_takes_the_parameters_of_activations_along():
    net = TaskMLP(T, INS, 8, OUTS, nn.PReLU(8, init=0.1).double(), dtype=torch.float64)
    nets, x = net.to_modules(), draw(T, N, INS)
    close(torch.stack([one(r) for one, r in zip(nets, x, strict=True)]), net(x))


def test_every_network_starts_as_linear_layers_do():
    torch.manual_seed(0)
    net = TaskMLP(200, 16, 64, 4)
    w1, b1, w2, b2 = net.spec.split(net.weight)
    for t, fan in ((w1, 16), (b1, 16), (w2, 64), (b2, 64)):
        assert 0.97 * fan**-0.5 < t.abs().max() <= fan**-0.5
        assert abs(t.var() * fan - 1 / 3) < 0.03


def test_bank():
    net = make()
    bank, ids = net.bank(), torch.tensor([4, 0, 0, 3])
    x = draw(4, INS)
    close(bank(x, ids), net(x, ids))
    with torch.no_grad():
        net.weight.zero_()
    assert bank(x, ids).any()
    assert net.bank(dtype=torch.float32)(x.float(), ids).dtype == torch.float32


def test_derivatives():
    net = TaskMLP(2, 2, 3, 1, "tanh", dtype=torch.float64)
    x = draw(2, 2, 2, grad=True)

    def run(x, weight):
        return torch.func.functional_call(net, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, net.weight))
    assert torch.autograd.gradgradcheck(run, (x, net.weight))
    shared = draw(1, 2, 2, grad=True)
    assert torch.autograd.gradcheck(run, (shared, net.weight))
    assert torch.autograd.gradgradcheck(run, (shared, net.weight))


def test_vmap():
    net, x = make(), draw(3, T, N, INS)
    close(torch.vmap(net)(x), torch.stack([net(one) for one in x]))


def test_compiles():
    net, x = make(), draw(T, N, INS, grad=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    same(net, compiled(x), net(x), [x, net.weight])


def test_state_dict():
    net, other = make(), make()
    assert [*net.state_dict()] == ["weight"]
    other.load_state_dict(net.state_dict())
    x = draw(T, INS)
    assert torch.equal(net(x), other(x))


def stack(*widths, act=nn.ReLU, **kwargs):
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o, **kwargs), act())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("error", "message", "nets"),
    [
        (ValueError, "at least one network, got none", []),
        (TypeError, "modules must be several networks, got Linear", nn.Linear(3, 2)),
        (ValueError, r"modules\[1\] must have the widths of modules\[0\], \(3, 4, 2\)",
         [stack(3, 4, 2), stack(3, 5, 2)]),
        (ValueError, r"modules\[2\] must have the biases",
         [stack(3, 2), stack(3, 2), stack(3, 2, bias=False)]),
        (ValueError, r"modules\[1\] must have the activations",
         [stack(3, 4, 2), stack(3, 4, 2, act=nn.Tanh)]),
        (ValueError, r"modules\[1\] must have the dtype and device",
         [stack(3, 2), stack(3, 2).double()]),
        (TypeError, r"modules\[0\] must be a plain stack", [nn.Conv1d(3, 2, 1)]),
        (TypeError, r"modules\[1\] must be a plain stack", [stack(3, 2), None]),
        (TypeError, r"modules\[0\] must be .* activations without parameters or hooks",
         [stack(3, 4, 2, act=nn.PReLU)]),
    ],
)  # fmt: skip
def test_modules_that_differ(error, message, nets):
    with pytest.raises(error, match=message):
        TaskMLP.from_modules(nets)


def test_errors():
    net = make()
    for x in (draw(T + 1, INS), draw(T, N, INS + 1), draw(INS)):
        with pytest.raises(ValueError, match="x must have shape"):
            net(x)
    with pytest.raises(IndexError, match="task_ids must be in"):
        net(draw(1, INS), torch.tensor([T]))
    with pytest.raises(TypeError, match="x must have the dtype of the module's weight"):
        net(torch.randn(T, INS))
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        net([[1.0] * INS] * T)
    with pytest.raises(ValueError, match="tasks must be at least 1"):
        TaskMLP(0, 3, 4, 2)
    with pytest.raises(TypeError, match="bias must be a bool"):
        TaskMLP(2, 3, 4, 2, bias="shared")
    for hidden in (None, "4", [4, 2.5]):
        with pytest.raises(TypeError, match="hidden must be an int"):
            TaskMLP(2, 3, hidden, 2)
    with pytest.raises(TypeError, match=r"in_features must be an int, got \(3, 3\)"):
        TaskMLP(2, (3, 3), 4, 2)
    with pytest.raises(TypeError, match="tasks must be an int"):
        TaskMLP(2.0, 3, 4, 2)
