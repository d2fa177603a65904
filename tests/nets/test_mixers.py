"""QMIX's mixer, against its formula and against the libraries that have it."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import hyperfast
from hyperfast.nets import QMixer
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from tests.support.draw import draw

# PyTorch's compiler imports modules of its own that still use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

AGENTS, STATE, EMBED, HYPER = 5, 11, 6, 7
equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
every_depth = pytest.mark.parametrize("layers", [1, 2])


needs_kernels = pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR or "built")


def make(layers=2):
    return QMixer(AGENTS, STATE, EMBED, hypernet_layers=layers, hypernet_embed=HYPER).double()


def inputs(*lead, grad=False):
    return draw(*lead, AGENTS, grad=grad), draw(*lead, STATE, grad=grad)


class Published(nn.Module):
    """Rashid et al. 2018, network by network: under pymarl's names, or those of pymarl2."""

    PYMARL = "hyper_w_1", "hyper_b_1", "hyper_w_final", "V"
    PYMARL2 = "hyper_w1", "hyper_b1", "hyper_w2", "hyper_b2"

    def __init__(self, layers, names=PYMARL):
        super().__init__()

        def net(*widths):
            linears = [nn.Linear(i, o) for i, o in zip((STATE, *widths), widths, strict=False)]
            return nn.Sequential(linears[0], nn.ReLU(), linears[1]) if linears[1:] else linears[0]

        through = (HYPER,) * (layers - 1)
        nets = [net(*through, AGENTS * EMBED), net(EMBED), net(*through, EMBED), net(EMBED, 1)]
        if names is self.PYMARL2:
            nets[1] = nn.Sequential(nets[1])
        for name, module in zip(names, nets, strict=True):
            self.add_module(name, module)
        self.double()

    def forward(self, agent_qs, states):
        w1, b1, w2, v = (net(states) for net in self.children())
        w1 = w1.abs().unflatten(-1, (AGENTS, EMBED))
        hidden = F.elu((agent_qs.unsqueeze(-2) @ w1).squeeze(-2) + b1)
        return (hidden * w2.abs()).sum(-1, keepdim=True) + v


def assert_same(ours, theirs, given, call=None):
    """Values, and the gradients of the inputs and of all parameters: those of theirs become ours by
    the same names as the parameters."""
    expected = theirs(*given) if call is None else call(*given)
    y = ours(*given)
    equal(y, expected)
    weight = draw(*y.shape)
    found = torch.autograd.grad(y, [*given, *ours.parameters()], weight)
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, [*given, *parameters], weight)
    ours_of_theirs = copy.deepcopy(ours)
    ours_of_theirs.load_state_dict(dict(zip(names, wanted[len(given) :], strict=True)))
    wanted = [*wanted[: len(given)], *(p.detach() for p in ours_of_theirs.parameters())]
    for a, b in zip(found, wanted, strict=True):
        equal(a, b)


@every_depth
@pytest.mark.parametrize("names", [Published.PYMARL, Published.PYMARL2])
@pytest.mark.parametrize("lead", [(3, 4), (9,), (1, 1), (2, 0)], ids=str)
def test_it_is_the_published_mixer(layers, names, lead):
    theirs, ours = Published(layers, names), make(layers)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    assert_same(ours, theirs, inputs(*lead, grad=True))


@pytest.fixture
def ops(monkeypatch):
    """The calls of the op that is the whole mixer."""
    seen, op = [], hyperfast.nets.mixers.mixer
    monkeypatch.setattr(hyperfast.nets.mixers, "mixer", lambda *a: seen.append(a) or op(*a))
    return seen


@needs_kernels
@pytest.mark.parametrize("lead", [(3, 4), (9,), (1, 1), (2, 0)], ids=str)
def test_one_op(lead, ops):
    theirs, ours = Published(2), make()
    ours.load_state_dict(theirs.state_dict())
    given = q, s = inputs(*lead, grad=True)
    weight = draw(*lead, 1)
    y, expected = ours(*given), theirs(*given)
    equal(y, expected)
    with torch.no_grad():
        equal(ours(q, s), expected)
    assert [keep for *_, keep in ops] == [True, False]
    found = torch.autograd.grad(y, [q, s, *ours.parameters()], weight)
    wanted = torch.autograd.grad(
        expected, [q, s, *map(theirs.get_parameter, ours.state_dict())], weight
    )
    for a, b in zip(found, wanted, strict=True):
        equal(a, b)


@needs_kernels
def test_one_op_where_nothing_else_is_asked_for(ops):
    mixer, (q, s) = make(), inputs(4)
    expected = Published.forward(ours_in_order(mixer), q, s)
    with hyperfast.use_backend("reference"):
        equal(mixer(q, s), expected)
    mixer.V = nn.Sequential(nn.Linear(STATE, 9), nn.ReLU(), nn.Linear(9, 1)).double()
    equal(mixer(q, s), Published.forward(ours_in_order(mixer), q, s))
    assert not ops
    with hyperfast.use_backend("cpp"):
        make()(q, s)
    assert ops


@needs_kernels
@pytest.mark.parametrize("wanted", [*product([True, False], repeat=3)], ids=str)
def test_no_gradient_is_made_that_is_not_wanted(wanted, ops, monkeypatch):
    """As of a frozen mixer, of values that are learned elsewhere, or of states that are made."""
    masks, op = [], hyperfast.nets.mixers.mixer_backward
    monkeypatch.setattr(
        hyperfast.nets.mixers, "mixer_backward", lambda *a: masks.append(a[-1]) or op(*a)
    )
    mixer = make().requires_grad_(wanted[2])
    given = [t.requires_grad_(want) for t, want in zip(inputs(4), wanted, strict=False)]
    leaves = [t for t in (*given, *mixer.parameters()) if t.requires_grad]
    y, expected = mixer(*given), Published.forward(ours_in_order(mixer), *given)
    equal(y, expected)
    assert len(ops) == 1
    if leaves:
        for a, b in zip(
            *(torch.autograd.grad(v.square().sum(), leaves) for v in (y, expected)), strict=True
        ):
            equal(a, b)
    assert masks == [wanted] * bool(leaves)


@needs_kernels
def test_derivatives_of_one_op(ops):
    mixer = make()
    q, s = inputs(3, grad=True)
    names = [name for name, _ in mixer.named_parameters()]

    def run(q, s, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (q, s))

    given = q, s, *(p.detach().clone().requires_grad_() for p in mixer.parameters())
    assert torch.autograd.gradcheck(run, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, given)
    assert ops


@every_depth
def test_the_state_dict_is_pymarls(layers):
    ours, theirs = make(layers).state_dict(), Published(layers).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_names_within_another_module():
    """A learner holds the mixer and its target; what is not the mixer's is reported under its own
    name."""
    theirs = nn.ModuleDict({"mixer": Published(2, Published.PYMARL2)})
    ours = nn.ModuleDict({"mixer": make()})
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert "mixer.hyper_w1.0.weight" in state  # the caller's dict is left as it is
    with pytest.raises(RuntimeError, match=r"mixer\.hyper_w3"):
        ours.load_state_dict(state | {"mixer.hyper_w3": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"mixer\.hyper_b_1\.weight"):
        ours.load_state_dict({k: v for k, v in state.items() if "hyper_b1.0.weight" not in k})


def test_torchrl():
    models = pytest.importorskip("torchrl.modules.models.multiagent")
    theirs = models.QMixer((STATE,), EMBED, AGENTS, "cpu").double()
    ours = make(1)
    ours.load_state_dict(theirs.state_dict())
    call = lambda q, s: theirs(q.unsqueeze(-1), s)  # noqa: E731
    assert_same(ours, theirs, inputs(3, 4, grad=True), call)


@every_depth
def test_gradcheck(layers):
    mixer, given = make(layers), inputs(3, grad=True)
    assert torch.autograd.gradcheck(mixer, given)
    assert torch.autograd.gradgradcheck(mixer, given)


def test_it_is_monotonic():
    q, s = inputs(64, grad=True)
    (slope,) = torch.autograd.grad(make()(q, s).sum(), q)
    assert (slope >= 0).all()
    assert slope.max() > 0


@pytest.fixture
def calls(monkeypatch):
    """How many times W1 was generated by an op."""
    seen = []
    mixers = hyperfast.nets.mixers

    def counted(op):
        return lambda *a, **k: seen.append(1) or op(*a, **k)

    for name in ("hyper_linear", "mixer"):
        monkeypatch.setattr(mixers, name, counted(getattr(mixers, name)))
    return seen


def hook(net):
    net.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = {
    "hook": lambda m: hook(m.hyper_w_1),
    "hook on a layer": lambda m: hook(m.hyper_w_final[0]),
    "hook on an activation": lambda m: hook(m.V[1]),
    "parametrised": lambda m: parametrizations.weight_norm(m.hyper_b_1),
    "another activation": lambda m: m.hyper_w_1.__setitem__(1, nn.Tanh()),
    "deeper": lambda m: m.V.append(nn.Softplus()),
    "no bias": lambda m: m.hyper_w_1[0].register_parameter("bias", None),
    "forward of an activation": lambda m: vars(m.V[1]).update(forward=torch.tanh),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_runs_as_it_is_written(change, calls):
    ours, given = make(), inputs(7, grad=True)
    before = ours(*given)
    assert calls
    calls.clear()
    CHANGES[change](ours)
    y = ours(*given)
    assert not calls
    equal(y, Published.forward(ours_in_order(ours), *given))
    if change != "parametrised":
        assert not torch.allclose(y, before)


def test_a_patched_activation_runs_as_it_is_written(calls, monkeypatch):
    ours, given = make(), inputs(7)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, h: torch.tanh(h))
    equal(ours(*given), Published.forward(ours_in_order(ours), *given))
    assert not calls


def ours_in_order(ours):
    """Its networks in the order of the specification."""
    order = nn.Module()
    for name in Published.PYMARL:
        order.add_module(name, getattr(ours, name))
    return order


@every_depth
def test_compile_without_a_break(layers, dynamo):
    mixer, given = make(layers), inputs(3, 4, grad=True)
    assert_same(mixer, mixer, given, torch.compile(mixer, fullgraph=True, backend="aot_eager"))


@every_depth
def test_export(layers):
    mixer, given = make(layers), inputs(3, 4)
    batch = torch.export.Dim("batch")
    program = torch.export.export(mixer, given, dynamic_shapes=({0: batch}, {0: batch}))
    more = inputs(5, 4)
    equal(program.module()(*more), mixer(*more))


def test_autocast():
    mixer = make().float()
    q, s = (t.float() for t in inputs(64))
    exact = mixer(q, s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = mixer(q, s), Published.forward(ours_in_order(mixer), q, s)
    error, other = ((t.float() - exact).abs().max() for t in (y, plain))
    assert 0 < error <= 2 * other + 2**-7 * exact.abs().max()


def test_vmap_over_an_ensemble():
    mixers, (q, s) = [make() for _ in range(3)], inputs(4)
    stacked, _ = torch.func.stack_module_state(mixers)
    run = lambda p: torch.func.functional_call(mixers[0], p, (q, s))  # noqa: E731
    equal(torch.vmap(run)(stacked), torch.stack([m(q, s) for m in mixers]))


@every_depth
def test_dtype_and_device(layers):
    mixer = QMixer(3, 4, hypernet_layers=layers, device="meta", dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in mixer.parameters()} == {(torch.float64, "meta")}


def test_copies():
    mixer, given = make(), inputs(4)
    for again in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        equal(again(*given), mixer(*given))
        again.load_state_dict(Published(2, Published.PYMARL2).state_dict())


class TestBadInput:
    @pytest.mark.parametrize(
        "shapes",
        [((4, 6), (4, 11)), ((4, 5), (4, 10)), ((4, 5), (3, 11)), ((4, 5), (4, 1, 11)), ((), ())],
        ids=str,
    )
    def test_shapes(self, shapes):
        q, s = (draw(*shape) for shape in shapes)
        with pytest.raises(ValueError, match=r"agent_qs and states.*\(\.\.\., 5\).*\(\.\.\., 11\)"):
            make()(q, s)

    @pytest.mark.parametrize("name", ["hyper_b_1", "hyper_w_1.0", "hyper_w_final.0", "V.0"])
    def test_a_layer_that_reads_other_states(self, name):
        mixer = make()
        before = mixer.get_submodule(name)
        mixer.set_submodule(name, nn.Linear(STATE + 1, before.out_features).double())
        shape = rf"\({before.out_features}, {STATE + 1}\)"
        with pytest.raises(ValueError, match=rf"layers must read states of {STATE}.*{shape}"):
            mixer(*inputs(4))

    def test_dtypes(self):
        q, s = inputs(4)
        for args, message in (
            ((q.float(), s), "states must have the dtype of agent_qs"),
            ((q, s.long()), "states must be a floating-point tensor"),
            ((q.float(), s.float()), "states must have the dtype of the mixer's weight, .*64"),
            ((q, None), "states must be a Tensor, got NoneType"),
        ):
            with pytest.raises(TypeError, match=message):
                make()(*args)

    @pytest.mark.parametrize("name", ["n_agents", "state_dim", "embed_dim", "hypernet_embed"])
    def test_sizes(self, name):
        sizes = {"n_agents": 3, "state_dim": 4}
        with pytest.raises(ValueError, match=name):
            QMixer(**sizes | {name: 0})
        with pytest.raises(TypeError, match=name):
            QMixer(**sizes | {name: 2.5})

    def test_layers(self):
        with pytest.raises(ValueError, match="hypernet_layers must be 1 or 2, got 3"):
            QMixer(3, 4, hypernet_layers=3)
        for layers in (2.0, True):
            with pytest.raises(TypeError, match="hypernet_layers must be an int"):
                QMixer(3, 4, hypernet_layers=layers)
