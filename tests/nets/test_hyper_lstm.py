"""The HyperLSTM against the equations of its paper, gate by gate, and the ways of nn.LSTM."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from hyperfast import use_backend
from hyperfast.nets import HyperLSTM, HyperLSTMCell, hyper_lstm_cpu
from hyperfast.nets import hyper_lstm_cell as cell_file
from hyperfast.nets import hyper_lstm_unroll as unroll_file
from hyperfast.nets.hyper_lstm_unroll import Unrolled
from hyperfast.plans.cpu import EXTENSION
from tests.support.draw import draw

# PyTorch's compiler and forward derivatives still use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

INS, HIDDEN, HYPER, NZ = 5, 6, 4, 3
GATES = "ifgo"
STEPS, BATCH = 4, 3
equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
norm_or_not = pytest.mark.parametrize("layer_norm", [True, False], ids=["norm", "plain"])


@pytest.fixture(params=["kernels", "plain"])
def way(request):
    """The C++ kernels, where they are built, and the steps in plain PyTorch."""
    with use_backend("reference") if request.param == "plain" else nullcontext():
        yield request.param


both_ways = pytest.mark.usefixtures("way")


def perturbed(module):
    """In fp64, no parameter where it starts: there, many derivatives are zero or alike."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(*p.shape, scale=0.5))
    return module


def make(num_layers=1, **options):
    options = {"hyper_size": HYPER, "n_z": NZ} | options
    return perturbed(HyperLSTM(INS, HIDDEN, num_layers, **options))


def start(*lead, grad=False):
    return tuple(draw(*lead, n, grad=grad) for n in (HIDDEN, HIDDEN, HYPER, HYPER))


def by_equation(cell, x, state, keep=1.0):
    """A step by equations 10 to 13 of Ha et al., a small linear layer for each gate and part."""
    h, c, h_hat, c_hat = state
    H, E, n = cell.hidden_size, cell.hyper_size, cell.n_z

    def rows(weight, gate, size, first=0):
        at = first + GATES.index(gate) * size
        return weight[at : at + size]

    def norm(name, y, gate):
        weight, bias = getattr(cell, f"{name}_weight"), getattr(cell, f"{name}_bias")
        if weight is None:
            return y
        row = "ifgoc".index(gate)
        return F.layer_norm(y, y.shape[-1:], weight[row], bias[row])

    hat = {}
    for y in GATES:  # (10)
        w_x_hat = torch.cat([rows(w, y, E, 4 * H) for w in (cell.weight_hh, cell.weight_ih)], 1)
        pre = F.linear(torch.cat([h, x], 1), w_x_hat, rows(cell.hyper_bias, y, E))
        pre = pre + F.linear(h_hat, rows(cell.hyper_weight_hh, y, E))
        hat[y] = norm("hyper_norm", pre, y)
    c_hat = hat["f"].sigmoid() * c_hat + hat["i"].sigmoid() * hat["g"].tanh()
    h_hat = hat["o"].sigmoid() * norm("hyper_norm", c_hat, "c").tanh()
    main = {}
    for number, y in enumerate(GATES):
        z_h = F.linear(h_hat, rows(cell.weight_z, y, n), rows(cell.bias_z, y, n))  # (11)
        z_x = F.linear(h_hat, rows(cell.weight_z, y, n, 4 * n), rows(cell.bias_z, y, n, 4 * n))
        z_b = F.linear(h_hat, rows(cell.weight_z, y, n, 8 * n))
        d_h, d_x = F.linear(z_h, cell.weight_d[number]), F.linear(z_x, cell.weight_d[4 + number])
        b = F.linear(z_b, cell.weight_d[8 + number], rows(cell.bias, y, H))  # (12)
        pre = d_h * F.linear(h, rows(cell.weight_hh, y, H))
        pre = pre + d_x * F.linear(x, rows(cell.weight_ih, y, H)) + b
        main[y] = norm("norm", pre, y)
    c = main["f"].sigmoid() * c + main["i"].sigmoid() * keep * main["g"].tanh()  # (13)
    return main["o"].sigmoid() * norm("norm", c, "c").tanh(), c, h_hat, c_hat


def reference(lstm, x, state, keep=None):
    """``(T, N, I)``, layer after layer, step after step."""
    ends = []
    for layer, cell in enumerate(lstm.layers):
        s, outputs = tuple(t[layer] for t in state), []
        for t, row in enumerate(x):
            s = by_equation(cell, row, s, 1.0 if keep is None else keep[t])
            outputs.append(s[0])
        x = torch.stack(outputs)
        ends.append(s)
    return x, tuple(map(torch.stack, zip(*ends, strict=True)))


def assert_same(ours, theirs, leaves):
    """Values of all tensors, and the gradients of the leaves by random ones of theirs."""
    for a, b in zip(ours, theirs, strict=True):
        equal(a, b)
    weights = [draw(*t.shape) for t in ours]
    found, wanted = (torch.autograd.grad(ts, leaves, weights) for ts in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0
        equal(a, b)


@both_ways
@norm_or_not
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_the_papers(layers, layer_norm):
    lstm = make(layers, layer_norm=layer_norm)
    x, hx = draw(STEPS, BATCH, INS, grad=True), start(layers, BATCH, grad=True)
    y, state = lstm(x, hx)
    expected, ends = reference(lstm, x, hx)
    assert_same([y, *state], [expected, *ends], [x, *hx, *lstm.parameters()])


@both_ways
def test_a_cell_is_a_step():
    cell = make().layers[0]
    x, hx = draw(BATCH, INS, grad=True), start(BATCH, grad=True)
    leaves = [x, *hx, *cell.parameters()]
    assert_same(cell(x, hx), by_equation(cell, x, hx), leaves)
    for one, all_ in zip(cell(x[1], [t[1] for t in hx]), cell(x, hx), strict=True):
        equal(one, all_[1])
    for ours, zeros in zip(cell(x), cell(x, [0 * t for t in hx]), strict=True):
        equal(ours, zeros)


@both_ways
@pytest.mark.parametrize("used", ["output", "h", "c", "hyper_h", "hyper_c"])
def test_each_result_has_its_own_gradient(used):
    """The derivative by hand is given none for what the loss does not use."""
    lstm = make()
    x, hx = draw(STEPS, BATCH, INS, grad=True), start(1, BATCH, grad=True)

    def gradients(y, state):
        one = {"output": y} | dict(zip(["h", "c", "hyper_h", "hyper_c"], state, strict=True))
        leaves = [x, *hx, *lstm.parameters()]
        loss = one[used].square().sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for a, b in zip(gradients(*lstm(x, hx)), gradients(*reference(lstm, x, hx)), strict=True):
        equal(a, b)


@both_ways
@norm_or_not
def test_gradcheck(layer_norm):
    lstm = perturbed(HyperLSTM(2, 3, hyper_size=2, n_z=2, layer_norm=layer_norm))
    names, parameters = zip(*lstm.named_parameters(), strict=True)
    given = draw(2, 2, 2, grad=True), *(draw(1, 2, n, grad=True) for n in (3, 3, 2, 2))

    def function(x, *rest):
        values = dict(zip(names, rest[4:], strict=True))
        y, state = torch.func.functional_call(lstm, values, (x, rest[:4]))
        return (y, *state)

    assert torch.autograd.gradcheck(function, (*given, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*given, *parameters), fast_mode=True)


@both_ways
def test_func_transforms_and_forward_derivatives():
    lstm, hx = make(), start(1, BATCH)
    x, tangent = draw(STEPS, BATCH, INS), draw(STEPS, BATCH, INS)

    def loss(x):
        return lstm(x, hx)[0].square().sum()

    grad = torch.func.grad(loss)(x)
    equal(grad, torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0])
    with forward_ad.dual_level():
        _, along = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent)))
    equal(along, (grad * tangent).sum())


LENGTHS = 2, 5, 1, 4


def ragged(grad=False):
    return [draw(n, INS, grad=grad) for n in LENGTHS]


@both_ways
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_packed_sequences_are_single_ones_in_a_loop(given):
    lstm, sequences = make(2), ragged(grad=True)
    hx = start(2, len(LENGTHS), grad=True) if given else None
    packed, state = lstm(pack_sequence(sequences, enforce_sorted=False), hx)
    assert isinstance(packed, PackedSequence)
    padded, lengths = pad_packed_sequence(packed)
    assert tuple(lengths) == LENGTHS
    ours, theirs = [], []
    for n, x in enumerate(sequences):
        y, end = lstm(x, None if hx is None else tuple(t[:, n] for t in hx))
        ours += [padded[: len(x), n], *(t[:, n] for t in state)]
        theirs += [y, *end]
    assert_same(ours, theirs, [*sequences, *(hx or ()), *lstm.parameters()])


@both_ways
def test_packed_in_order():
    lstm, sequences = make(), sorted(ragged(), key=len, reverse=True)
    packed = pack_sequence(sequences)
    y, state = lstm(packed)
    assert y.unsorted_indices is None
    equal(state[0][0], torch.stack([lstm(x)[0][-1] for x in sequences]))


@both_ways
def test_layouts():
    lstm, x, hx = make(), draw(STEPS, BATCH, INS), start(1, BATCH)
    y, state = lstm(x, hx)
    first = make(batch_first=True)
    first.load_state_dict(lstm.state_dict())
    y_first, state_first = first(x.transpose(0, 1), hx)
    equal(y_first.transpose(0, 1), y)
    single, end = lstm(x[:, 1], tuple(t[:, 1] for t in hx))
    equal(single, y[:, 1])
    for whole, other, one in zip(state, state_first, end, strict=True):
        equal(other, whole)
        equal(one, whole[:, 1])
    assert lstm(x[:, :0])[0].shape == (STEPS, 0, HIDDEN)


def test_shapes_are_those_of_nn_lstm():
    theirs = nn.LSTM(INS, HIDDEN, 2, batch_first=True).double()
    ours = make(2, batch_first=True)
    for x in (draw(BATCH, STEPS, INS), draw(STEPS, INS)):
        (a, (h, c)), (b, state) = theirs(x), ours(x)
        assert (a.shape, h.shape, c.shape) == (b.shape, *(t.shape for t in state[:2]))


def twice(tensors):
    return tuple(2 * t for t in tensors)


class Doubled(HyperLSTMCell):
    """A cell with a forward of its own."""

    def forward(self, *given):
        return twice(super().forward(*given))


def patch(cell):
    own = cell.forward
    cell.forward = lambda *given: twice(own(*given))


CHANGES = {
    "hook": lambda cell: cell.register_forward_hook(lambda _, given, made: twice(made)),
    "class": lambda cell: setattr(cell, "__class__", Doubled),
    "forward": patch,
}


@both_ways
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_does_beside_happens_at_every_step(change):
    lstm, sequences, hx = make(), ragged(grad=True), start(1, len(LENGTHS), grad=True)
    CHANGES[change](lstm.layers[0])
    packed, state = lstm(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(packed)
    ours, theirs = [], []
    for n, x in enumerate(sequences):
        own = tuple(t[0, n : n + 1] for t in hx)
        for t, row in enumerate(x):
            own = twice(by_equation(lstm.layers[0], row[None], own))
            ours.append(padded[t, n : n + 1])
            theirs.append(own[0])
        ours += [t[0, n : n + 1] for t in state]
        theirs += own
    assert_same(ours, theirs, [*sequences, *hx, *lstm.parameters()])


@both_ways
def test_a_pruned_layer_learns():
    """Pruning is a hook, which makes the weight anew."""
    lstm, x = make(), draw(STEPS, BATCH, INS)
    prune.l1_unstructured(lstm.layers[0], "weight_hh", 0.5)
    weight, before = lstm.layers[0].weight_hh_orig, lstm(x)[0]
    for _ in range(2):
        (slope,) = torch.autograd.grad(lstm(x)[0].square().sum(), weight)
        assert 0 < slope.count_nonzero() <= weight.numel() // 2
        weight.data -= 0.1 * slope
    assert not torch.allclose(lstm(x)[0], before)


def test_a_parametrised_layer_runs_all_steps_at_once(monkeypatch):
    lstm, x, calls = make(), draw(STEPS, BATCH, INS), []
    parametrizations.weight_norm(lstm.layers[0], "weight_hh")
    monkeypatch.setattr(cell_file, "unroll", lambda *a: calls.append(1) or unroll_file.unroll(*a))
    y, _ = lstm(x)
    assert len(calls) == 1
    lstm.layers[0].register_forward_hook(lambda *_: None)
    equal(lstm(x)[0], y)
    assert len(calls) == 1 + STEPS


@both_ways
def test_recurrent_dropout_drops_candidates(monkeypatch):
    lstm = make(recurrent_dropout=0.4)
    x, hx = draw(STEPS, BATCH, INS, grad=True), start(1, BATCH, grad=True)
    keep = F.dropout(torch.ones(STEPS, BATCH, HIDDEN).double(), 0.4)
    asked = []
    monkeypatch.setattr(F, "dropout", lambda t, p: asked.append(p) or keep.view_as(t))
    y, state = lstm(x, hx)
    assert asked == [0.4]
    expected, ends = reference(lstm, x, hx, keep)
    assert_same([y, *state], [expected, *ends], [x, *hx, *lstm.parameters()])
    equal(lstm.eval()(x, hx)[0], reference(lstm, x, hx)[0])


def test_dropout_is_between_layers():
    lstm, x = make(2, dropout=0.5), draw(STEPS, BATCH, INS)
    torch.manual_seed(1)
    y, state = lstm(x)
    first, second = (make() for _ in range(2))
    second = perturbed(HyperLSTM(HIDDEN, HIDDEN, hyper_size=HYPER, n_z=NZ))
    for one, cell in zip((first, second), lstm.layers, strict=True):
        one.layers[0].load_state_dict(cell.state_dict())
    torch.manual_seed(1)
    between = F.dropout(first(x)[0].flatten(0, 1), 0.5).view(STEPS, BATCH, HIDDEN)
    equal(y, second(between)[0])
    equal(state[0][1], y[-1])  # what is returned is not dropped
    equal(lstm.eval()(x)[0], second(first(x)[0])[0])
    with pytest.warns(UserWarning, match="between layers"):
        HyperLSTM(INS, HIDDEN, dropout=0.5)


def test_it_starts_as_the_paper_says():
    cell = HyperLSTMCell(INS, HIDDEN, hyper_size=HYPER, n_z=NZ).double()
    z = F.linear(draw(7, HYPER), cell.weight_z[: 8 * NZ], cell.bias_z)
    assert torch.equal(z, torch.ones_like(z))
    d = torch.bmm(z.view(7, 8, NZ).transpose(0, 1), cell.weight_d[:8].mT)
    equal(d, torch.full_like(d, 0.1), atol=1e-7)
    assert not cell.weight_d[8:].any()
    assert 0.005 < cell.weight_z[8 * NZ :].std() < 0.015
    assert not any(t.any() for t in (cell.bias, cell.hyper_bias, cell.norm_bias))
    main, hyper = 4 * HIDDEN, torch.cat([cell.weight_hh, cell.weight_ih], 1)[4 * HIDDEN :]
    groups = cell.weight_hh[:main], cell.weight_ih[:main], hyper, cell.hyper_weight_hh
    for gate in (gate for w in groups for gate in w.chunk(4)):
        w = gate if gate.shape[0] <= gate.shape[1] else gate.mT
        equal(w @ w.mT, torch.eye(len(w)).double(), atol=1e-6)


def test_state_dict_and_copies():
    lstm, other, x = make(2), make(2), draw(STEPS, BATCH, INS)
    assert other.load_state_dict(lstm.state_dict()) == ([], [])
    for again in (other, copy.deepcopy(lstm)):
        equal(again(x)[0], lstm(x)[0])
    assert "norm_weight" not in make(layer_norm=False).layers[0].state_dict()
    assert "4, n_z=3, layer_norm=True" in repr(lstm)


@both_ways
def test_backward_twice_and_freed():
    """What is kept for the derivative is freed by it, unless asked for again."""
    lstm, x = make(), draw(STEPS, BATCH, INS)
    loss = lstm(x)[0].square().sum()
    parameters = list(lstm.parameters())
    one, two = (torch.autograd.grad(loss, parameters, retain_graph=r) for r in (True, False))
    assert all(map(torch.equal, one, two))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_compiles_whole_and_exports(dynamo, tmp_path):
    cell = make().layers[0]
    x, hx = draw(BATCH, INS, grad=True), start(BATCH)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, hx), cell(x, hx), [x, *cell.parameters()])
    batch = torch.export.Dim("batch", min=2)
    shapes = {"input": {0: batch}, "hx": ({0: batch},) * 4}
    program = torch.export.export(cell, (x.detach(), hx), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "cell.pt2")
    again = torch.export.load(tmp_path / "cell.pt2")
    more, state = draw(7, INS), start(7)
    for a, b in zip(again.module()(more, state), cell(more, state), strict=True):
        equal(a, b)


def test_autocast():
    lstm, x = make().float(), draw(STEPS, BATCH, INS, dtype=torch.float32)
    exact = lstm(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = lstm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())


def packed(*sizes):
    """Five rows, packed as no sequences are."""
    return PackedSequence(torch.zeros(5, INS), torch.tensor(sizes))


X, HX = torch.zeros(STEPS, BATCH, INS), [torch.zeros(1, BATCH, n) for n in (6, 6, 4, 4)]
BAD = {
    "no steps": (ValueError, r"at least one step, got shape \(0, 3, 5\)", lambda m: m(X[:0])),
    "rank": (ValueError, r"shape \(T, N, I\) or \(T, I\), got \(5,\)", lambda m: m(X[0, 0])),
    **{
        f"packed {sizes}": (
            ValueError,
            rf"add up to the 5 rows of input.data, got \[{', '.join(map(str, sizes))}\]",
            lambda m, sizes=sizes: m(packed(*sizes)),
        )
        for sizes in ((2, 2), (2, 3), (6, -1), (5, 0))
    },
    "features": (ValueError, "must have 5 features, got 4", lambda m: m(X[..., :4])),
    "no tensor": (TypeError, "input must be a Tensor, got list", lambda m: m([1.0])),
    "dtype": (TypeError, "dtype of the cell's weight, torch.float32", lambda m: m(X.double())),
    "int": (TypeError, "input must be a floating-point tensor", lambda m: m(X.long())),
    "device": (ValueError, "input must be on the device of", lambda m: m(X.to("meta"))),
    "an LSTM's state": (ValueError, "hyper_c.*got 2 tensors", lambda m: m(X, HX[:2])),
    "state's batch": (ValueError, r"h must have shape \(1, 2, 6\)", lambda m: m(X[:, :2], HX)),
    "state's size": (
        ValueError,
        r"hyper_h must have shape \(1, 3, 4\), got \(1, 3, 6\)",
        lambda m: m(X, [*HX[:2], HX[0], HX[3]]),
    ),
    "state's dtype": (
        TypeError,
        "c must have the dtype",
        lambda m: m(X, [HX[0], HX[1].double(), *HX[2:]]),
    ),
    "cell's rank": (
        ValueError,
        r"shape \(N, 5\) or \(5,\), got \(4, 3, 5\)",
        lambda m: m.layers[0](X),
    ),
    "n_z": (ValueError, "n_z must be at least 1, got 0", lambda _: HyperLSTM(5, 6, n_z=0)),
    "hyper_size": (ValueError, "hyper_size must be", lambda _: HyperLSTM(5, 6, hyper_size=0)),
    "layers": (ValueError, "num_layers must be", lambda _: HyperLSTM(5, 6, 0)),
    "size": (TypeError, "hidden_size must be an int", lambda _: HyperLSTM(5, 6.0)),
    "dropout": (
        ValueError,
        r"dropout must be in \[0, 1\)",
        lambda _: HyperLSTM(5, 6, 2, dropout=1),
    ),
    "recurrent": (
        ValueError,
        r"recurrent_dropout must be in \[0, 1\), got -0.1",
        lambda _: HyperLSTM(5, 6, recurrent_dropout=-0.1),
    ),
    "dropout's type": (
        TypeError,
        "dropout must be a number",
        lambda _: HyperLSTM(5, 6, dropout="a"),
    ),
    **{
        name: (
            TypeError,
            f"{name} must be a bool, got 'yes'",
            lambda _, name=name: HyperLSTM(5, 6, **{name: "yes"}),
        )
        for name in ("batch_first", "bidirectional", "layer_norm")
    },
    "both ways": (ValueError, "one direction", lambda _: HyperLSTM(5, 6, bidirectional=True)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call(HyperLSTM(INS, HIDDEN, hyper_size=HYPER, n_z=NZ))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_and_device(dtype):
    net = HyperLSTM(3, 8, dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    gate = net.layers[0].weight_hh[:8].double()
    torch.testing.assert_close(gate @ gate.T, torch.eye(8).double(), atol=0.02, rtol=0)
    net = HyperLSTM(3, 8, 2, device="meta")
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert (net.input_size, net.hidden_size, net.hyper_size, net.n_z) == (3, 8, 2, 16)


@both_ways
def test_a_cell_that_is_called_twice():
    """Its weights enter twice, and each call has its own share of the second derivative."""
    cell = HyperLSTMCell(2, 2, hyper_size=1, n_z=1).double()
    names, values = zip(*cell.named_parameters(), strict=True)
    values = [draw(*v.shape, grad=True) for v in values]

    def twice(x, *values):
        call = partial(torch.func.functional_call, cell, dict(zip(names, values, strict=True)))
        return call((x, call((x,))))

    assert torch.autograd.gradgradcheck(twice, (draw(1, 2, grad=True), *values))


@both_ways
def test_gradients_of_many_at_once():
    net = HyperLSTM(3, 4, hyper_size=2, n_z=2).double()
    x = draw(3, 2, 3, grad=True)
    y, _ = net(x)
    grads = draw(5, *y.shape)
    found = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    vmapped = torch.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads)
    for n, g in enumerate(grads):
        wanted = torch.autograd.grad(y, x, g, retain_graph=True)[0]
        equal(found[n], wanted)
        equal(vmapped[n], wanted)


def test_no_step_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(Unrolled, "apply", None)
    with torch.no_grad():
        HyperLSTM(3, 4)(torch.randn(2, 1, 3))


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


PRODUCTS = "weight_ih", "weight_hh", "hyper_weight_hh", "weight_z"


@pytest.mark.parametrize("frozen", [*PRODUCTS, "weight_d", "bias", "norm_weight", "hyper_bias"])
def test_frozen_weights(frozen, way):
    """Their gradients are not made, and the others are as they were."""
    lstm, x = make(), draw(STEPS, BATCH, INS, grad=True)

    def train():
        names, parameters = zip(*lstm.named_parameters(), strict=True)
        wanted = {n: p for n, p in zip(names, parameters, strict=True) if p.requires_grad}
        loss = lstm(x)[0].square().sum()
        return dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()]), strict=True))

    whole, work = train(), flops(train)
    weight = lstm.layers[0].get_parameter(frozen).requires_grad_(False)
    rest, less = train(), flops(train)
    assert rest.keys() == whole.keys() - {f"layers.0.{frozen}"}
    assert all(torch.equal(g, whole[name]) for name, g in rest.items())
    skipped = frozen in PRODUCTS or (frozen == "weight_d" and way == "kernels" and EXTENSION)
    assert work - less == (2 * STEPS * BATCH * weight.numel() if skipped else 0)


@pytest.mark.skipif(EXTENSION is None, reason="compares the kernels with what runs without them")
def test_both_ways_count_the_same_products():
    lstm, x = make(2), draw(STEPS, BATCH, INS)
    with torch.no_grad():
        ours = flops(lambda: lstm(x))
        with use_backend("reference"):
            assert flops(lambda: lstm(x)) == ours > 0


class Other(torch.Tensor):
    """A subclass, whose own rules the kernels would not see."""


@pytest.mark.skipif(EXTENSION is None, reason="the kernels are not built")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_where_the_kernels_run(monkeypatch, training):
    calls = []
    run = hyper_lstm_cpu.run
    monkeypatch.setattr(hyper_lstm_cpu, "run", lambda *a, **k: calls.append(1) or run(*a, **k))

    def ran(x, context=nullcontext, call=lambda net, x: net(x)):
        calls.clear()
        net = HyperLSTM(3, 4, dtype=x.dtype).requires_grad_(training)
        with context():
            call(net, x)
        return bool(calls)

    x = torch.randn(2, 5, 3)
    assert ran(x)
    assert ran(x.double())
    assert ran(x, partial(use_backend, "cpp"))
    assert not ran(x.bfloat16())
    assert not ran(x, partial(use_backend, "reference"))
    assert not ran(x.as_subclass(Other))
    assert not ran(x, call=lambda net, x: torch.vmap(net, in_dims=1, out_dims=1)(x))
    assert not ran(x, partial(torch.autocast, "cpu", torch.bfloat16))


@pytest.mark.skipif(EXTENSION is None, reason="the kernels are not built")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_insisting_never_falls_back(training):
    x = torch.randn(2, 5, 3)
    message = "'cpp' has no kernel of hyper_lstm for such tensors: .* got x of torch."
    for bad, dtype in ((x.bfloat16(), "bfloat16"), (x.as_subclass(Other), "float32")):
        net = HyperLSTM(3, 4, dtype=bad.dtype).requires_grad_(training)
        with use_backend("cpp"), pytest.raises(RuntimeError, match=message + dtype):
            net(bad)


def test_autocast_is_off_inside(monkeypatch):
    """Where autocast takes single ops back to float32, as on CUDA, all has been cast before."""
    seen = []
    run = unroll_file.run

    def look(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return run(*args)

    monkeypatch.setattr(unroll_file, "run", look)
    net = HyperLSTM(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = net(torch.randn(2, 1, 3))
        y.sum().backward()
    assert seen == [False]
    assert y.dtype == torch.bfloat16
