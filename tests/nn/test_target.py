"""The target network: every form of input, activation and transform."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import Sine, TargetNet
from hyperfast.activations import KNOWN
from hyperfast.functional import task_mlp
from tests.support import budget
from tests.support.draw import draw


def weights(*lead, bias=True, sizes=(4, 8, 3)):
    spec = hyperfast.MLPSpec(sizes, bias)
    return spec.split(draw(*lead, spec.numel))


def by_hand(x, ws, activation=torch.relu, bias=True):
    """One network, layer by layer."""
    layers = list(zip(ws[::2], ws[1::2], strict=True)) if bias else [(w, None) for w in ws]
    for w, b in layers[:-1]:
        x = activation(F.linear(x, w, b))
    return F.linear(x, *layers[-1])


close = partial(budget.close, tolerance=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(4, 3), (4, 8, 3), (4, 8, 1, 6, 3)], ids=str)
class TestForms:
    @pytest.mark.parametrize("lead", [(), (7,), (2, 7), (0,)], ids=str)
    def test_one_network(self, sizes, bias, lead):
        ws, x = weights(bias=bias, sizes=sizes), draw(*lead, 4)
        close(TargetNet()(x, ws), by_hand(x, ws, bias=bias))

    @pytest.mark.parametrize("lead", [(5,), (5, 7), (5, 0), (5, 1)], ids=str)
    def test_batched(self, sizes, bias, lead):
        ws, x = weights(5, bias=bias, sizes=sizes), draw(*lead, 4)
        expected = [by_hand(x[b], [w[b] for w in ws], bias=bias) for b in range(5)]
        close(TargetNet()(x, ws), torch.stack(expected))

    @pytest.mark.parametrize("ids", [[3, 0, 0, 4, 3], [], [2]], ids=str)
    def test_ragged(self, sizes, bias, ids):
        ws, x = weights(5, bias=bias, sizes=sizes), draw(len(ids), 4)
        y = TargetNet()(x, ws, torch.tensor(ids, dtype=torch.int64))
        assert y.shape == (len(ids), 3)
        for row, task, result in zip(x, ids, y, strict=True):
            close(result, by_hand(row, [w[task] for w in ws], bias=bias))

    def test_no_tasks(self, sizes, bias):
        ws = weights(0, bias=bias, sizes=sizes)
        assert TargetNet()(draw(0, 7, 4), ws).shape == (0, 7, 3)
        assert TargetNet()(draw(0, 4), ws, torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def jagged(*lengths):
    return torch.nested.nested_tensor([draw(n, 4) for n in lengths], layout=torch.jagged)


HYPER = hyperfast.HyperNet(5, 4, 8, 3, dtype=torch.float64)
MODELS = [
    pytest.param(lambda x, z: TargetNet()(x, HYPER(z)), id="target"),
    pytest.param(hyperfast.HyperMLP(HYPER), id="model"),
]


@pytest.mark.parametrize("run", MODELS)
class TestNested:
    @pytest.mark.parametrize("lengths", [(2, 5, 1), (3, 0, 2), (1,), (0, 0)], ids=str)
    def test_equals_task_by_task(self, run, lengths):
        x, z = jagged(*lengths), draw(len(lengths), 5)
        y = run(x, z)
        assert y.is_nested
        assert y.layout == torch.jagged
        for xb, zb, yb in zip(x.unbind(), z, y.unbind(), strict=True):
            close(yb, run(xb, zb))

    def test_gradients(self, run):
        z = draw(3, 5).requires_grad_()
        values = draw(8, 4).requires_grad_()
        x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 7, 8]))
        run(x, z).values().sin().sum().backward()
        actual, z.grad, values.grad = (z.grad, values.grad), None, None
        run_ragged = hyperfast.HyperMLP(HYPER)
        ids = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2])
        run_ragged(values, z, ids).sin().sum().backward()
        close(actual, (z.grad, values.grad))

    def test_the_ragged_size_is_that_of_x(self, run):
        """So the result can be added to its input."""
        x = jagged(2, 5, 1)
        y = run(x, draw(3, 5))
        assert y.shape[1] == x.shape[1]
        assert (y + x[..., :3]).is_nested

    def test_view_with_gaps(self, run):
        dense = draw(2, 6, 4)
        starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
        x = torch.nested.narrow(dense, 1, starts, lengths, layout=torch.jagged)
        z = draw(2, 5)
        y = run(x, z).unbind()
        close(y[0], run(dense[0, :2], z[0]))
        close(y[1], run(dense[1, 1:4], z[1]))

    @pytest.mark.parametrize("tasks", [1, 3])
    def test_another_number_of_latents(self, run, tasks):
        with pytest.raises(ValueError, match=rf"shape \({tasks}, j, in\).* got \(2, "):
            run(jagged(2, 5), draw(tasks, 5))

    def test_jagged_in_the_last_dimension(self, run):
        with pytest.raises(ValueError, match="jagged in j"):
            run(jagged(2, 5).transpose(1, 2), draw(2, 5))

    def test_a_single_latent_for_all(self, run):
        x, z = jagged(2, 5), draw(5)
        for xb, yb in zip(x.unbind(), run(x, z).unbind(), strict=True):
            close(yb, run(xb, z))


def test_nested_takes_no_ids():
    ids = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="task_ids must be None for a NestedTensor"):
        TargetNet()(jagged(2, 5), weights(2), ids)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_strided_nested():
    x = torch.nested.nested_tensor([draw(2, 4), draw(3, 4)], layout=torch.strided)
    with pytest.raises(ValueError, match=r"layout torch\.jagged, got torch\.strided"):
        TargetNet()(x, weights(2))


class TestActivation:
    @pytest.mark.parametrize("name", KNOWN)
    def test_by_name(self, name):
        x, ws = draw(7, 4), weights()
        close(TargetNet(name)(x, ws), by_hand(x, ws, KNOWN[name].make()))

    @pytest.mark.parametrize("activation", [nn.Tanh(), torch.tanh, lambda x: x.tanh()])
    def test_by_module_or_function(self, activation):
        x, ws = draw(7, 4), weights()
        close(TargetNet(activation)(x, ws), by_hand(x, ws, torch.tanh))

    def test_sine_frequency(self):
        x, ws = draw(7, 4), weights()
        close(TargetNet(Sine(30.0))(x, ws), by_hand(x, ws, lambda v: torch.sin(30 * v)))

    @pytest.mark.parametrize("lead", [(), (5,)], ids=["one", "batched"])
    def test_per_layer(self, lead):
        ws, x = weights(*lead, sizes=(4, 8, 6, 3)), draw(*lead, 7, 4)
        apply = torch.baddbmm if lead else None

        def layer(n, v):
            w, b = ws[2 * n], ws[2 * n + 1]
            return apply(b.unsqueeze(1), v, w.mT) if lead else F.linear(v, w, b)

        inner = layer(2, torch.sin(layer(1, torch.tanh(layer(0, x)))))
        close(TargetNet(["tanh", torch.sin])(x, ws), inner)
        close(TargetNet(["tanh", torch.sin, nn.Sigmoid()])(x, ws), torch.sigmoid(inner))

    def test_per_layer_in_the_model(self):
        target = TargetNet(["tanh", "sigmoid"])
        model = hyperfast.HyperMLP(HYPER, target)
        x, z = draw(2, 7, 4), draw(2, 5)
        y = model(x, z)
        close(y, target(x, HYPER(z)))
        assert ((y > 0) & (y < 1)).all()

    @pytest.mark.parametrize("count", [0, 1, 4])
    def test_another_number_of_layers(self, count):
        target = TargetNet(["relu"] * count)
        with pytest.raises(ValueError, match=f"2 or 3 entries for a network of 3 .* got {count}"):
            target(draw(4), weights(sizes=(4, 8, 6, 3)))

    def test_a_module_learns(self):
        """The parameters of an activation are those of the target."""
        target = TargetNet(nn.PReLU(dtype=torch.float64))
        y = hyperfast.HyperMLP(HYPER, target)(draw(2, 7, 4), draw(2, 5))
        y.sum().backward()
        (slope,) = target.parameters()
        assert slope.grad.abs() > 0


class TestTransform:
    @pytest.mark.parametrize(
        ("transform", "function"),
        [
            ("abs", torch.abs),
            ("exp", torch.exp),
            ("softplus", F.softplus),
            (torch.tanh, torch.tanh),
        ],
    )
    def test_weights_only(self, transform, function):
        x, ws = draw(7, 4), weights()
        changed = [function(ws[0]), ws[1], function(ws[2]), ws[3]]
        close(TargetNet(weight_transform=transform)(x, ws), by_hand(x, changed))

    def test_model(self):
        target = TargetNet(weight_transform="abs")
        model = hyperfast.HyperMLP(HYPER, target)
        assert model.fused
        x, z, ids = draw(6, 4), draw(2, 5), torch.tensor([1, 0, 0, 1, 1, 1])
        close(model(x, z, ids), target(x, HYPER(z), ids))

    def test_monotonic(self):
        """The mixer of QMIX: no input may lower the output."""
        model = hyperfast.HyperMLP(HYPER, TargetNet("elu", weight_transform="abs"))
        x = draw(6, 7, 4).requires_grad_()
        model(x, draw(6, 5)).sum().backward()
        assert (x.grad >= 0).all()
        assert (x.grad > 0).any()


class Doubled(TargetNet):
    def forward(self, x, weights, task_ids=None):
        return 2 * super().forward(x, weights, task_ids)


def hooked():
    target = TargetNet()
    target.register_forward_hook(lambda module, args, y: 2 * y)
    return target


@pytest.mark.parametrize("target", [Doubled(), hooked()], ids=["subclass", "hook"])
def test_a_target_that_does_more_is_not_fused(target):
    model = hyperfast.HyperMLP(HYPER, target)
    x, z = draw(2, 7, 4), draw(2, 5)
    assert not model.fused
    close(model(x, z), 2 * hyperfast.HyperMLP(HYPER)(x, z))


@pytest.mark.parametrize("bias", [True, False])
def test_pieces_of_one_vector_run_as_one_op(bias, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return task_mlp(*args)

    monkeypatch.setattr("hyperfast.functional.task_mlp", counted)
    hyper = hyperfast.HyperNet(5, 4, (6, 7), 3, bias=bias, dtype=torch.float64)
    target = hyperfast.TargetNet("tanh")
    weights = hyper(torch.randn(8, 5, dtype=torch.float64))
    x, ids = torch.randn(20, 4, dtype=torch.float64), torch.randint(8, (20,))
    layered = target(x, weights, ids)
    assert not calls  # gradients flow to each weight
    with torch.no_grad():
        one = target(x, weights, ids)
        assert len(calls) == 1
        rows = target(x[:16].view(8, 2, 4), weights)
        assert len(calls) == 2
        copies = target(x, [w.clone() for w in weights], ids)
        assert len(calls) == 2
    torch.testing.assert_close(one, layered, rtol=0, atol=1e-12)
    torch.testing.assert_close(copies, layered, rtol=0, atol=1e-12)
    sorted_ids = torch.arange(8).repeat_interleave(2)
    torch.testing.assert_close(
        rows.flatten(0, 1), target(x[:16], weights, sorted_ids), atol=1e-12, rtol=0
    )
    with torch.no_grad(), pytest.raises(IndexError, match="task_ids"):
        target(x, weights, ids - 1)
    with torch.no_grad(), pytest.raises(ValueError, match="x must have shape"):
        target(x[:, :3], weights, ids)


# Weights and activations in the containers of torch.nn


def test_weights_in_a_parameter_list():
    ws, x = weights(5), draw(5, 7, 4)
    held = nn.ParameterList(ws)
    y = TargetNet()(x, held)
    close(y, TargetNet()(x, ws))
    y.sum().backward()
    assert all(p.grad is not None for p in held)
    flat = hyperfast.MLPSpec((4, 8, 3)).flatten(held)
    assert torch.equal(flat, hyperfast.MLPSpec((4, 8, 3)).flatten(ws))


def test_weights_of_stacked_modules():
    nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double() for _ in range(5)]
    x, (params, _) = draw(5, 7, 4), torch.func.stack_module_state(nets)
    expected = torch.stack([net(rows) for net, rows in zip(nets, x, strict=True)])
    close(TargetNet()(x, params), expected)
    close(TargetNet()(x[0], dict(nets[0].named_parameters())), expected[0])
    close(TargetNet()(x[0], nets[0].parameters()), expected[0])
    bank = hyperfast.TaskBank.from_weights(hyperfast.MLPSpec((4, 8, 3)), params)
    close(bank(x[:, 0], bank.ids()), expected[:, 0].detach())


@pytest.mark.parametrize(
    "empty",
    [(), nn.ParameterList(), {}, nn.ParameterDict(), iter(())],
    ids=lambda e: type(e).__name__,
)
def test_no_weights(empty):
    with pytest.raises(ValueError, match="weights must be a non-empty sequence of tensors, got"):
        TargetNet()(draw(5, 4), empty)


def test_activations_in_a_module_list():
    ws, x = weights(5, sizes=(4, 8, 6, 3)), draw(5, 7, 4)
    target = TargetNet(nn.ModuleList([nn.Tanh(), nn.ReLU()]))
    close(target(x, ws), TargetNet(["tanh", "relu"])(x, ws))
    assert target.per_layer
    with pytest.raises(ValueError, match="activation must hold 1 or 2 entries"):
        hyperfast.HyperMLP(
            hyperfast.HyperNet(5, 4, 8, 3), TargetNet(nn.ModuleList([nn.Tanh()] * 3))
        )
