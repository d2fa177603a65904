"""Random arguments for every registered op in every variant, and what the op should return."""

from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast.kernels import eager, reference
from hyperfast.layout import TRANSFORMS
from hyperfast.plans.sizes import PLANS
from tests.support.budget import close
from tests.support.draw import draw


class Sizes(NamedTuple):
    tasks: int = 3
    rows: int = 2  # a task; when ragged, on average
    ins: int = 4
    outs: int = 5
    features: int = 3


SIZES = [
    Sizes(),
    Sizes(1, 1, 1, 1, 1),
    Sizes(3, 3, 3, 3, 3),
    Sizes(2, 3, 63, 3, 1),
    Sizes(3, 1, 1, 63, 3),
    Sizes(1, 63, 3, 1, 63),
    Sizes(63, 1, 3, 3, 1),
    Sizes(tasks=0),
    Sizes(rows=0),
]


class Variant(NamedTuple):
    """One op with its options; those that it does not have are left at their defaults."""

    name: str
    ragged: bool
    bias: bool = True
    target_bias: bool = True
    plan: str = ""
    transform: str = ""

    def __str__(self):
        on = [self.name, "ragged" if self.ragged else "batched", self.plan or "auto"]
        on += ["bias"] * self.bias + ["target_bias"] * self.target_bias
        return "-".join(on + [self.transform] * bool(self.transform))

    def random(self, sizes=Sizes(), *, dtype=torch.float64, grad=False):  # noqa: B008
        """The op's arguments. When ragged, rows come in mixed order and the last task, unless it is
        the only one, has none."""
        tasks, rows, ins, outs, features = sizes
        lead = (tasks * rows,) if self.ragged else (tasks, rows)

        rand = partial(draw, dtype=dtype, grad=grad)
        ids = torch.randint(max(tasks - 1, 1), lead[:1]) if self.ragged else None
        x, h, g = rand(*lead, ins), rand(tasks, features), rand(*lead, outs)
        if self.transform:  # exp of what is large would leave few digits to compare
            h = (h.detach() / 4).requires_grad_(grad)
        matrix = rand(outs, ins, features)
        matrix_bias = rand(outs, ins) if self.bias else None
        vector = rand(outs, features) if self.target_bias else None
        vector_bias = rand(outs) if self.bias and self.target_bias else None
        return {
            "task_linear": lambda: (
                x,
                rand(tasks, outs, ins),
                rand(tasks, outs) if self.bias else None,
                ids,
            ),
            "task_linear_grad_weight": lambda: (g, x, ids, tasks),
            "hyper_linear": lambda: (
                *(x, h, matrix, matrix_bias, vector, vector_bias),
                *(ids, self.transform, self.plan),
            ),
            "hyper_linear_grad_h": lambda: (g, x, matrix, vector, ids, tasks, self.plan),
            "hyper_linear_grad_weight": lambda: (g, x, h, ids, self.target_bias, self.plan),
        }[self.name]()

    @property
    def op(self):
        return getattr(torch.ops.hyperfast, self.name).default

    @property
    def eager(self):
        """What runs where no backend has a kernel; a faster kernel hides it from the dispatcher."""
        return getattr(eager, self.name, getattr(reference, self.name))

    @property
    def kernels(self):
        """The op as it is dispatched, and without its backend."""
        return [self.op, self.eager]

    def expected(self, *args):
        """What the specification says, for the same arguments."""
        return getattr(reference, self.name)(*args[: len(args) - ("hyper" in self.name)])


def _variants():
    both = (False, True)
    for ragged in both:
        yield from (Variant("task_linear", ragged, bias) for bias in both)
        yield Variant("task_linear_grad_weight", ragged)
        for plan in ("", *PLANS):
            for bias, target_bias in product(both, both):
                yield Variant("hyper_linear", ragged, bias, target_bias, plan)
            for transform in TRANSFORMS:
                yield Variant("hyper_linear", ragged, plan=plan, transform=transform)
            for bias in both:
                yield Variant("hyper_linear_grad_h", ragged, True, bias, plan)
                yield Variant("hyper_linear_grad_weight", ragged, True, bias, plan)


VARIANTS = list(_variants())
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
# For kernels that compile anew for every combination: both biases or none, and weights not stored.
PAIRED = [
    v for v in VARIANTS if (v.bias == v.target_bias or v.name != "hyper_linear") and not v.transform
]
FUSED = [v for v in PAIRED if v.plan == "contract" or v.name.startswith("task")]
every_fused = pytest.mark.parametrize("variant", FUSED, ids=str)
unplanned = pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.plan], ids=str)
every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))


def is_float(a):
    return isinstance(a, Tensor) and a.is_floating_point()


def floats(args):
    """The tensors among ``args`` that can have a gradient."""
    return [a for a in args if is_float(a)]


def value_and_gradients(variant, sizes):
    """Checks the op against the specification; returns the arguments and the expected value."""
    args = variant.random(sizes, grad=True)
    expected = variant.expected(*args)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, floats(args), weight)
    y = variant.op(*args)
    close(y, expected)
    close(torch.autograd.grad(y, floats(args), weight), gradients)
    return args, expected
