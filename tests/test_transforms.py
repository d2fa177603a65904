"""torch.func, forward-mode and batched gradients, against the specification."""

from itertools import product

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import hyperfast
from hyperfast import functional
from hyperfast.kernels import reference
from hyperfast.layout import Generated
from tests.support.budget import close
from tests.support.draw import draw

# PyTorch's own rules of forward mode still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is dep:DeprecationWarning")

SIZE, TASKS = 2, 3
IDS = torch.tensor([2, 0, 0, 1, 2])


def task_args(ragged):
    return (draw(5, 4) if ragged else draw(TASKS, 2, 4), draw(TASKS, 6, 4), draw(TASKS, 6))


def hyper_args(ragged):
    return (draw(5, 4) if ragged else draw(TASKS, 2, 4), draw(TASKS, 7), draw(30, 7), draw(30))


def plain_hyper_linear(x, h, weight, bias, ids=None):
    return reference.hyper_linear(x, h, *Generated.of_head(weight, bias, 4, True), ids)


OPS = [
    (functional.task_linear, reference.task_linear, task_args),
    (functional.hyper_linear, plain_hyper_linear, hyper_args),
]
every_op = pytest.mark.parametrize(
    ("ours", "plain", "make"), OPS, ids=["task_linear", "hyper_linear"]
)
every_form = pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])


def with_ids(f, ragged):
    return (lambda *args: f(*args, IDS)) if ragged else f


def loss(f):
    return lambda *args: f(*args).sin().sum()


@every_form
@every_op
class TestDerivatives:
    def test_grad(self, ours, plain, make, ragged):
        args = make(ragged)
        where = tuple(range(len(args)))
        f, g = (grad(loss(with_ids(f, ragged)), where) for f in (ours, plain))
        close(f(*args), g(*args))

    @pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
    def test_jacobian(self, ours, plain, make, ragged, jacobian):
        args = make(ragged)
        where = tuple(range(len(args)))
        f, g = (jacobian(with_ids(f, ragged), where) for f in (ours, plain))
        close(f(*args), g(*args))

    def test_jvp_along_every_subset(self, ours, plain, make, ragged):
        args = make(ragged)
        for mask in product([0, 1], repeat=len(args)):
            tangents = tuple(draw(*a.shape) * m for a, m in zip(args, mask, strict=True))
            f, g = (jvp(with_ids(f, ragged), args, tangents) for f in (ours, plain))
            close(f, g)

    def test_hessian(self, ours, plain, make, ragged):
        args = make(ragged)
        for n in range(len(args)):
            f, g = (hessian(loss(with_ids(f, ragged)), n) for f in (ours, plain))
            close(f(*args), g(*args))

    def test_dual_tensors(self, ours, plain, make, ragged):
        """Forward mode without torch.func."""
        args = make(ragged)
        for n in range(len(args)):
            with forward_ad.dual_level():
                mixed = [forward_ad.make_dual(a, a) if m == n else a for m, a in enumerate(args)]
                f, g = (forward_ad.unpack_dual(with_ids(f, ragged)(*mixed)) for f in (ours, plain))
                close(tuple(f), tuple(g))

    def test_grads_batched(self, ours, plain, make, ragged):
        args = [a.requires_grad_() for a in make(ragged)]
        f, g = (with_ids(f, ragged)(*args) for f in (ours, plain))
        many = draw(SIZE, *f.shape)
        close(*(torch.autograd.grad(y, args, many, is_grads_batched=True) for y in (f, g)))

    def test_double_backward_of_batched_grads(self, ours, plain, make, ragged):
        """A gradient penalty on every row of a Jacobian."""
        args = [a.requires_grad_() for a in make(ragged)]
        results = []
        many = draw(SIZE, *with_ids(plain, ragged)(*args).shape)
        for f in (ours, plain):
            y = with_ids(f, ragged)(*args).sin()
            first = torch.autograd.grad(y, args, many, is_grads_batched=True, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            results.append(torch.autograd.grad(penalty, args))
        close(*results)


def batch(args, dims):
    """Each argument batched in the dimension that ``dims`` says."""
    return [
        a if d is None else torch.stack([draw(*a.shape) for _ in range(SIZE)], d)
        for a, d in zip(args, dims, strict=True)
    ]


@every_form
@every_op
class TestVmap:
    def test_every_choice_of_batched_arguments(self, ours, plain, make, ragged):
        """Value and gradients; the head's weight batched or not, in the first or the last place."""
        f, g = with_ids(ours, ragged), with_ids(plain, ragged)
        args = make(ragged)
        where = tuple(range(len(args)))
        for dims in product((None, 0, -1), repeat=len(args)):
            if not any(d is not None for d in dims):
                continue
            many = batch(args, dims)
            close(vmap(f, dims)(*many), vmap(g, dims)(*many))
            close(vmap(grad(loss(f), where), dims)(*many), vmap(grad(loss(g), where), dims)(*many))

    def test_out_dims_and_nesting(self, ours, plain, make, ragged):
        f, g = with_ids(ours, ragged), with_ids(plain, ragged)
        x, *rest = make(ragged)
        many = draw(2, 3, *x.shape)
        twice = lambda f: vmap(vmap(lambda x: f(x, *rest), out_dims=1), in_dims=1)(many)  # noqa: E731
        # in_dims=1 of (2, 3, ...) leaves (2, ...) for the inner one
        close(twice(f), twice(g))

    def test_second_derivatives(self, ours, plain, make, ragged):
        f, g = with_ids(ours, ragged), with_ids(plain, ragged)
        x, *rest = make(ragged)
        many = draw(SIZE, *x.shape)
        close(*(vmap(hessian(lambda x, f=f: loss(f)(x, *rest)))(many) for f in (f, g)))


@every_op
class TestVmapOverIds:
    @pytest.mark.parametrize("others", [False, True], ids=["ids alone", "all"])
    def test_values(self, ours, plain, make, others):
        args = make(True)
        dims = (0 if others else None,) * len(args)
        many, ids = batch(args, dims), torch.stack([IDS, IDS.flip(0)], 1)
        close(*(vmap(f, (*dims, 1))(*many, ids) for f in (ours, plain)))

    @pytest.mark.parametrize("bad", [-1, TASKS, 2**62])
    def test_out_of_range(self, ours, plain, make, bad):
        """An id too large must not reach into the tasks of the next call, nor one too small."""
        args = make(True)
        for n in range(SIZE):
            ids = torch.stack([IDS] * SIZE)
            ids[n, 0] = bad
            with pytest.raises(IndexError, match="task_ids"):
                vmap(lambda ids: ours(*args, ids))(ids)


@pytest.fixture
def model():
    hyper = hyperfast.HyperNet(5, 4, 8, 3, activation="tanh", target_activation="tanh")
    return hyperfast.HyperMLP(hyper).double()


class TestModel:
    def test_per_sample_gradients(self, model):
        """vmap of grad over the tasks equals one backward pass a task."""
        parameters = dict(model.named_parameters())
        x, z = draw(TASKS, 2, 4), draw(TASKS, 5)

        def one(parameters, x, z):
            return functional_call(model, parameters, (x[None], z[None])).square().sum()

        together = vmap(grad(one), (None, 0, 0))(parameters, x, z)
        for n in range(TASKS):
            alone = torch.autograd.grad(model(x[n : n + 1], z[n : n + 1]).square().sum(),
                                        list(parameters.values()))  # fmt: skip
            close([g[n] for g in together.values()], list(alone))

    def test_laplacian(self, model):
        """Physics losses: the second derivative with respect to the input."""
        z, x = draw(1, 5), draw(1, 4)
        f = lambda x: model(x, z).sum()  # noqa: E731
        target, weights = hyperfast.TargetNet("tanh"), model.hyper(z)
        close(hessian(f)(x), hessian(lambda x: target(x[0], [w[0] for w in weights]).sum())(x))

    def test_vmap_of_a_single_network(self, model):
        """TargetNet on one network, batched by vmap rather than by its own batch."""
        x, z = draw(TASKS, 2, 4), draw(TASKS, 5)
        target, weights = hyperfast.TargetNet("tanh"), model.hyper(z)
        close(vmap(target)(x, weights), target(x, weights))
        close(vmap(model)(x, z), model(x, z))

    def test_an_ensemble_of_models(self, model):
        """Every parameter batched."""
        x, z = draw(TASKS, 2, 4), draw(TASKS, 5)
        models = [
            {k: torch.randn_like(p) for k, p in model.named_parameters()} for _ in range(SIZE)
        ]
        stacked = {k: torch.stack([m[k] for m in models]) for k in models[0]}
        run = lambda p: functional_call(model, p, (x, z))  # noqa: E731
        close(vmap(run)(stacked), torch.stack([run(m) for m in models]))
