"""Layers that people compose: every option says what it computes in plain PyTorch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations

import hyperfast
from hyperfast import HyperLinear, TaskLinear
from hyperfast.layout import TRANSFORMS
from tests.support.budget import close
from tests.support.draw import draw

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]

B, N, INS, OUTS, K = 4, 3, 5, 2, 6
F64 = {"dtype": torch.float64}


def stir(module):
    """Every parameter random: none is at its start, where some are zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(*p.shape, scale=0.5))
    return module


def formula(layer, h):
    """Matrix and bias of every task, from the head's rows in their documented order."""
    made, flat = layer.layer, layer.head(h)
    if made.rank is None:
        shape = (OUTS, INS) if made.layout == "oi" else (INS, OUTS)
        w, rest = flat[:, : OUTS * INS].unflatten(1, shape), flat[:, OUTS * INS :]
        w = w if made.layout == "oi" else w.transpose(1, 2)
        if made.transform is not None:
            w = TRANSFORMS[made.transform].value(w)
    else:
        r = made.rank
        a, b, rest = flat.split([r * INS, OUTS * r, flat.shape[1] - r * (INS + OUTS)], 1)
        if made.layout == "oi":
            w = b.view(-1, OUTS, r) @ a.view(-1, r, INS)
        else:
            w = (a.view(-1, INS, r) @ b.view(-1, r, OUTS)).transpose(1, 2)
    c = rest if made.bias == "generated" else torch.zeros(len(h), OUTS, **F64)
    if layer.bias is not None:
        c = c + layer.bias
    if layer.base is not None:
        w = w + layer.base.weight
        c = c if layer.base.bias is None else c + layer.base.bias
    return w, c


def same(run, expected, *leaves):
    """Values and every gradient."""
    y, wanted = run(), expected()
    close(y, wanted)
    grad = draw(*y.shape)
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        close(mine, theirs)


OPTIONS = [
    {"bias": bias, "layout": layout, **more}
    for bias, layout, more in product(
        ["generated", "shared", None],
        ["oi", "io"],
        [{}, {"rank": 2}, {"base": True}, {"rank": 1, "base": True}, {"head_bias": False}],
    )
] + [
    {"transform": transform, "layout": layout, "bias": bias}
    for transform, layout, bias in product(TRANSFORMS, ["oi", "io"], ["generated", "shared"])
]


@pytest.mark.parametrize(("word", "same"), [(True, "generated"), (False, None)])
def test_a_bias_in_the_words_of_a_linear_layer(word, same):
    layer, other = (HyperLinear(INS, OUTS, K, bias=bias) for bias in (word, same))
    assert layer.layer == other.layer
    other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_its_formula(options):
    layer = stir(HyperLinear(INS, OUTS, K, **options, **F64))
    h, ids = draw(B, K, grad=True), torch.tensor([2, 0, 2, 2, 1])  # task 3 has no rows
    leaves = [h, *layer.parameters()]
    w, c = layer.weights(h)
    wanted, constant = formula(layer, h)
    close(w, wanted)
    close(torch.zeros_like(constant) if c is None else c.expand_as(constant), constant)
    for rows, task_ids in (((B, N, INS), None), ((B, INS), None), ((5, INS), ids)):
        x = draw(*rows, grad=True)

        def by_hand(x=x, task_ids=task_ids):
            w, c = formula(layer, h)
            if task_ids is not None:
                return torch.einsum("roi,ri->ro", w[task_ids], x) + c[task_ids]
            y = torch.einsum("boi,b...i->b...o", w, x)
            return y + (c if x.ndim == 2 else c.unsqueeze(1))

        same(lambda x=x, task_ids=task_ids: layer(x, h, task_ids), by_hand, x, *leaves)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("rows", [(), (N,)], ids=["one row", "rows"])
def test_tasks_of_any_leading_shape(lead, rows):
    layer = stir(HyperLinear(INS, OUTS, K, **F64))
    h, x = draw(*lead, K), draw(*lead, *rows, INS)
    w, c = layer.weights(h)
    c = c if not rows else c.unsqueeze(-2)
    y = layer(x, h)
    assert y.shape == (*lead, *rows, OUTS)
    close(
        y, torch.einsum("...oi,...ni->...no", w, x) + c if rows else (w @ x[..., None])[..., 0] + c
    )
    if rows:
        shared = draw(*[1] * len(lead), N, INS)
        close(layer(shared, h), torch.einsum("...oi,...ni->...no", w, shared) + c)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "shared"}, {"bias": None, "layout": "io"}, {"rank": 2}, {"base": True},
     {"transform": "abs"}, {"head_bias": False}],
    ids=str,
)  # fmt: skip
def test_rows_are_added_up_by_destination(options, reduce):
    layer = stir(HyperLinear(INS, OUTS, K, **options, **F64))
    rows, count = 17, 6
    index = torch.tensor([0, 4, 4, 1, 4, 1, 0, 0, 4, 4, 4, 2, 4, 1, 1, 0, 4])  # 3 and 5 have none
    degree = index.bincount(minlength=count).clamp(min=1).unsqueeze(1)

    def added(y):
        y = torch.zeros(count, OUTS, **F64).index_add(0, index, y.reshape(rows, OUTS))
        return y / degree if reduce == "mean" else y

    x, h, ids = draw(rows, INS, grad=True), draw(rows, K, grad=True), torch.randint(3, (rows,))
    leaves = [x, h, *layer.parameters()]
    by = {"index": index, "dim_size": count, "reduce": reduce}
    same(lambda: layer(x, h, **by), lambda: added(layer(x, h)), *leaves)
    same(lambda: layer(x, h[:3], ids, **by), lambda: added(layer(x, h[:3], ids)), *leaves)
    few, several = h[:1], x[None]
    by["index"] = index[None]
    same(lambda: layer(several, few, **by), lambda: added(layer(several, few)), *leaves)
    assert len(layer(x, h, index=index)) == int(index.max()) + 1


@pytest.mark.parametrize("options", [{}, {"bias": "shared", "layout": "io"}, {"rank": 1}], ids=str)
def test_rows_that_all_tasks_share_are_projected(options):
    layer = stir(HyperLinear(INS, OUTS, K, **options, **F64))
    x, h = draw(1, N, INS, grad=True), draw(50, K, grad=True)
    copies = lambda: layer(x.expand(50, -1, -1).clone(), h)  # noqa: E731
    same(lambda: layer(x, h), copies, x, h, *layer.parameters())


def test_no_rows_no_tasks_no_destinations():
    layer = HyperLinear(INS, OUTS, K)
    assert layer(torch.randn(0, INS), torch.randn(0, K)).shape == (0, OUTS)
    assert layer(torch.randn(4, 0, INS), torch.randn(4, K)).shape == (4, 0, OUTS)
    none = torch.zeros(0, dtype=torch.int64)
    y = layer(torch.randn(0, INS), torch.randn(0, K), index=none, dim_size=3, reduce="mean")
    assert torch.equal(y, torch.zeros(3, OUTS))
    assert layer(torch.randn(0, INS), torch.randn(0, K), index=none).shape == (0, OUTS)


@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("rows", [4, 50])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"base": True}, {"transform": "abs"}], ids=str
)
def test_rows_that_all_tasks_share_are_added_up_for_all(options, rows, lead):
    layer = stir(HyperLinear(INS, OUTS, K, **options, **F64))
    x, h, index = draw(rows, INS, grad=True), draw(*lead, K, grad=True), torch.randint(4, (rows,))
    one, copies = (1,) * len(lead), x.expand(*lead, rows, INS).clone()
    for reduce in ("sum", "mean"):
        by = {"dim_size": 5, "reduce": reduce}
        same(
            lambda by=by: layer(x.view(*one, rows, INS), h, index=index.view(*one, rows), **by),
            lambda by=by: layer(copies, h, index=index.expand(*lead, rows), **by),
            *(h, *layer.parameters()),
        )


def test_destinations_may_differ_from_call_to_call_of_vmap():
    layer, index = HyperLinear(INS, OUTS, K, **F64), torch.randint(3, (2, B))
    x, h = draw(2, B, INS), draw(2, B, K)
    summed = torch.vmap(lambda x, h, index: layer(x, h, index=index, dim_size=3))(x, h, index)
    for n in range(2):
        close(summed[n], layer(x[n], h[n], index=index[n], dim_size=3))


def test_sums_of_tensors_without_data():
    layer = HyperLinear(INS, OUTS, K, device="meta")
    x, h = torch.randn(B, INS, device="meta"), torch.randn(B, K, device="meta")
    index = torch.zeros(B, dtype=torch.int64, device="meta")
    assert layer(x, h, index=index, dim_size=7).shape == (7, OUTS)


def test_sums_are_the_same_in_every_run():
    layer, index = HyperLinear(INS, OUTS, K), torch.randint(7, (300,))
    x, h = torch.randn(300, INS), torch.randn(300, K)
    first = layer(x, h, index=index, dim_size=7)
    assert all(torch.equal(first, layer(x, h, index=index, dim_size=7)) for _ in range(5))


GRADCHECKED = [
    {"layout": "io"}, {"bias": "shared"}, {"rank": 1, "bias": None}, {"base": True},
    *({"transform": t} for t in ("abs", "softplus", "exp", "square")),
]  # fmt: skip


@pytest.mark.parametrize("by", [None, "index", "shared"], ids=str)
@pytest.mark.parametrize("options", GRADCHECKED, ids=str)
def test_derivatives(options, by):
    layer = stir(HyperLinear(2, 3, 2, **options, **F64))
    x, h = draw(4, 2, grad=True), draw(4, 2, grad=True)
    if by == "shared":
        x = draw(1, 2, 2, grad=True)
    kwargs = {"index": torch.tensor([1, 0, 1, 1]), "dim_size": 3} if by == "index" else {}
    names = [n for n, _ in layer.named_parameters()]

    def run(x, h, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x, h), kwargs)

    args = x, h, *layer.parameters()
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_vmap_and_forward_mode():
    layer = stir(HyperLinear(INS, OUTS, K, transform="abs", **F64))
    x, h = draw(3, B, INS), draw(3, B, K)
    each = torch.stack([layer(*pair) for pair in zip(x, h, strict=True)])
    close(torch.vmap(layer)(x, h), each)
    _, moved = torch.func.jvp(lambda h: layer(x[0], h), (h[0],), (h[1],))
    _, wanted = torch.func.jvp(
        lambda h: torch.einsum("boi,bi->bo", layer.weights(h)[0], x[0]) + layer.weights(h)[1],
        (h[0],), (h[1],),
    )  # fmt: skip
    close(moved, wanted)
    index = torch.tensor([0, 2, 2, 0])
    summed = torch.vmap(lambda x, h: layer(x, h, index=index, dim_size=3))(x, h)
    close(summed, torch.zeros(3, 3, OUTS, **F64).index_add(1, index, each))


def test_compiles_and_exports():
    layer = HyperLinear(INS, OUTS, K, layout="io", transform="abs")
    x, h, index = torch.randn(B, INS), torch.randn(B, K), torch.tensor([0, 2, 2, 0])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.linear = layer, HyperLinear(INS, OUTS, K)

        def forward(self, x, h, index):
            return self.layer(x, h), self.linear(x, h, index=index, dim_size=3, reduce="mean")

    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for mine, wanted in zip(compiled(x, h, index), net(x, h, index), strict=True):
        torch.testing.assert_close(mine, wanted)
    program = torch.export.export(net, (x, h, index))
    for mine, wanted in zip(program.module()(x, h, index), net(x, h, index), strict=True):
        torch.testing.assert_close(mine, wanted)


class Summed(HyperLinear):
    def forward(self, x, h, index=None):
        return super().forward(x, h, index=index, dim_size=None if index is None else 3)


def test_sizes_stay_dynamic(dynamo):
    layer, counter = HyperLinear(INS, OUTS, K), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows, count in ((30, 10), (40, 12), (55, 13), (60, 20), (64, 21)):
        x, h, index = torch.randn(rows, INS), torch.randn(rows, K), torch.randint(count, (rows,))
        y = compiled(x, h, index=index, dim_size=count)
        torch.testing.assert_close(y, layer(x, h, index=index, dim_size=count))
    assert counter.frame_count <= 2
    layer, rows = Summed(INS, OUTS, K), torch.export.Dim("rows", min=2)
    for given, dynamic in (
        ((torch.randn(9, INS), torch.randn(9, K), torch.randint(3, (9,))), ({0: rows},) * 3),
        ((torch.randn(1, 9, INS), torch.randn(7, K)), ({1: rows}, None)),
    ):
        program = torch.export.export(layer, given, dynamic_shapes=dynamic)
        for n in (2, 100):
            more = [
                t if d is None else torch.cat([t] * n, next(iter(d)))
                for t, d in zip(given, dynamic, strict=True)
            ]
            torch.testing.assert_close(program.module()(*more), layer(*more))


@pytest.mark.parametrize("base", [True, "given"])
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"transform": "square"}], ids=str)
def test_a_layer_starts_as_its_base_and_leaves_its_base_alone(options, base):
    linear = nn.Linear(INS, OUTS, dtype=torch.float32)
    for kind, args in ((HyperLinear, (INS, OUTS, K)), (TaskLinear, (B, INS, OUTS))):
        if kind is TaskLinear and "transform" in options:
            continue
        layer = kind(*args, base=linear if base == "given" else True, **options)
        h = (torch.randn(B, K),) if kind is HyperLinear else ()
        x = torch.randn(B, N, INS)
        assert torch.equal(layer(x, *h), layer.base(x))
        layer.base.requires_grad_(False)
        layer(x, *h).sum().backward()
        assert layer.base.weight.grad is None
        assert any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_a_given_base_is_not_initialised_anew():
    base = nn.Linear(INS, OUTS)
    before = base.weight.clone()
    for layer in (HyperLinear(INS, OUTS, K, base=base), TaskLinear(B, INS, OUTS, base=base)):
        layer.reset_parameters()
        assert torch.equal(base.weight, before)
    own = HyperLinear(INS, OUTS, K, base=True)
    before = own.base.weight.clone()
    own.reset_parameters()
    assert not torch.equal(own.base.weight, before)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("transform", [None, *TRANSFORMS])
def test_a_layer_starts_with_the_variance_of_a_linear_one(transform, rank):
    if transform and rank:
        return
    torch.manual_seed(0)
    layer = HyperLinear(48, 64, 200, transform=transform, rank=rank)
    w, b = layer.weights(torch.randn(400, 200))
    assert 0.9 < w.double().square().mean() * 48 < 1.1
    assert b.abs().max() < 1e-14


def doubled(module, args, output):
    return 2 * output


def test_a_head_that_does_more_runs_as_it_is_written():
    layer = stir(HyperLinear(INS, OUTS, K, **F64))
    x, h = draw(B, N, INS), draw(B, K)
    y = layer(x, h)
    handle = layer.head.register_forward_hook(doubled)
    close(layer(x, h), 2 * y)
    handle.remove()
    parametrizations.weight_norm(layer.head)
    w, c = layer.weights(h)
    close(layer(x, h), x @ w.mT + c.unsqueeze(1))
    layer = stir(HyperLinear(INS, OUTS, K, base=True, bias="shared", **F64))
    plain = layer(x, h)
    layer.base.register_forward_hook(doubled)
    close(layer(x, h) - plain, F.linear(x, layer.base.weight))


def test_autocast():
    layer, x, h = HyperLinear(INS, OUTS, K, bias="shared"), torch.randn(B, INS), torch.randn(B, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x, h).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"bias must be one of \[True, False, 'generated', 'shared', None\], got 'own'",
         lambda: HyperLinear(3, 2, 4, bias="own")),
        (ValueError, "layout must be one of", lambda: HyperLinear(3, 2, 4, layout="oI")),
        (ValueError, "rank must be at least 1, got 0", lambda: HyperLinear(3, 2, 4, rank=0)),
        (TypeError, "rank must be an int", lambda: HyperLinear(3, 2, 4, rank=1.5)),
        (ValueError, "hyper_features must be at least 1", lambda: HyperLinear(3, 2, 0)),
        (ValueError, "transform must be one of", lambda: HyperLinear(3, 2, 4, transform="sqrt")),
        (TypeError, "transform must be callable", lambda: HyperLinear(3, 2, 4, transform=3)),
        (ValueError, "transform must be None for a matrix of rank 2",
         lambda: HyperLinear(3, 2, 4, rank=2, transform="abs")),
        (ValueError, "transform must generate zeros beside a base",
         lambda: HyperLinear(3, 2, 4, base=True, transform="exp")),
        (ValueError, "base must map 3 to 2 features, got 2 to 3",
         lambda: HyperLinear(3, 2, 4, base=nn.Linear(2, 3))),
        (TypeError, "base must be True or an nn.Linear, got Conv1d",
         lambda: TaskLinear(5, 3, 2, base=nn.Conv1d(3, 2, 1))),
        (ValueError, "rank must be at least 1", lambda: TaskLinear(5, 3, 2, rank=-1)),
        (TypeError, "bias must be a bool", lambda: TaskLinear(5, 3, 2, bias="shared")),
        (TypeError, "head_bias must be a bool", lambda: HyperLinear(3, 2, 4, head_bias="no")),
        (TypeError, "base must have dtype torch.float32, got torch.float64",
         lambda: HyperLinear(3, 2, 4, base=nn.Linear(3, 2, dtype=torch.float64))),
        (ValueError, "tasks must be at least 1", lambda: TaskLinear(0, 3, 2)),
    ],
)  # fmt: skip
def test_bad_options(error, message, call):
    with pytest.raises(error, match=message):
        call()


LAYER = HyperLinear(3, 2, 4)
X, H, TO = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 2])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"h must have shape \(..., 4\), got \(5, 3\)", lambda: LAYER(X, X)),
        (ValueError, r"x must have shape \(5, N, 3\), \(5, 3\) or", lambda: LAYER(H, H)),
        (ValueError, "x must have shape", lambda: LAYER(X[:4], H)),
        (TypeError, "h must have the dtype of the head's weight, torch.float32, got .*64",
         lambda: LAYER(X, H.double())),
        (TypeError, "x must have the dtype of the head's weight, torch.float32, got .*16",
         lambda: LAYER(X.half(), H.half())),
        (ValueError, "x must be on the device of the head's weight, cpu, got meta",
         lambda: LAYER(X.to("meta"), H)),
        (ValueError, r"h must have shape \(..., 4\), got \(5, 3\)", lambda: LAYER.weights(X)),
        (ValueError, r"h must have shape \(..., 4\), got \(\)", lambda: LAYER.weights(X[0, 0])),
        (TypeError, "h must be a Tensor, got list", lambda: LAYER.weights([1.0] * 4)),
        (TypeError, "h must have the dtype of the head's", lambda: LAYER.weights(H.double())),
        (IndexError, r"index must be in \[0, 2\*\*48\), got 9223372036854775807",
         lambda: LAYER(X, H, index=TO * 0 + (2**63 - 1))),
        (TypeError, "x must be a Tensor", lambda: LAYER(None, H)),
        (TypeError, "index must have dtype torch.int64", lambda: LAYER(X, H, index=TO.int())),
        (ValueError, r"index must have shape \(5,\)", lambda: LAYER(X, H, index=TO[:4])),
        (IndexError, r"must be in \[0, 2\), got 2", lambda: LAYER(X, H, index=TO, dim_size=2)),
        (IndexError, "index must be in .*, got -1", lambda: LAYER(X, H, index=TO - 1, dim_size=2)),
        (ValueError, "dim_size must be at least 0", lambda: LAYER(X, H, index=TO, dim_size=-1)),
        (TypeError, "dim_size must be an int", lambda: LAYER(X, H, index=TO, dim_size=2.0)),
        (ValueError, "reduce must be one of", lambda: LAYER(X, H, index=TO, reduce="max")),
        (ValueError, "index must be given with dim_size", lambda: LAYER(X, H, dim_size=3)),
        (IndexError, r"index must be in \[0, 2\*\*48\), got -5",
         lambda: LAYER(X, H, index=TO * 0 - 5)),
        (IndexError, r"task_ids must be in \[0, 5\), got 5", lambda: LAYER(X, H, task_ids=TO + 3)),
        (IndexError, r"task_ids must be in \[0, 5\), got 5",
         lambda: LAYER(X, H, task_ids=TO + 3, index=TO * 0, dim_size=1)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


class TestTaskLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("base", [None, True])
    def test_is_its_formula(self, bias, rank, base):
        layer = stir(TaskLinear(B, INS, OUTS, bias=bias, rank=rank, base=base, **F64))

        def weights():
            w = layer.weight if rank is None else layer.weight_b @ layer.weight_a
            w = w if base is None else w + layer.base.weight
            return w, layer.bias if bias else torch.zeros(B, OUTS, **F64)

        ids = torch.tensor([2, 0, 2, 2, 1])
        for shape, task_ids in (
            ((B, N, INS), None), ((B, INS), None), ((1, N, INS), None), ((5, INS), ids),
        ):  # fmt: skip
            x = draw(*shape, grad=True)

            def by_hand(x=x, task_ids=task_ids):
                w, c = weights()
                if task_ids is not None:
                    return torch.einsum("roi,ri->ro", w[task_ids], x) + c[task_ids]
                if x.ndim == 2:
                    return torch.einsum("boi,bi->bo", w, x) + c
                return x @ w.mT + c.unsqueeze(1)

            same(lambda x=x, task_ids=task_ids: layer(x, task_ids), by_hand, x, *layer.parameters())

    def test_every_task_starts_as_a_linear_layer(self):
        torch.manual_seed(0)
        layer = TaskLinear(300, 16, 8)
        assert layer.weight.abs().max() <= 0.25
        assert layer.bias.abs().max() <= 0.25
        assert layer.weight.abs().max() > 0.24
        assert abs(layer.weight.var() * 16 - 1 / 3) < 0.02
        assert not torch.equal(layer.weight[0], layer.weight[1])

    def test_state_dict(self):
        layer, other = TaskLinear(B, INS, OUTS, rank=2), TaskLinear(B, INS, OUTS, rank=2)
        assert [*layer.state_dict()] == ["weight_a", "weight_b", "bias"]
        other.load_state_dict(layer.state_dict())
        x = torch.randn(B, INS)
        assert torch.equal(layer(x), other(x))

    def test_errors(self):
        layer = TaskLinear(B, INS, OUTS)
        with pytest.raises(ValueError, match="x must have shape"):
            layer(torch.randn(B + 1, INS))
        with pytest.raises(IndexError, match="task_ids must be in"):
            layer(torch.randn(1, INS), torch.tensor([B]))
        with pytest.raises(TypeError, match="x must have the dtype of the layer's weight"):
            layer(torch.randn(B, INS).half())


def test_a_mixed_batch_of_adapters():
    """LoRA (Hu et al. 2021): base(x) + B_t A_t x."""
    base = nn.Linear(INS, OUTS, **F64)
    layer = stir(TaskLinear(7, INS, OUTS, bias=False, rank=2, base=base, **F64))
    x, ids = draw(9, INS), torch.randint(7, (9,))
    rows = [
        base(r) + layer.weight_b[t] @ (layer.weight_a[t] @ r) for r, t in zip(x, ids, strict=True)
    ]
    close(layer(x, ids), torch.stack(rows))


def test_layout_is_the_layers_own():
    """A square head fits both layouts: the module, not the shape, says which it is."""
    a, b = HyperLinear(4, 4, K, layout="oi", **F64), HyperLinear(4, 4, K, layout="io", **F64)
    b.load_state_dict(stir(a).state_dict())
    h = draw(B, K)
    close(a.weights(h)[0], b.weights(h)[0].mT)
    assert not torch.allclose(a.weights(h)[0], b.weights(h)[0])
    assert hyperfast.HyperLinear is HyperLinear
