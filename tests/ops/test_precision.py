"""Lower precision by an error budget: what the specification itself loses in that dtype."""

import pytest
import torch

from hyperfast.kernels import eager
from tests.support.budget import assert_as_good
from tests.support.cases import PLANS, Sizes, every_variant, floats


@pytest.mark.parametrize("sizes", [Sizes(4, 3, 16, 16, 16), Sizes(3, 63, 3, 63, 63)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_variant
def test_error_within_budget(variant, dtype, sizes):
    """At most twice the specification's own error, one rounding of the largest result, and one fp32
    rounding of the largest sum of absolute terms, as sums are kept in fp32 in any order."""
    args = variant.random(sizes, dtype=dtype)
    wide = [a.double() if floats([a]) else a for a in args]
    exact = variant.expected(*wide)
    terms = variant.expected(*[a.abs() if floats([a]) else a for a in wide])

    for kernel in variant.kernels:
        y = kernel(*args)
        assert y.dtype == dtype
        assert_as_good(y, variant.expected(*args), exact, terms=terms)


@pytest.mark.parametrize("plan", PLANS)
def test_many_blocks_do_not_drown_in_a_16_bit_sum(plan, monkeypatch):
    """4,096 ones in blocks of 8: a bf16 total would stop at 2,048, where 8 is half a rounding."""
    monkeypatch.setattr(eager, "BLOCK", 8)
    ones = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    args = (ones, ones, ones[:, :, 0], None, False, plan)
    for kernel in (eager.hyper_linear_grad_weight, torch.ops.hyperfast.hyper_linear_grad_weight):
        assert kernel(*args).item() == 4096
