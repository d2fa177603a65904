"""Any module as target, against a loop that loads plain copies of it with the generated weights."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from hyperfast import HyperMLP, HyperNet, MLPSpec, ModuleTarget, Sine, TargetNet
from hyperfast.activations import named
from tests.support.budget import assert_as_good

Z = 4
# The compiler and forward-mode derivatives use parts of torch.jit that warn.
OF_TORCH = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tied(nn.Module):
    """Both an embedding and the layer that reads it out, by one matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x))))


class Repeated(nn.Module):
    """One layer under two names, run twice."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Twice(nn.Module):
    """One parameter under two names of the same module."""

    def __init__(self):
        super().__init__()
        self.scale = self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.scale + self.shift


def convolution():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )


def batch_norm():
    """In eval mode, with statistics that are not the initial ones."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    net(torch.randn(9, 4))
    return net.eval()


def real(*shape):
    return lambda tasks: torch.randn(tasks, *shape)


def integers(*shape):
    return lambda tasks: torch.randint(0, 7, (tasks, *shape))


CASES = {
    "convolution": (convolution, real(2, 3, 6, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 3, 2), real(2, 4, 5)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), real(3, 4)),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 2), nn.GroupNorm(2, 6)), real(3, 4, 5)),
    "batch norm, eval": (batch_norm, real(3, 4)),
    "batch norm, no statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), real(3, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), integers(3)),
    "lstm": (lambda: nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True), real(3, 6, 4)),
    "lstm, projected": (lambda: nn.LSTM(4, 5, proj_size=2), real(6, 3, 4)),
    "gru": (lambda: nn.GRU(4, 5, 2, bidirectional=True), real(6, 3, 4)),
    "rnn": (lambda: nn.RNN(4, 5), real(6, 3, 4)),
    "rnn, relu": (lambda: nn.RNN(4, 5, nonlinearity="relu"), real(6, 3, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 5), real(3, 4)),
    "gru cell": (lambda: nn.GRUCell(4, 5), real(3, 4)),
    "rnn cell": (lambda: nn.RNNCell(4, 5), real(3, 4)),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda tasks: tuple(torch.randn(tasks, 2, n, 4) for n in (5, 6, 6)),
    ),
    "transformer, eval": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        real(2, 5, 4),
    ),
    "tied": (Tied, integers(3)),
    "repeated": (Repeated, real(3, 4)),
    "twice": (Twice, real(3, 4)),
    "parametrised": (lambda: weight_norm(nn.Linear(4, 3)), real(3, 4)),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), real(2, 4)),
}


def case(name, tasks=3):
    make, inputs = CASES[name]
    net = make()
    hyper, target = HyperNet.for_module(net, Z)
    stir(hyper)
    return net, hyper, target, inputs(tasks)


def stir(hyper):
    """Every generated weight depends on z, which biases and scales do not at the start."""
    nn.init.normal_(hyper.head.weight, std=0.1)


def load(net, names, weights):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, w in zip(names, weights, strict=True):
            net.get_parameter(name).copy_(w)
    return net


def call(net, x):
    if isinstance(x, dict):
        return net(**x)
    return net(*x) if isinstance(x, tuple) else net(x)


def floats(x):
    return [t for t in tree_leaves(x) if t.is_floating_point()]


def close(got, want):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def entry(x, b):
    """Entry ``b`` of every tensor, a leaf of its own."""
    return tree_map(lambda t: t[b].detach().requires_grad_(t.is_floating_point()), x)


def stack(entries):
    return tree_map(lambda *ts: torch.stack(ts), entries[0], *entries[1:])


def loop(net, names, x, weights):
    """Output of all tasks; gradients of half its square by weights, x and shared parameters."""
    outputs, by_weights, by_x, by_shared = [], [], [], []
    for b in range(len(weights[0])):
        plain = load(net, names, [w[b] for w in weights])
        xb = entry(x, b)
        y = call(plain, xb)
        (sum(t.square().sum() for t in tree_leaves(y)) / 2).backward()
        outputs.append(tree_map(torch.detach, y))
        by_weights.append([plain.get_parameter(n).grad for n in names])
        by_x.append([t.grad for t in floats(xb)])
        by_shared.append([p.grad for n, p in plain.named_parameters() if n not in names])
    return (
        *(stack(e) for e in (outputs, by_weights, by_x)),
        [g.sum(0) for g in stack(by_shared)],
    )


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name, tasks):
    net, hyper, target, x = case(name, tasks)
    assert isinstance(target, ModuleTarget)
    z = torch.randn(tasks, Z, requires_grad=True)
    weights = hyper(z)
    want, by_weights, by_x, _ = loop(net, target.names, x, [w.detach() for w in weights])
    for t in floats(x):
        t.requires_grad_()
    y = HyperMLP(hyper, target)(x, z)
    close(y, want)
    loss = sum(t.square().sum() for t in tree_leaves(y)) / 2
    latents = [z, *hyper.parameters()]
    got = torch.autograd.grad(loss, latents + floats(x))
    close(got[len(latents) :], by_x)
    close(got[: len(latents)], torch.autograd.grad(weights, latents, by_weights))


@pytest.mark.parametrize("name", CASES)
def test_unbatched_is_the_net(name):
    net, hyper, target, x = case(name)
    weights = hyper(torch.randn(Z))
    y = target(entry(x, 1), weights)
    close(y, call(load(net, target.names, weights), entry(x, 1)))


@pytest.mark.parametrize("name", ["convolution", "layer norm", "embedding", "tied"])
def test_task_ids_mix_the_tasks_of_a_batch(name):
    net, hyper, target, _ = case(name)
    z = torch.randn(3, Z)
    x = CASES[name][1](5)[:, 0]  # a batch as the net itself takes it
    ids = torch.tensor([2, 0, 0, 2, 1])
    y = HyperMLP(hyper, target)(x, z, ids)
    tasks = [load(net, target.names, hyper(z[i])) for i in ids]
    close(y, torch.cat([plain(x[r : r + 1]) for r, plain in enumerate(tasks)]))


def test_task_ids_of_a_recurrent_net():
    net, hyper, target, _ = case("lstm")
    z, x, ids = torch.randn(2, Z), torch.randn(4, 6, 4), torch.tensor([1, 0, 1, 1])
    y, _ = target(x, hyper(z), ids)
    tasks = [load(net, target.names, hyper(z[i])) for i in ids]
    close(y, torch.cat([plain(x[r : r + 1])[0] for r, plain in enumerate(tasks)]))


@pytest.mark.parametrize("name", ["convolution", "lstm", "embedding"])
def test_no_tasks_and_no_rows(name):
    _, hyper, target, x = case(name)
    z = torch.randn(3, Z, requires_grad=True)
    full = target(x, hyper(z))
    none = target(entry(x, slice(0, 0)), hyper(z[:0]))
    assert [t.shape for t in tree_leaves(none)] == [(0, *t.shape[1:]) for t in tree_leaves(full)]
    (grad,) = torch.autograd.grad(sum(t.sum() for t in tree_leaves(none)), z)
    assert grad.count_nonzero() == 0
    rows = target(x[:0, 0], hyper(z), torch.empty(0, dtype=torch.int64))
    assert all(len(t) == 0 for t in tree_leaves(rows))
    if name != "lstm":  # which itself refuses a batch of none
        assert target(x[:, :0], hyper(z)).shape == (3, 0, *full.shape[2:])


def test_input_as_arguments():
    class Gate(nn.Linear):
        def forward(self, x, state, *, scale=None):
            y = super().forward(x) * state[0] + state[1]
            return y if scale is None else {"y": y * scale}

    net = Gate(4, 2)
    hyper, target = HyperNet.for_module(net, Z)
    stir(hyper)
    weights = hyper(torch.randn(3, Z))
    x, a, b = torch.randn(3, 5, 4), torch.randn(3, 2), torch.randn(3, 5, 2)
    want = stack(
        [load(net, target.names, [w[n] for w in weights])(x[n], (a[n], b[n])) for n in range(3)]
    )
    close(target((x, (a, b)), weights), want)
    close(target({"x": x, "state": (a, b), "scale": a[:, 0]}, weights)["y"], want * a[:, :1, None])


def test_expanded_and_strided_input():
    _, hyper, target, x = case("convolution")
    weights = hyper(torch.randn(3, Z))
    close(target(x[:1].expand(3, -1, -1, -1, -1), weights), target(x[[0, 0, 0]], weights))
    close(target(x.transpose(-1, -2), weights), target(x.mT.contiguous(), weights))


STACKS = {
    "biases": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
    "mixed biases": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)),
    "no biases": lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Tanh()),
        nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Linear(5, 2), nn.Sigmoid()),
    ),
    "a layer alone": lambda: nn.Linear(3, 2),
    "one layer": lambda: nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.3)),
}


@pytest.mark.parametrize("name", STACKS)
def test_plain_stack_is_fused_and_equals_the_generic_path(name):
    net = STACKS[name]()
    hyper, target = HyperNet.for_module(net, Z)
    stir(hyper)
    model = HyperMLP(hyper, target)
    assert model.fused
    assert isinstance(hyper.spec, MLPSpec)
    generic = ModuleTarget(net, [n for n, _ in net.named_parameters()])
    assert generic.spec.shapes == hyper.spec.shapes
    z = torch.randn(3, Z, requires_grad=True)
    inputs = [z, *hyper.parameters()]
    for x, ids in [
        (torch.randn(3, 5, 3), None),
        (torch.randn(3, 3), None),
        (torch.randn(7, 3), torch.tensor([2, 0, 0, 1, 2, 2, 1])),
    ]:
        y, want = model(x, z, ids), generic(x, hyper(z), ids)
        close(y, want)
        fused, plain = (torch.autograd.grad(v.square().sum(), inputs) for v in (y, want))
        close(fused, plain)


def shared():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def tied_layers():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def hooked():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    return net


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


@pytest.mark.parametrize(
    "make",
    [
        shared,
        tied_layers,
        hooked,
        lambda: nn.Sequential(nn.Linear(3, 3), Doubled(3, 3)),
        lambda: Backwards(nn.Linear(3, 3), nn.Tanh()),
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(0)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(),
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 3))),
    ],
)
def test_what_is_no_plain_stack_runs_as_it_is(make):
    net = make()
    hyper, target = HyperNet.for_module(net, Z)
    stir(hyper)
    assert not HyperMLP(hyper, target).fused
    weights, x = hyper(torch.randn(2, Z)), torch.randn(2, 5, 3)
    close(target(x, weights), loop(net, target.names, x, [w.detach() for w in weights])[0])


def test_a_stack_with_some_parameters_generated_is_not_fused():
    hyper, target = HyperNet.for_module(STACKS["biases"](), Z, params="*.weight")
    assert not HyperMLP(hyper, target).fused


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        (["4.weight"], ["4.weight"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["4.bias", "*.weight"], ["0.weight", "4.weight", "4.bias"]),
        (lambda name, p: p.ndim == 1, ["0.bias", "4.bias"]),
    ],
)
def test_chosen_parameters(params, chosen):
    net = convolution()
    before = copy.deepcopy(net.state_dict())
    hyper, target = HyperNet.for_module(net, Z, params=params)
    stir(hyper)
    kept = {"net." + n for n in before if n not in chosen}
    assert list(target.names) == chosen
    assert dict(target.named_parameters()).keys() == kept
    assert target.state_dict().keys() == kept
    assert hyper.total_target_params == sum(before[n].numel() for n in chosen)

    x, weights = torch.randn(3, 2, 3, 6, 6), hyper(torch.randn(3, Z))
    want, _, _, by_shared = loop(net, chosen, x, [w.detach() for w in weights])
    y = target(x, weights)
    close(y, want)
    (y.square().sum() / 2).backward()
    close([p.grad for p in target.parameters()], by_shared)

    with torch.no_grad():
        for p in target.parameters():
            p.add_(1)
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())


def test_tied_parameter_is_generated_once_under_any_name():
    for params in (["embed.weight"], ["out.weight"], lambda name, p: name == "out.weight"):
        hyper, target = HyperNet.for_module(Tied(), Z, params=params)
        assert target.names == ("embed.weight",)
        assert hyper.total_target_params == 35
        assert dict(target.named_parameters()).keys() == {"net.mix.weight", "net.mix.bias"}


def test_shared_parameters_and_buffers_move_with_the_target():
    _, target = HyperNet.for_module(batch_norm(), Z, params="0.*")
    target.to(torch.float32)
    assert target.state_dict().keys() == {
        "net.1." + n
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert target.net[1].running_var.dtype == target.net[1].weight.dtype == torch.float32


def test_the_call_leaves_the_target_as_it_was():
    _, hyper, target, x = case("lstm")
    target(x, hyper(torch.randn(3, Z)))
    assert not list(target.parameters())
    assert all(target.net.get_submodule("").__dict__[n].numel() == 0 for n in target.names)


def test_dtype_follows_the_net_or_the_argument():
    net = convolution().float()
    hyper, target = HyperNet.for_module(net, Z, params="0.*")
    assert {p.dtype for m in (hyper, target) for p in m.parameters()} == {torch.float32}
    hyper, target = HyperNet.for_module(net, Z, params="0.*", dtype=torch.float64)
    assert {p.dtype for m in (hyper, target) for p in m.parameters()} == {torch.float64}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_rank_one_and_constant_parameters_start_as_in_the_net():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 4)), nn.Linear(4, 5))
    nn.init.zeros_(net[2].weight)
    hyper, target = HyperNet.for_module(net, Z)
    weights = dict(zip(target.names, hyper(torch.randn(9, Z)), strict=True))
    for name, p in net.named_parameters():
        error = (weights[name] - p.detach()).abs().max()
        assert error > 0.01 if name == "0.weight" else error < 1e-15  # zero is 2**-60 of features


def test_reset_parameters_keeps_the_start():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    hyper, _ = HyperNet.for_module(net, 5)
    bias = hyper.head.bias.detach().clone()
    before = hyper.head.weight.detach().clone()
    with torch.no_grad():
        hyper.head.bias.fill_(7)
    hyper.reset_parameters()
    assert torch.equal(hyper.head.bias, bias)
    assert bias.any()
    assert not torch.equal(hyper.head.weight, before)
    assert torch.equal(hyper.head.weight == 2**-60, before == 2**-60)


def test_variance_of_the_start_is_by_fan():
    net = nn.Sequential(nn.Conv2d(20, 30, 3), nn.Flatten())
    w, _ = HyperNet.for_module(net, 50, hidden=(100,))[0](torch.randn(200, 50))
    assert w.var().item() == pytest.approx(1 / (20 * 9), rel=0.1)
    stack = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 4))
    w, *_ = HyperNet.for_module(stack, 50, hidden=(100,))[0](torch.randn(200, 50))
    assert w.var().item() == pytest.approx(2 / 60, rel=0.1)


def test_running_statistics_are_refused():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    hyper, target = HyperNet.for_module(net, Z)
    x, weights = torch.randn(3, 6, 4), hyper(torch.randn(3, Z))
    with pytest.raises(RuntimeError, match=r"1 \(BatchNorm1d\) is in training mode.*eval\(\)"):
        target(x, weights)
    assert target.net[1].num_batches_tracked == 0
    target.eval()
    assert target(x, weights).shape == (3, 6, 5)


def test_dropout_differs_by_task_and_by_row():
    net = nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5))
    hyper, target = HyperNet.for_module(net, Z)
    weights, x = hyper(torch.randn(1, Z).expand(2, -1)), torch.ones(2, 1, 50)
    a, b = target(x, weights) == 0
    assert 0 < a.sum() < 50
    assert not torch.equal(a, b)
    a, b = target(x[:, 0], weights, torch.tensor([0, 0])) == 0
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["convolution", "lstm", "tied", "attention"])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_and_pickles(name, clone):
    _, hyper, target, x = case(name)
    model, z = HyperMLP(hyper, target), torch.randn(3, Z)
    twin = clone(model)
    close(twin(x, z), model(x, z))
    nn.init.zeros_(twin.hyper.head.bias)
    nn.init.zeros_(twin.hyper.head.weight)
    assert not torch.equal(tree_leaves(twin(x, z))[0], tree_leaves(model(x, z))[0])


def test_state_dict_round_trip():
    def make():
        hyper, target = HyperNet.for_module(batch_norm(), Z, params=["0.weight", "1.bias"])
        stir(hyper)
        return HyperMLP(hyper, target).eval()

    model, other = make(), make()
    x, z = torch.randn(3, 5, 4), torch.randn(3, Z)
    assert not torch.equal(other(x, z), model(x, z))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, z), model(x, z))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "convolution", "transformer, eval"])
def test_single_precision(name):
    _, hyper, target, x = case(name)
    model, z = HyperMLP(hyper, target), torch.randn(3, Z)
    want = tree_leaves(model(x, z))
    single = tree_leaves(model.float()(x.float(), z.float()))
    for s, w in zip(single, want, strict=True):
        torch.testing.assert_close(s, w.float(), rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("name", ["convolution", "transposed convolution", "layer norm", "gru"])
@pytest.mark.parametrize("params", [None, lambda name, p: p.ndim > 1], ids=["all", "weights"])
def test_autocast(name, params):
    """As far from double precision as the loop over tasks under autocast, at most twice."""
    make, inputs = CASES[name]
    hyper, target = HyperNet.for_module(make(), Z, params=params)
    x, z = inputs(3), torch.randn(3, Z)
    model = HyperMLP(hyper, target)
    want = stack([model(x[b], z[b]) for b in range(3)])
    model, x, z = model.float(), x.float(), z.float()
    with torch.autocast("cpu", torch.bfloat16):
        got, looped = model(x, z), stack([model(x[b], z[b]) for b in range(3)])
    for g, l, w in zip(*map(tree_leaves, (got, looped, want)), strict=True):
        assert_as_good(g.to(l.dtype), l, w, roundings=0.5, cast=torch.bfloat16)
        assert not torch.equal(g.double(), w)
    sum(t.float().sum() for t in tree_leaves(got)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_second_derivatives():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.LayerNorm(3))
    hyper, target = HyperNet.for_module(net, 2, hidden=(), activation="tanh")
    stir(hyper)
    z, x = torch.randn(2, 2, requires_grad=True), torch.randn(2, 1, 1, 4, requires_grad=True)
    assert torch.autograd.gradgradcheck(HyperMLP(hyper, target), (x, z))


@OF_TORCH
def test_transforms_of_torch_func():
    _, hyper, target, x = case("gru")
    z = torch.randn(3, Z)

    def output(z):
        return target(x, hyper(z))[0]

    close(
        torch.func.jvp(output, (z,), (z,))[1],
        torch.func.jacfwd(lambda s: output(s * z))(z.new_ones(())),
    )
    close(torch.vmap(output)(torch.stack([z, -z])), torch.stack([output(z), output(-z)]))


@OF_TORCH
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamo, dynamic):
    _, hyper, target, x = case("convolution")
    model, z = HyperMLP(hyper, target), torch.randn(3, Z)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    ids = torch.tensor([2, 0, 1, 1])
    for args in [(x, z), (torch.randn(4, 3, 6, 6), z, ids)]:
        y, want = compiled(*args), model(*args)
        close(y, want)
        got, grads = (
            torch.autograd.grad(v.square().sum(), [*model.parameters()]) for v in (y, want)
        )
        close(got, grads)


@pytest.mark.parametrize(
    ("net", "params", "error", "message"),
    [
        ("net", None, TypeError, r"net must be a torch.nn.Module, got str"),
        (nn.ReLU(), None, ValueError, r"net must have parameters, got ReLU"),
        (nn.Linear(2, 3), [], ValueError, r"parameters \['weight', 'bias'\], got none"),
        (
            nn.Linear(2, 3),
            ["weight", "bais", "w*x"],
            ValueError,
            r"\['weight', 'bias'\], got \['bais', 'w\*x'\], which match none",
        ),
        (nn.Linear(2, 3), lambda name, p: False, ValueError, r"\['weight', 'bias'\], got none"),
        (nn.LazyLinear(3), None, ValueError, r"weight is lazy"),
    ],
)
def test_bad_arguments(net, params, error, message):
    with pytest.raises(error, match=message):
        HyperNet.for_module(net, Z, params=params)


def test_generated_parameters_are_floating_point():
    net = nn.Linear(2, 3)
    net.scale = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match=r"'scale' of dtype torch.int64"):
        HyperNet.for_module(net, Z)
    HyperNet.for_module(net, Z, params=["weight", "bias"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"names must be some of \['embed.weight', 'out.weight', 'mix.weight', 'mix.bias'\]"),
        (["mix.wait"], r"got \['mix.wait'\]"),
        (["embed.weight", "out.weight"], r"names must name every parameter once"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        ModuleTarget(Tied(), names)


def test_bad_calls():
    hyper, target = HyperNet.for_module(nn.Conv1d(2, 3, 2), Z)
    w, b = hyper(torch.randn(4, Z))
    x, ids = torch.randn(4, 5, 2, 6), torch.tensor([0, 1, 4])
    for error, message, args in [
        (ValueError, r"weights must hold 2 tensors, .*'bias'\], got 1", (x, [w])),
        (TypeError, r"weights\[1\] must be a Tensor, got NoneType", (x, [w, None])),
        (ValueError, r"weights\[0\], 'weight', .* \(3, 2, 2\) or \(B", (x, [w[..., :1], b])),
        (ValueError, r"weights\[1\], 'bias', .* \(4, 3\), got \(3, 3\)", (x, [w, b[1:]])),
        (ValueError, r"weights\[1\], 'bias', .* \(3,\), got \(4, 3\)", (x, [w[0], b])),
        (ValueError, r"x must have a leading dimension of 4, .*got shape \(3,", (x[1:], [w, b])),
        (ValueError, r"x must have a leading dimension of 4, .*got shape \(\)", (x.sum(), [w, b])),
        (ValueError, r"task_ids needs weights with a leading", (x[:3, 0], [w[0], b[0]], ids)),
        (ValueError, r"task_ids must have shape \(2,\)", (x[:2, 0], [w, b], ids)),
        (ValueError, r"x must have a leading dimension of rows", (x.sum(), [w, b], ids)),
        (TypeError, r"task_ids must have dtype torch.int64", (x[:3, 0], [w, b], ids.int())),
        (IndexError, r"task_ids must be in \[0, 4\), got 4", (x[:3, 0], [w, b], ids)),
        (IndexError, r"task_ids must be in \[0, 4\), got -1", (x[:3, 0], [w, b], ids - 1)),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            target(*args)


def test_a_model_of_a_module_needs_its_target():
    hyper, _ = HyperNet.for_module(nn.Conv1d(2, 3, 2), Z)
    with pytest.raises(ValueError, match="target must be given"):
        HyperMLP(hyper)
    assert isinstance(HyperMLP(HyperNet(Z, 2, 3, 1)).target, TargetNet)


# What vmap does otherwise than a loop


@pytest.mark.parametrize("params", [None, "1.*"], ids=["generated", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 0},
        {"padding_idx": -2},
        {"scale_grad_by_freq": True},
        {"padding_idx": 2, "scale_grad_by_freq": True},
    ],
    ids=str,
)
def test_gradients_of_an_embedding_by_index(options, params):
    """No gradient at the padding row of any task; counts of a task's own indices."""
    net = nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 2))
    hyper, target = HyperNet.for_module(net, Z, params=params)
    stir(hyper)
    x, weights = torch.randint(6, (3, 2, 9)), hyper(torch.randn(3, Z))
    weights = [w.detach().requires_grad_() for w in weights]
    got, want = target(x, weights), torch.stack([
        target(x[b], [w[b] for w in weights]) for b in range(3)
    ])  # fmt: skip
    close(got, want)
    wanted = [*weights, *target.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)]
    close(*gradients)
    if params is None and "padding_idx" in options:
        assert not gradients[0][0][:, options["padding_idx"]].any()


class Looking(nn.Module):
    """An embedding by the op itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.embedding(self.weight, x, 0)


def test_gradients_of_the_op_embedding():
    _, target = HyperNet.for_module(Looking(), Z)
    weights = [torch.randn(3, 6, 4, requires_grad=True)]
    x = torch.randint(6, (3, 9))
    target(x, weights).sum().backward()
    counts = torch.stack([of_task.bincount(minlength=6) for of_task in x]) * torch.arange(6).sign()
    close(weights[0].grad, counts.unsqueeze(-1).expand(3, 6, 4).double())


class Returning(nn.Module):
    """A net that returns what ``make`` makes of a tensor."""

    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(4, 3), make

    def forward(self, x):
        return self.make(self.linear(x))


Pair = namedtuple("Pair", "y state")


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (y, None),
        lambda y: {"y": y, "name": "logits", "count": 3},
        lambda y: Pair(y, None),
        lambda y: [None, (y, [2 * y, True])],
        lambda y: None,
        lambda y: (y, y.shape[-1:]),
    ],
    ids=["none", "dict", "namedtuple", "nested", "nothing", "size"],
)
def test_outputs_that_are_no_tensors(make):
    hyper, target = HyperNet.for_module(Returning(make), Z)
    x, weights = torch.randn(6, 7, 4), hyper(torch.randn(6, Z))
    each = [target(x[b], [w[b] for w in weights]) for b in range(6)]
    structure = without_tensors(each[0])
    ids = torch.tensor([3, 0, 3])
    results = {
        "batched": target(x, weights),
        "ragged": target(x[ids, 0], weights, ids),
        "none": target(x[:0], [w[:0] for w in weights]),
    }
    for y in results.values():
        assert without_tensors(y) == structure
    tensors = [tensors_of(y) for y in each]
    for n, t in enumerate(tensors_of(results["batched"])):
        close(t, torch.stack([of_task[n] for of_task in tensors]))
    for n, t in enumerate(tensors_of(results["ragged"])):
        close(t, torch.stack([tensors[b][n][0] for b in ids]))


def tensors_of(y):
    return [t for t in tree_leaves(y) if isinstance(t, torch.Tensor)]


def without_tensors(y):
    return tree_map(lambda t: None if isinstance(t, torch.Tensor) else t, y)


def test_outputs_that_hide_tensors():
    net = Returning(lambda y: (y, torch.distributions.Normal(y, 1.0)))
    hyper, target = HyperNet.for_module(net, Z)
    weights = hyper(torch.randn(6, Z))
    with pytest.raises(TypeError, match=r"net must return tensors.*got Normal, which may hold"):
        target(torch.randn(6, 7, 4), weights)
    target(torch.randn(7, 4), [w[0] for w in weights])


def test_compiled_with_an_output_that_is_no_tensor(dynamo):
    model = HyperMLP(*HyperNet.for_module(Returning(lambda y: (y, None)), Z))
    x, z = torch.randn(6, 7, 4), torch.randn(6, Z)
    y, none = torch.compile(model, fullgraph=True, backend="aot_eager")(x, z)
    assert none is None
    close(y, model(x, z)[0])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(4, 3), reentrant

    def forward(self, x):
        return checkpoint(lambda v: self.linear(v).tanh(), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_is_refused_at_the_call(reentrant):
    model = HyperMLP(*HyperNet.for_module(Checkpointed(reentrant), Z))
    x, z = torch.randn(6, 7, 4), torch.randn(6, Z)
    with pytest.raises(
        RuntimeError, match=r"^net must not .*checkpoint the call of the whole model"
    ):
        model(x, z)
    if not reentrant:
        with pytest.raises(RuntimeError, match=r"^net must not use torch\.utils\.checkpoint"):
            model(x[0], z[0])
        with torch.no_grad():
            model(x, z)
    with torch.autograd.graph.save_on_cpu():  # is as it was
        x.requires_grad_().tanh().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around(reentrant):
    model = HyperMLP(*HyperNet.for_module(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), Z))
    x, z = torch.randn(6, 7, 4, requires_grad=True), torch.randn(6, Z)
    wanted = [x, *model.parameters()]
    want = torch.autograd.grad(model(x, z).square().sum(), wanted)
    checkpoint(model, x, z, use_reentrant=reentrant).square().sum().backward()
    close([p.grad for p in wanted], list(want))
    with torch.autograd.graph.save_on_cpu():
        y = model(x, z)
    close(torch.autograd.grad(y.square().sum(), wanted), want)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(layout):
    model = HyperMLP(*HyperNet.for_module(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), Z))
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (1, 3, 2)], layout=layout)
    for given in (x, (x,), {"input": x}):
        with pytest.raises(TypeError, match=r"x must be dense where .* got a NestedTensor"):
            model(given, torch.randn(3, Z))


@pytest.mark.parametrize("norm", [False, True], ids=["pruned", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_net_whose_hooks_compute_weights(norm):
    """It is copied, equals the loop, and can be copied again after a call."""

    def change(net):
        if norm:
            nn.utils.weight_norm(net[0])
        else:
            prune.custom_from_mask(net[0], "weight", torch.arange(32).view(8, 4) % 3 > 0)
        return net

    def make():
        return change(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))

    net = make()
    hyper, target = HyperNet.for_module(net, Z)
    stir(hyper)
    x, weights = torch.randn(6, 7, 4), hyper(torch.randn(6, Z))
    y = target(x, weights)
    for b in range(6):
        one = make()
        with torch.no_grad():
            for name, w in zip(target.names, weights, strict=True):
                one.get_parameter(name).copy_(w[b])
        close(y[b], one(x[b]))
        close(target(x[b], [w[b] for w in weights]), one(x[b]))
    for again in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        close(again(x, weights), y)
    assert HyperMLP(hyper, target)(x, torch.randn(6, Z)).requires_grad


def test_weights_by_name():
    """As torch.func.stack_module_state returns them, in any order, with those that are shared."""
    nets = [nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)) for _ in range(5)]
    _, target = HyperNet.for_module(nets[0], Z, params=["0.*", "1.*", "2.bias"])
    x, (params, _) = torch.randn(5, 7, 4), torch.func.stack_module_state(nets)
    for net in nets:
        net[2].weight = nets[0][2].weight
    expected = torch.stack([net(rows) for net, rows in zip(nets, x, strict=True)])
    close(target(x, params), expected)
    close(target(x, dict(reversed(params.items()))), expected)
    close(target(x, nn.ParameterList([params[name] for name in target.names])), expected)
    params.pop("1.bias")
    with pytest.raises(ValueError, match=r"weights must hold .*'1\.bias'.* got \["):
        target(x, params)


def test_a_stack_with_a_trained_activation_runs_as_it_is():
    net = nn.Sequential(nn.Linear(4, 8), Sine(nn.Parameter(torch.tensor(3.0))), nn.Linear(8, 3))
    hyper, target = HyperNet.for_module(net, Z)
    assert "1.w0" in target.names
    assert not HyperMLP(hyper, target).fused
    assert (hyper(torch.randn(6, Z))[target.names.index("1.w0")] == 3).all()


def test_a_linear_output_is_known_to_the_op():
    _, target = HyperNet.for_module(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), Z)
    assert [named(a) for a in target.layer_activations(2)] == [("relu", 1.0), ("identity", 1.0)]
