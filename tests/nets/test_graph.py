"""The edge-conditioned convolution, against its formula and against PyTorch Geometric."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import hyperfast
from hyperfast.nets import NNConv
from tests.support.draw import draw

# PyTorch's compiler imports modules of its own that still use torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

INS, OWN, OUT, FEATURES, NODES, EDGES = 4, 3, 5, 6, 7, 40
equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


class Embedded(nn.Module):
    """A network of edges that is no ``nn.Sequential``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, INS * OUT)

    def forward(self, e):
        return self.layer(e).sin().view(-1, INS, OUT)


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, INS * OUT)),
    "normalised trunk": lambda: nn.Sequential(
        nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, INS * OUT, bias=False)
    ),
    "linear": lambda: nn.Linear(FEATURES, INS * OUT),
    "another module": Embedded,
    "ends in no linear layer": lambda: nn.Sequential(nn.Linear(FEATURES, INS * OUT), nn.Softplus()),
}
every_net = pytest.mark.parametrize("net", NETS)
every_aggr = pytest.mark.parametrize("aggr", ["add", "mean"])


def make(net="mlp", aggr="add", channels=INS, **options):
    conv = NNConv(channels, OUT, NETS[net](), aggr, **options).double()
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    return conv


def graph(nodes=NODES, edges=EDGES, grad=True):
    """Features of nodes and edges; the last node has no edges."""
    index = torch.randint(max(nodes - 1, 1), (2, edges))
    return draw(nodes, INS, grad=grad), index, draw(edges, FEATURES, grad=grad)


def published(conv, x, edge_index, edge_attr):
    """Gilmer et al. 2017: edge by edge, node by node."""
    source, own = (x, x) if isinstance(x, torch.Tensor) else x
    origin, to = edge_index
    matrices = conv.nn(edge_attr).reshape(-1, INS, OUT)
    messages = torch.einsum("ei,eio->eo", source[origin], matrices)
    rows = []
    for n in range(len(own)):
        mine = messages[to == n]
        total = mine.sum(0)
        rows.append(total / max(len(mine), 1) if conv.aggr == "mean" else total)
    y = torch.stack(rows)
    y = y if conv.lin is None else y + own @ conv.lin.weight.T
    return y if conv.bias is None else y + conv.bias


def assert_same(run, expected, conv, *args):
    """Values and all gradients."""
    y, wanted = run(*args), expected(*args)
    equal(y, wanted)
    x = args[0] if isinstance(args[0], tuple) else (args[0],)
    where = [*x, args[2], *conv.parameters()]
    weight = draw(*y.shape)
    for a, b in zip(*(torch.autograd.grad(t, where, weight) for t in (y, wanted)), strict=True):
        equal(a, b)


@every_net
@every_aggr
@pytest.mark.parametrize("options", [{}, {"root_weight": False, "bias": False}], ids=str)
def test_it_is_the_published_layer(net, aggr, options):
    conv = make(net, aggr, **options)
    assert_same(conv, partial(published, conv), conv, *graph())


@every_aggr
@pytest.mark.parametrize("size", [(1, 1), (1, 0), (3, 2), (2, 63), (63, 3)], ids=str)
def test_sizes(aggr, size):
    conv = make(aggr=aggr)
    assert_same(conv, partial(published, conv), conv, *graph(*size))


@every_net
def test_sources_and_destinations(net):
    conv = make(net, channels=(INS, OWN))
    x = draw(NODES, INS, grad=True), draw(2, OWN, grad=True)
    index = torch.stack([torch.randint(NODES, (EDGES,)), torch.randint(2, (EDGES,))])
    edge_attr = draw(EDGES, FEATURES, grad=True)
    assert_same(conv, partial(published, conv), conv, x, index, edge_attr)


def test_a_pair_may_be_a_list():
    conv, (x, index, e) = make(channels=(INS, OWN)), graph()
    own = draw(NODES, OWN)
    equal(conv([x, own], index, e), conv((x, own), index, e))


def test_destinations_without_features():
    """As PyTorch Geometric has it: as many as sources, and no weight of their own."""
    conv, (x, index, e) = make(), graph()
    y = conv((x, None), index, e)
    equal(y, published(conv, (x, torch.zeros_like(x)), index, e))
    theirs = pytest.importorskip("torch_geometric.nn").NNConv(INS, OUT, NETS["mlp"]()).double()
    theirs.load_state_dict(conv.state_dict())
    equal(y, theirs((x, None), index, e))


@every_net
@every_aggr
@pytest.mark.parametrize("options", [{}, {"root_weight": False, "bias": False}], ids=str)
def test_pytorch_geometric(net, aggr, options):
    theirs = pytest.importorskip("torch_geometric.nn").NNConv
    theirs, ours = (
        theirs(INS, OUT, NETS[net](), aggr, **options).double(),
        make(net, aggr, **options),
    )
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    args = graph()
    y, wanted = ours(*args), theirs(*args)
    equal(y, wanted)
    weight = draw(*y.shape)
    found = torch.autograd.grad(y, [args[0], args[2], *ours.parameters()], weight)
    names = dict(theirs.named_parameters())
    theirs = [names[name] for name, _ in ours.named_parameters()]
    for a, b in zip(
        found, torch.autograd.grad(wanted, [args[0], args[2], *theirs], weight), strict=True
    ):
        equal(a, b)


@pytest.mark.parametrize("net", ["mlp", "another module"])
def test_gradcheck(net):
    conv, (x, index, e) = make(net, "mean"), graph(3, 5)
    run = lambda x, e: conv(x, index, e)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, e))
    assert torch.autograd.gradgradcheck(run, (x, e))


@pytest.fixture
def calls(monkeypatch):
    """How many times the head was fused."""
    seen = []
    module = hyperfast.nets.graph
    fused = module.generated_linear
    monkeypatch.setattr(
        module, "generated_linear", lambda *a, **k: seen.append(1) or fused(*a, **k)
    )
    return seen


@pytest.mark.parametrize(("net", "fused"), [*zip(NETS, [1, 1, 1, 0, 0], strict=True)])
def test_what_is_fused(net, fused, calls):
    make(net)(*graph())
    assert len(calls) == fused


@pytest.mark.parametrize("which", [None, 0, 2], ids=["network", "trunk", "head"])
def test_hooks_run(which, calls):
    conv, args = make(), graph()
    before = conv(*args)
    module = conv.nn if which is None else conv.nn[which]
    module.register_forward_hook(lambda module, args, out: 2 * out)
    calls.clear()
    y = conv(*args)
    equal(y, published(conv, *args))
    assert not torch.allclose(y, before)
    assert len(calls) == (which == 0)  # a hook on the trunk leaves the head as it is


def test_no_edge_has_a_matrix_of_its_own():
    """100 edges a node: neither forward nor backward holds a tensor of all the edges' matrices."""
    conv, (x, index, e) = make(), graph(20, 2000)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out)
                        if isinstance(t, torch.Tensor))  # fmt: skip
            return out

    with Watch():
        conv(x, index, e).sum().backward()
    assert max(seen) < 2000 * INS * OUT


def test_compile_without_a_break(dynamo):
    for net in ("mlp", "another module"):
        conv, args = make(net, "mean"), graph()
        assert_same(torch.compile(conv, fullgraph=True, backend="aot_eager"), conv, conv, *args)


def test_export():
    conv, args = make(aggr="mean"), graph(grad=False)
    program = torch.export.export(conv, args)
    more = graph(grad=False)
    equal(program.module()(*more), conv(*more))


def test_sizes_stay_dynamic(dynamo):
    conv, counter = make(aggr="mean"), CompileCounter()
    compiled = torch.compile(conv, fullgraph=True, backend=counter)
    for nodes, edges in ((10, 30), (12, 40), (13, 55), (20, 60), (21, 64)):
        args = graph(nodes, edges, grad=False)
        equal(compiled(*args), conv(*args))
    assert counter.frame_count <= 2
    nodes, edges = torch.export.Dim("nodes", min=2), torch.export.Dim("edges", min=2)
    sizes = {0: nodes}, {1: edges}, {0: edges}
    program = torch.export.export(conv, graph(9, 30, grad=False), dynamic_shapes=sizes)
    for args in (graph(2, 3, grad=False), graph(50, 900, grad=False)):
        equal(program.module()(*args), conv(*args))


def test_autocast():
    conv, (x, index, e) = make().float(), graph(grad=False)
    x, e = x.float(), e.float()
    exact = conv(x, index, e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = conv(x, index, e), published(conv, x, index, e)
    error, other = ((t.float() - exact).abs().max() for t in (y, plain))
    assert 0 < error <= 2 * other + 2**-7 * exact.abs().max()


def test_vmap_over_features_and_parameters():
    convs, (x, index, e) = [make() for _ in range(3)], graph(grad=False)
    stacked, _ = torch.func.stack_module_state(convs)
    many = draw(3, *x.shape)
    run = lambda p, x: torch.func.functional_call(convs[0], p, (x, index, e))  # noqa: E731
    equal(
        torch.vmap(run)(stacked, many),
        torch.stack([conv(x, index, e) for conv, x in zip(convs, many, strict=True)]),
    )


def test_dtype_and_device():
    conv = NNConv((INS, OWN), OUT, nn.Identity(), device="meta", dtype=torch.float64)
    assert [(p.dtype, p.device.type) for p in conv.parameters()] == [(torch.float64, "meta")] * 2


def test_a_bias_of_another_dtype():
    """It is added as PyTorch adds numbers; no weight of the layer reads ``x``."""
    conv, given = make(root_weight=False), graph()
    conv.bias.data = conv.bias.data.float()
    y = conv(*given)
    equal(y, conv.double()(*given))


def test_reset_parameters():
    conv = make()
    before = copy.deepcopy(conv.state_dict())
    conv.reset_parameters()
    after = conv.state_dict()
    assert (after.pop("bias") == 0).all()
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]


class TestBadInput:
    @pytest.mark.parametrize("row", [0, 1])
    @pytest.mark.parametrize("bad", [-1, NODES, 2**62])
    def test_nodes_that_are_not_there(self, row, bad):
        x, index, e = graph()
        index[row, 3] = bad
        with pytest.raises(
            IndexError, match=rf"edge_index\[{row}\] must be in \[0, 7\), got {bad}"
        ):
            make()(x, index, e)

    def test_shapes(self):
        x, index, e = graph()
        for args, name in (
            ((x[:, :3], index, e), r"x must have shape \(V, 4\), got \(7, 3\)"),
            ((x[0], index, e), r"x must have shape \(V, 4\), got \(4,\)"),
            (((x, x, x), index, e), "x must be a Tensor or a pair of them, got 3 of them"),
            (([x], index, e), "x must be a Tensor or a pair of them, got 1 of them"),
            ((x, index[0], e), r"edge_index must have shape \(2, E\), got \(40,\)"),
            ((x, index.T, e), r"edge_index must have shape \(2, E\), got \(40, 2\)"),
            ((x, index[:, :9], e), r"edge_attr must have 9 rows, one an edge.*\(40, 6\)"),
            ((x, index, e[:, :5]), r"edge_attr must have shape \(E, 6\).*got \(40, 5\)"),
            ((x, index, e[:, 0]), r"edge_attr must have shape \(E, 6\).*got \(40,\)"),
            ((x, index, e.to("meta")), "edge_attr must be on the device of nn's weight"),
            (((x, x.to("meta")), index, e), "x must be on the device of the layer's weight"),
        ):
            with pytest.raises(ValueError, match=name):
                make()(*args)

    def test_types(self):
        x, index, e = graph()
        for args, name in (
            ((x, index.int(), e), "edge_index"),
            ((x, [[0], [1]], e), "edge_index"),
            ((x, index, None), "edge_attr must be a Tensor, got NoneType"),
            ((x, index, e.float()), "edge_attr must have the dtype of nn's weight"),
            ((x, index, e.long()), "edge_attr must be a floating-point tensor, got torch.int64"),
            ((x.float(), index, e), "x must have the dtype of the layer's weight"),
            (((x, x.float()), index, e), "x must have the dtype of the layer's weight"),
            (((x, "no"), index, e), "x must be a Tensor"),
        ):
            with pytest.raises(TypeError, match=name):
                make()(*args)
        with pytest.raises(TypeError, match="x must have the dtype of nn's weight"):
            make(root_weight=False, bias=False)(x.float(), index, e)

    @pytest.mark.parametrize("width", [INS * OUT - 1, 2 * INS * OUT, INS])
    @pytest.mark.parametrize("last", [nn.Identity, nn.Tanh])
    def test_another_width(self, width, last):
        net = nn.Sequential(nn.Linear(FEATURES, width), last())
        net = net[:1] if last is nn.Identity else net
        with pytest.raises(ValueError, match=rf"nn must return shape \(40, 20\).*\(40, {width}\)"):
            NNConv(INS, OUT, net).double()(*graph())

    def test_another_number_of_edges(self):
        class Half(nn.Module):
            def forward(self, e):
                return e[::2].repeat(1, 4)[:, : INS * OUT]

        with pytest.raises(ValueError, match=r"nn must return shape \(40, 20\).*got \(20, 20\)"):
            NNConv(INS, OUT, Half()).double()(*graph())

    def test_options(self):
        for aggr in ("max", ["add"], None):
            with pytest.raises(ValueError, match="aggr must be one of"):
                NNConv(INS, OUT, nn.Identity(), aggr)
        with pytest.raises(ValueError, match=r"in_channels must be .* a pair of them, got \(4,\)"):
            NNConv((INS,), OUT, nn.Identity())
        with pytest.raises(TypeError, match="nn must be a module, got NoneType"):
            NNConv(INS, OUT, None)
        for name in ("root_weight", "bias"):
            with pytest.raises(TypeError, match=f"{name} must be a bool, got 'no'"):
                NNConv(INS, OUT, nn.Identity(), **{name: "no"})
        with pytest.raises(ValueError, match="in_channels"):
            NNConv((INS, 0), OUT, nn.Identity())
        with pytest.raises(TypeError, match="out_channels"):
            NNConv(INS, 2.5, nn.Identity())
