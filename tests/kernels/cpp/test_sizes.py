"""Sizes that multiply beyond 64 bits: expanded and empty tensors can name any; none may crash."""

import pytest
import torch

from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR

pytestmark = pytest.mark.skipif(EXTENSION is None, reason=EXTENSION_ERROR or "built")
op = torch.ops.hyperfast
WIDE = torch.zeros(1).expand(1, 1, 2**32)
HALF = WIDE[..., : 2**31]
MADE = torch.zeros(1).expand(2**31, 2**31, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: op.hyper_linear_grad_weight(WIDE, WIDE, torch.ones(1, 4), None, False, ""),
        lambda: op.hyper_linear_grad_h(HALF, HALF, MADE, None, None, 1, ""),
        lambda: op.task_linear_grad_weight(WIDE, WIDE, None, 1),
        lambda: op.hyper_linear(
            *(torch.empty(4, 0, 2**30), torch.empty(4, 0), torch.empty(2**30, 2**30, 0)),
            *(None, None, None, None, "", "materialize"),
        ),
    ],
    ids=["grad_weight", "grad_h", "task_grad_weight", "forward"],
)
def test_products_beyond_64_bits_are_refused(call):
    with pytest.raises(ValueError, match="must not multiply to more than"):
        call()


def test_no_parameters_and_very_many_inputs():
    y = op.hyper_linear(WIDE, torch.ones(1, 4), torch.empty(0, 2**32, 4), *[None] * 4, "", "")
    assert y.shape == (1, 1, 0)
