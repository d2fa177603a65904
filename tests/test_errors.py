"""Bad input: every entry point says what it wants and what it got."""

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import HyperMLP, HyperNet, MLPSpec, TargetNet, functional
from hyperfast.functional import hyper_linear, task_linear
from hyperfast.layout import Generated
from hyperfast.plans.sizes import PLANS

OP = torch.ops.hyperfast

# Two tasks, three rows each, four features in, five out; H = 7 and z_dim = 6.
X, ROWS, IDS = torch.zeros(2, 3, 4), torch.zeros(6, 4), torch.tensor([0, 1, 1, 0, 0, 1])
W, B = torch.zeros(2, 5, 4), torch.zeros(2, 5)
H, HEAD, HEAD_B = torch.zeros(2, 7), torch.zeros(25, 7), torch.zeros(25)
MADE = Generated.of_head(HEAD, HEAD_B, 4, True)
Z = torch.zeros(2, 6)
HYPER = HyperNet(6, 4, 8, 5)
MODEL, TARGET = HyperMLP(HYPER), TargetNet()
WS = tuple(w.detach() for w in HYPER(Z))
META = X.to("meta")
LONG = torch.zeros(2, 3, 4, dtype=torch.int64)


def bad(name, error, message, call):
    return pytest.param(call, error, message, id=name)


def bad_ids(entry, rows, call):
    """What every entry point says about ``task_ids``, for ``call(ids)`` with ``rows`` rows."""
    wrong = [
        ("a list", TypeError, "task_ids must be a Tensor, got list", [0] * rows),
        ("int32", TypeError, "task_ids must have dtype torch.int64, got torch.int32", IDS.int()),
        ("float", TypeError, "task_ids must have dtype torch.int64, got .*float32", IDS.float()),
        ("bool", TypeError, "task_ids must have dtype torch.int64, got .*bool", IDS.bool()),
        ("too few", ValueError, rf"task_ids must have shape \({rows},\).*got \(5,\)", IDS[:5]),
        ("rank", ValueError, rf"task_ids must have shape \({rows},\).*got \(6, 1\)", IDS[:, None]),
        ("scalar", ValueError, rf"task_ids must have shape \({rows},\).*got \(\)", IDS[0]),
        (
            "device",
            ValueError,
            "task_ids must be on the device of x, cpu, got meta",
            IDS.to("meta"),
        ),
        ("too large", IndexError, r"task_ids must be in \[0, 2\), got 2", IDS * 2),
        ("huge", IndexError, r"in \[0, 2\), got 4611686018427387904", IDS * 2**62),
        ("negative", IndexError, r"task_ids must be in \[0, 2\), got -1", IDS - 1),
    ]
    return [
        bad(f"{entry}: ids {name}", error, message, lambda ids=ids: call(ids))
        for name, error, message, ids in wrong
    ]


TASK_LINEAR = [
    bad("x None", TypeError, "x must be a Tensor, got NoneType", lambda: task_linear(None, W)),
    bad("x list", TypeError, "x must be a Tensor, got list", lambda: task_linear([1.0], W)),
    bad("weight None", TypeError, "weight must be a Tensor", lambda: task_linear(X, None)),
    bad("bias list", TypeError, "bias must be a Tensor, got list", lambda: task_linear(X, W, [1])),
    bad("x int", TypeError, "x must be a floating.*int64", lambda: task_linear(LONG, W)),
    bad("weight int", TypeError, "weight must be a fl.*int64", lambda: task_linear(X, W.long())),
    bad("x complex", TypeError, "x must be a fl.*complex64", lambda: task_linear(X + 0j, W)),
    bad("dtypes", TypeError, "weight must have the dtype of x, torch.float32, got torch.float64",
        lambda: task_linear(X, W.double())),
    bad("bias dtype", TypeError, "bias must have the dtype of x, .*float32, got .*bfloat16",
        lambda: task_linear(X, W, B.bfloat16())),
    bad("devices", ValueError, "weight must be on the device of x, meta, got cpu",
        lambda: task_linear(META, W)),
    bad("bias device", ValueError, "bias must be on the device of x, cpu, got meta",
        lambda: task_linear(X, W, B.to("meta"))),
    bad("weight rank", ValueError, r"weight must have shape \(B, out, in\), got \(5, 4\)",
        lambda: task_linear(X, W[0])),
    bad("bias size", ValueError, r"bias must have shape \(2, 5\), got \(2, 4\)",
        lambda: task_linear(X, W, B[:, 1:])),
    bad("bias rank", ValueError, r"bias must have shape \(2, 5\), got \(5,\)",
        lambda: task_linear(X, W, B[0])),
    bad("x tasks", ValueError, r"x must have shape \(2, N, 4\) or \(2, 4\).*got \(3, 3, 4\)",
        lambda: task_linear(X[[0, 1, 0]], W)),
    bad("x features", ValueError, r"x must have shape \(2, N, 4\).*got \(2, 3, 3\)",
        lambda: task_linear(X[..., 1:], W)),
    bad("x scalar", ValueError, r"x must have shape .*got \(\)", lambda: task_linear(X.sum(), W)),
    bad("x rank", ValueError, r"x must have shape .*got \(2, 3, 4, 1\)",
        lambda: task_linear(X[..., None], W)),
    bad("ragged rank", ValueError, r"x must have shape \(R, 4\) when task_ids.*got \(2, 3, 4\)",
        lambda: task_linear(X, W, B, IDS)),
    bad("ragged features", ValueError, r"x must have shape \(R, 4\) when.*got \(6, 3\)",
        lambda: task_linear(ROWS[:, 1:], W, B, IDS)),
    bad("sparse", TypeError, "x must be a dense tensor, got layout torch.sparse_coo",
        lambda: task_linear(ROWS.to_sparse(), W, B, IDS)),
    bad("memory", RuntimeError, r"no memory for a tensor of shape \(2, 17592186044416, 5\)|can't "
        "allocate memory", lambda: task_linear(X[:, :1].expand(2, 2**44, 4), W, B)),
    *bad_ids("task_linear", 6, lambda ids: task_linear(ROWS, W, B, ids)),
]  # fmt: skip

HYPER_LINEAR = [
    bad("x None", TypeError, "x must be a Tensor", lambda: hyper_linear(None, H, HEAD, HEAD_B)),
    bad("h None", TypeError, "h must be a Tensor", lambda: hyper_linear(X, None, HEAD, HEAD_B)),
    bad("weight None", TypeError, "weight must be a Ten", lambda: hyper_linear(X, H, None, HEAD_B)),
    bad("x int", TypeError, "x must be a floating", lambda: hyper_linear(LONG, H, HEAD, HEAD_B)),
    bad("h dtype", TypeError, "h must have the dtype of x, torch.float32, got torch.float64",
        lambda: hyper_linear(X, H.double(), HEAD, HEAD_B)),
    bad("weight dtype", TypeError, "weight must have the dtype of x",
        lambda: hyper_linear(X, H, HEAD.half(), HEAD_B)),
    bad("bias dtype", TypeError, "bias must have the dtype of x",
        lambda: hyper_linear(X, H, HEAD, HEAD_B.double())),
    bad("h device", ValueError, "h must be on the device of x, meta, got cpu",
        lambda: hyper_linear(META, H, HEAD, HEAD_B)),
    bad("h rank", ValueError, r"h must have shape \(B, H\), got \(7,\)",
        lambda: hyper_linear(X, H[0], HEAD, HEAD_B)),
    bad("weight features", ValueError, r"weight must have shape \(P, 7\) .* got \(25, 6\)",
        lambda: hyper_linear(X, H, HEAD[:, 1:], HEAD_B)),
    bad("weight rank", ValueError, r"weight must have shape \(P, 7\) .* got \(25,\)",
        lambda: hyper_linear(X, H, HEAD_B, HEAD_B)),
    bad("weight rows", ValueError, r"a multiple of 5 rows \(in_features 4 and a bias\), got 24",
        lambda: hyper_linear(X, H, HEAD[1:], HEAD_B[1:])),
    bad("no target bias", ValueError, r"a multiple of 4 rows \(in_features 4\), got 25",
        lambda: hyper_linear(X, H, HEAD, HEAD_B, target_bias=False)),
    bad("weight empty", ValueError, "a multiple of 5 rows .* got 0",
        lambda: hyper_linear(X, H, HEAD[:0], HEAD_B[:0])),
    bad("bias size", ValueError, r"bias must have shape \(25,\), got \(24,\)",
        lambda: hyper_linear(X, H, HEAD, HEAD_B[1:])),
    bad("bias rank", ValueError, r"bias must have shape \(25,\), got \(25, 1\)",
        lambda: hyper_linear(X, H, HEAD, HEAD_B[:, None])),
    bad("x tasks", ValueError, r"x must have shape \(2, N, 4\).* h holds 2 tasks, .*\(3, 3, 4\)",
        lambda: hyper_linear(X[[0, 1, 0]], H, HEAD, HEAD_B)),
    bad("x scalar", ValueError, r"got \(\)", lambda: hyper_linear(X.sum(), H, HEAD, HEAD_B)),
    bad("x rank", ValueError, r"x must have shape .*got \(2, 3, 1, 4\)",
        lambda: hyper_linear(X[:, :, None], H, HEAD, HEAD_B)),
    bad("plan", ValueError, r"plan must be one of \['contract', 'tile', 'materialize'\] or None, "
        "got 'fast'", lambda: hyper_linear(X, H, HEAD, HEAD_B, plan="fast")),
    bad("plan empty", ValueError, "plan must be one of", lambda: hyper_linear(
        X, H, HEAD, HEAD_B, plan="")),
    bad("plan type", ValueError, "plan must be one of", lambda: hyper_linear(
        X, H, HEAD, HEAD_B, plan=1)),
    bad("sparse", TypeError, "weight must be a dense tensor, got layout torch.sparse_coo",
        lambda: hyper_linear(X, H, HEAD.to_sparse(), HEAD_B)),
    *bad_ids("hyper_linear", 6, lambda ids: hyper_linear(ROWS, H, HEAD, HEAD_B, ids)),
]  # fmt: skip

NET = [
    *[
        bad(f"{name}={value!r}", error, f"{name} must be .*got {value!r}".replace("(", r"\("),
            lambda name=name, value=value: HyperNet(**{
                "z_dim": 6, "target_in": 4, "target_hidden": 8, "target_out": 5, name: value}))
        for name in ("z_dim", "target_in", "target_hidden", "target_out", "hidden")
        for value, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError),
                             (None, TypeError), (True, TypeError))
    ],
    bad("tuple zero", ValueError, "target_hidden must be at least 1, got 0",
        lambda: HyperNet(6, 4, (8, 0), 5)),
    bad("tuple float", TypeError, "hidden must be an int, got 2.5",
        lambda: HyperNet(6, 4, 8, 5, hidden=(2.5,))),
    bad("string", TypeError, "target_hidden must be an int", lambda: HyperNet(6, 4, "8", 5)),
    bad("init", ValueError, r"init must be one of \['hyperfan_in', 'hyperfan_out'\], got 'xavier'",
        lambda: HyperNet(6, 4, 8, 5, init="xavier")),
    bad("activation", ValueError, "^activation must be one of .*'relu'.* got 'rleu'",
        lambda: HyperNet(6, 4, 8, 5, activation="rleu")),
    bad("target activation", ValueError, "target_activation must be one of .* got 'rleu'",
        lambda: HyperNet(6, 4, 8, 5, target_activation="rleu")),
    bad("activation type", TypeError, "activation must be a name, a module or a function, got 3",
        lambda: HyperNet(6, 4, 8, 5, activation=3)),
    bad("activation class", TypeError, "activation must be a name, a module or a function, got <cl",
        lambda: HyperNet(6, 4, 8, 5, activation=nn.ReLU)),
    bad("z list", TypeError, "z must be a Tensor, got list", lambda: HYPER([0.0] * 6)),
    bad("z int", TypeError, "z must be a floating-point tensor, got torch.int64",
        lambda: HYPER(Z.long())),
    bad("z dtype", TypeError, "z must have the dtype of the hyper.*float32, got torch.float64",
        lambda: HYPER(Z.double())),
    bad("z device", ValueError, "z must be on the device of the hyper.*cpu, got meta",
        lambda: HYPER(Z.to("meta"))),
    bad("z size", ValueError, r"z must have shape \(6,\) or \(B, 6\), got \(2, 5\)",
        lambda: HYPER(Z[:, 1:])),
    bad("z rank", ValueError, r"z must have shape .* got \(1, 2, 6\)", lambda: HYPER(Z[None])),
    bad("z scalar", ValueError, r"z must have shape .* got \(\)", lambda: HYPER(Z.sum())),
    bad("features", ValueError, "z must have shape", lambda: HYPER.features(Z[:, 1:])),
]  # fmt: skip

TARGETS = [
    bad("activation", ValueError, "activation must be one of .* got 'x'", lambda: TargetNet("x")),
    bad("activations", ValueError, "activation must be one of", lambda: TargetNet(["relu", "x"])),
    bad("activation None", TypeError, "activation must be a name", lambda: TargetNet(None)),
    bad("activation class", TypeError, "activation must be a name", lambda: TargetNet(nn.ReLU)),
    bad("transform name", ValueError, r"weight_transform must be one of \['abs', 'exp', "
        r"'softplus', 'square'\] or a function, got 'cube'",
        lambda: TargetNet(weight_transform="cube")),
    bad("transform", TypeError, "weight_transform must be callable, got 2",
        lambda: TargetNet(weight_transform=2)),
    bad("no weights", ValueError, r"weights must be a non-empty sequence of tensors, got \(\)",
        lambda: TARGET(X, ())),
    bad("one tensor", ValueError, "weights must be a non-empty sequence of tensors",
        lambda: TARGET(X, W)),
    bad("weight None", TypeError, r"weights\[1\] must be a Tensor, got NoneType",
        lambda: TARGET(X, (W, None))),
    bad("first rank", ValueError, r"weights\[0\] must have shape \(out, in\) or \(B, out, in\), "
        r"got \(4,\)", lambda: TARGET(X, (W[0, 0],))),
    bad("bias rank", ValueError, r"weights\[1\] must be a weight of rank 3 or a .* rank 2, got "
        r"shape \(5,\)", lambda: TARGET(X, (W, B[0]))),
    bad("two biases", ValueError, r"weights\[2\] must be a weight of rank 3 or",
        lambda: TARGET(X, (W, B, B))),
    bad("bias size", ValueError, r"weights\[1\] must have shape \(2, 5\), the bias of the weight "
        r"before it, got \(2, 4\)", lambda: TARGET(X, (W, B[:, 1:]))),
    bad("layers", ValueError, r"weights\[1\] must have 5 input features and 2 tasks.* got shape "
        r"\(2, 5, 4\)", lambda: TARGET(X, (W, W))),
    bad("layers of one", ValueError, r"weights\[1\] must have 5 input feat.*got shape \(5, 4\)",
        lambda: TARGET(X, (W[0], W[0]))),
    bad("tasks", ValueError, r"weights\[1\] must have 4 input features and 2 tasks, .* \(3, 4, 4\)",
        lambda: TARGET(ROWS, (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4)), IDS)),
    bad("x batch", ValueError, r"x must have shape \(2, N, 4\).*got \(3, 3, 4\)",
        lambda: TARGET(X[[0, 1, 0]], WS)),
    bad("x features", ValueError, r"x must have shape \(2, N, 4\).*got \(2, 3, 3\)",
        lambda: TARGET(X[..., 1:], WS)),
    bad("x of one", ValueError, r"x must have 4 features in .*got shape \(3, 3\)",
        lambda: TARGET(X[0, :, 1:], [w[0] for w in WS])),
    bad("x scalar of one", ValueError, r"x must have 4 features .*got shape \(\)",
        lambda: TARGET(X.sum(), [w[0] for w in WS])),
    bad("x list", TypeError, "x must be a Tensor, got list", lambda: TARGET([1.0], WS)),
    bad("x list of one", TypeError, "x must be a Ten", lambda: TARGET([1.0], [w[0] for w in WS])),
    bad("x int", TypeError, "x must be a floating-point tensor, got .*int64",
        lambda: TARGET(LONG, WS)),
    bad("x int of one", TypeError, "x must be a floating-point tensor, got .*int64",
        lambda: TARGET(LONG, [w[0] for w in WS])),
    bad("dtypes", TypeError, "weight must have the dtype of x", lambda: TARGET(X.double(), WS)),
    bad("dtypes of one", TypeError, "weight must have the dtype of x",
        lambda: TARGET(X.double(), [w[0] for w in WS])),
    bad("devices", ValueError, "weight must be on the device of x, meta, got cpu",
        lambda: TARGET(META, WS)),
    bad("ids of one", ValueError, "task_ids needs weights with a leading task dimension, "
        r"got weights\[0\] of shape \(8, 4\)", lambda: TARGET(ROWS, [w[0] for w in WS], IDS)),
    bad("ids with rows", ValueError, r"x must have shape \(R, 4\) when task_ids is given",
        lambda: TARGET(X, WS, IDS)),
    *bad_ids("TargetNet", 6, lambda ids: TARGET(ROWS, WS, ids)),
]  # fmt: skip

MODELS = [
    bad("hyper", TypeError, "hyper must be a HyperNet, got Linear",
        lambda: HyperMLP(nn.Linear(6, 4))),
    bad("target", TypeError, "target must be a module, got str", lambda: HyperMLP(HYPER, "relu")),
    bad("activations", ValueError, "activation must hold 1 or 2 entries for a network of 2 layers, "
        "got 3", lambda: HyperMLP(HYPER, TargetNet(["relu"] * 3))),
    bad("z list", TypeError, "z must be a Tensor, got list", lambda: MODEL(X, [0.0])),
    bad("x list", TypeError, "x must be a Tensor, got list", lambda: MODEL([0.0], Z)),
    bad("z int", TypeError, "z must be a floating-point", lambda: MODEL(X, Z.long())),
    bad("x int", TypeError, "x must be a floating-point", lambda: MODEL(LONG, Z)),
    bad("x dtype", TypeError, "x must have the dtype of the hyper.*float32, got torch.float64",
        lambda: MODEL(X.double(), Z)),
    bad("z dtype", TypeError, "z must have the dtype of the hyper", lambda: MODEL(X, Z.double())),
    bad("x device", ValueError, "x must be on the device of the hyper.*cpu, got meta",
        lambda: MODEL(META, Z)),
    bad("z device", ValueError, "z must be on the device of", lambda: MODEL(X, Z.to("meta"))),
    bad("z size", ValueError, r"z must have shape .*got \(2, 5\)", lambda: MODEL(X, Z[:, 1:])),
    bad("batches", ValueError, r"x must have shape \(1, N, 4\) .* z holds 1 tasks, .*\(2, 3, 4\)",
        lambda: MODEL(X, Z[:1])),
    bad("x features", ValueError, r"x must have shape \(2, N, 4\) or .*got \(2, 3, 3\)",
        lambda: MODEL(X[..., 1:], Z)),
    bad("x scalar", ValueError, r"x must have shape \(2, N, 4\) or .*got \(\)",
        lambda: MODEL(X.sum(), Z)),
    bad("ids of one", ValueError, r"z must have shape \(B, 6\) when task_ids is given, got \(6,\)",
        lambda: MODEL(ROWS, Z[0], IDS)),
    bad("ids with rows", ValueError, r"x must have shape \(R, 4\) when", lambda: MODEL(X, Z, IDS)),
    *bad_ids("HyperMLP", 6, lambda ids: MODEL(ROWS, Z, ids)),
]  # fmt: skip

SPEC, MLP = MLPSpec((4, 5)), functional.hyper_mlp
HYPER_MLP = [
    bad("x", TypeError, "x must be a Ten", lambda: MLP(None, H, HEAD, HEAD_B, SPEC, [None])),
    bad("h", TypeError, "h must be a Ten", lambda: MLP(X, None, HEAD, HEAD_B, SPEC, [None])),
    bad("weight", TypeError, "weight must be a", lambda: MLP(X, H, None, HEAD_B, SPEC, [None])),
]

SPECS = [
    bad("int", TypeError, "sizes must be a sequence of ints, got 3", lambda: MLPSpec(3)),
    bad("one", ValueError, r"at least an input and an output width, got \(3,\)",
        lambda: MLPSpec((3,))),
    bad("zero", ValueError, "sizes must be at least 1, got 0", lambda: MLPSpec((3, 0))),
    bad("float", TypeError, "sizes must be an int, got 1.5 of type float",
        lambda: MLPSpec((3, 1.5))),
    bad("bool", TypeError, "sizes must be an int, got True", lambda: MLPSpec((3, True))),
    bad("split", ValueError, r"flat must have 8 elements in its last dimension, got shape \(2, 7\)",
        lambda: MLPSpec((3, 2)).split(torch.zeros(2, 7))),
    bad("split None", TypeError, "flat must be a Tensor", lambda: MLPSpec((3, 2)).split(None)),
    bad("split scalar", ValueError, r"got shape \(\)",
        lambda: MLPSpec((3, 2)).split(torch.tensor(0.0))),
    bad("flatten count", ValueError, "weights must hold 2 tensors, one a parameter, got 1",
        lambda: MLPSpec((3, 2)).flatten([torch.zeros(2, 3)])),
    bad("flatten shape", ValueError, r"weights\[0\] must have shape \(2, 3\), got \(3, 2\)",
        lambda: MLPSpec((3, 2)).flatten([torch.zeros(3, 2), torch.zeros(2)])),
    bad("flatten batch", ValueError, r"weights\[1\] must have shape \(4, 2\), got \(5, 2\)",
        lambda: MLPSpec((3, 2)).flatten([torch.zeros(4, 2, 3), torch.zeros(5, 2)])),
]  # fmt: skip

EXPLAIN = [
    bad("model", TypeError, "model must be a HyperMLP", lambda: hyperfast.explain(HYPER, 1, 2)),
    bad("transform", TypeError, "does not form the weights", lambda: hyperfast.explain(
        HyperMLP(HYPER, TargetNet(weight_transform=torch.abs)), (2, 3, 4), (2, 6))),
    bad("chunked", TypeError, "one that forms them, as its weights are chunked: HyperMLP",
        lambda: hyperfast.explain(
            HyperMLP(*HyperNet.for_module(nn.Linear(4, 5), 6, chunks=8)), (2, 3, 4), (2, 6))),
    bad("dim_size", ValueError, "dim_size must be at least 0, got -1",
        lambda: hyperfast.explain(hyperfast.HyperLinear(4, 5, 6), (2, 4), (2, 6), dim_size=-1)),
    bad("tensors", TypeError, "x_shape must be a shape, as x.shape is, got Tensor",
        lambda: hyperfast.explain(MODEL, X, Z)),
    bad("negative", ValueError, "z_shape must be at least 0, got -2",
        lambda: hyperfast.explain(MODEL, (2, 3, 4), (-2, 6))),
    bad("z", ValueError, r"z_shape must be \(B, 6\), got \(2, 5\)",
        lambda: hyperfast.explain(MODEL, (2, 3, 4), (2, 5))),
    bad("z rank", ValueError, r"z_shape must be \(B, 6\), got \(6,\)",
        lambda: hyperfast.explain(MODEL, (2, 3, 4), (6,))),
    bad("x", ValueError, r"x_shape must be \(2, N, 4\) or \(2, 4\), got \(3, 3, 4\)",
        lambda: hyperfast.explain(MODEL, (3, 3, 4), (2, 6))),
    bad("x features", ValueError, r"x_shape must be .*got \(2, 3\)",
        lambda: hyperfast.explain(MODEL, (2, 3), (2, 6))),
    bad("ragged", ValueError, r"x_shape must be \(R, 4\), got \(2, 3, 4\)",
        lambda: hyperfast.explain(MODEL, (2, 3, 4), (2, 6), ragged=True)),
]  # fmt: skip

TABLES = {
    "task_linear": TASK_LINEAR,
    "hyper_linear": HYPER_LINEAR,
    "HyperNet": NET,
    "TargetNet": TARGETS,
    "HyperMLP": MODELS,
    "hyper_mlp": HYPER_MLP,
    "MLPSpec": SPECS,
    "explain": EXPLAIN,
}
ENTRIES = [
    pytest.param(*p.values, id=f"{entry}: {p.id.removeprefix(entry + ': ')}")
    for entry, table in TABLES.items()
    for p in table
]


@pytest.mark.parametrize(("call", "error", "message"), ENTRIES)
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


G, GROWS = torch.zeros(2, 3, 5), torch.zeros(6, 5)
DIRECT = {
    "task_linear": lambda ids: OP.task_linear(ROWS, W, B, ids),
    "task_linear_grad_weight": lambda ids: OP.task_linear_grad_weight(GROWS, ROWS, ids, 2),
    "hyper_linear": lambda ids, plan: OP.hyper_linear(ROWS, H, *MADE, ids, "", plan),
    "hyper_linear_backward": lambda ids, plan: torch.cat([
        t.flatten() for t in OP.hyper_linear_backward(
            GROWS, ROWS, H, *MADE[:3], ids, "", [True] * 3, plan)]),
    "hyper_linear_grad_h": lambda ids, plan: OP.hyper_linear_grad_h(
        GROWS, ROWS, MADE.matrix, MADE.vector, ids, 2, plan),
    "hyper_linear_grad_weight": lambda ids, plan: OP.hyper_linear_grad_weight(
        GROWS, ROWS, H, ids, True, plan),
}  # fmt: skip


def made(**change):
    return MADE._replace(**change)


def backward(plan, h=H, **change):
    return OP.hyper_linear_backward(G, X, h, *made(**change)[:3], None, "", [True] * 3, plan)


NAMED = ("", *PLANS)


@pytest.mark.parametrize("value", [-1, 2, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("name", DIRECT)
def test_the_registered_ops_check_ids(name, value):
    """No id reaches memory unchecked, whoever calls."""
    ids = IDS.clone()
    ids[3] = value
    for plan in NAMED if name.startswith("hyper") else (None,):
        options = () if plan is None else (plan,)
        assert DIRECT[name](IDS, *options).isfinite().all()
        with pytest.raises(IndexError, match=rf"task_ids must be in \[0, 2\), got {value}"):
            DIRECT[name](ids, *options)


GARBAGE = [
    lambda: OP.task_linear(X, W[:1], B, None),
    lambda: OP.task_linear(X, W, B[:, :3], None),
    lambda: OP.task_linear(X[0], W, B, None),
    lambda: OP.task_linear(X, W[..., :3], B, None),
    lambda: OP.task_linear(X, W, B, IDS),
    lambda: OP.task_linear(ROWS, W, B, IDS[:5]),
    lambda: OP.task_linear(ROWS, W, B, IDS.float()),
    lambda: OP.task_linear_grad_weight(G, X[:, :2], None, 2),
    lambda: OP.task_linear_grad_weight(GROWS, ROWS, IDS[:5], 2),
    lambda: OP.task_linear_grad_weight(GROWS, ROWS, IDS, -1),
    *[
        lambda plan=plan, make=make: make(plan)
        for plan in NAMED
        for make in (
            lambda p: OP.hyper_linear(X, H[:1], *MADE, None, "", p),
            lambda p: OP.hyper_linear(X, H[:, :3], *MADE, None, "", p),
            lambda p: OP.hyper_linear(X[..., :3], H, *MADE, None, "", p),
            lambda p: OP.hyper_linear(X, H, *made(matrix=MADE.matrix[:3]), None, "", p),
            lambda p: OP.hyper_linear(X, H, *made(matrix=MADE.matrix[0]), None, "", p),
            lambda p: OP.hyper_linear(X, H, *made(matrix_bias=MADE.matrix_bias.mT), None, "", p),
            lambda p: OP.hyper_linear(X, H, *made(vector=MADE.vector[:3]), None, "", p),
            lambda p: OP.hyper_linear(X, H, *made(vector_bias=MADE.vector_bias[:3]), None, "", p),
            lambda p: OP.hyper_linear(ROWS, H, *MADE, IDS[:5], "", p),
            lambda p: backward(p, H[:1]),
            lambda p: backward(p, H[:, :3]),
            lambda p: backward(p, matrix=MADE.matrix[:3]),
            lambda p: backward(p, matrix_bias=MADE.matrix_bias.mT),
            lambda p: backward(p, vector=MADE.vector[:3]),
            lambda p: OP.hyper_linear_grad_h(G, X[:, :2], MADE.matrix, None, None, 2, p),
            lambda p: OP.hyper_linear_grad_h(G, X, MADE.matrix[:3], None, None, 2, p),
            lambda p: OP.hyper_linear_grad_h(G, X, MADE.matrix, MADE.vector[:3], None, 2, p),
            lambda p: OP.hyper_linear_grad_h(GROWS, ROWS, MADE.matrix, MADE.vector, IDS, -1, p),
            lambda p: OP.hyper_linear_grad_h(GROWS, ROWS[:5], MADE.matrix, MADE.vector, IDS, 2, p),
            lambda p: OP.hyper_linear_grad_weight(G, X, H[:1], None, True, p),
            lambda p: OP.hyper_linear_grad_weight(GROWS, ROWS, H, IDS[:5], True, p),
        )
    ],
]


@pytest.mark.parametrize("call", GARBAGE)
def test_the_registered_ops_refuse_garbage(call):
    """Shapes that the checked functions never let through end in an exception, not in a crash."""
    with pytest.raises(Exception):  # noqa: B017, PT011
        call()


@pytest.mark.parametrize("transform", ["relu", "Abs", "abs "])
def test_unknown_transform(transform):
    message = f"transform must be .*abs.*, got .{transform}.$"
    with pytest.raises(ValueError, match=message):
        OP.hyper_linear(X, H, *MADE, None, transform, "")
    with pytest.raises(ValueError, match=message):
        OP.hyper_linear_backward(G, X, H, *MADE[:3], None, transform, [True] * 3, "")


def test_wrong_width_is_refused_layer_by_layer_too():
    hyper = hyperfast.HyperNet(6, 4, 5, 3)
    model = hyperfast.HyperMLP(hyper, hyperfast.TargetNet(lambda x: x * 2))
    with pytest.raises(ValueError, match=r"x must have shape \(2, N, 4\)"):
        model(torch.randn(2, 7, 24), torch.randn(2, 6))
