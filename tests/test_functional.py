"""The public functions say in one line what they compute: that line, in plain PyTorch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import hyperfast
from hyperfast import functional
from hyperfast.plans.sizes import PLANS
from tests.support.budget import close
from tests.support.draw import draw

TASKS, ROWS, INS, OUTS, FEATURES = 3, 4, 5, 2, 6
IDS = torch.tensor([1, 1, 0, 1])  # task 2 has no rows


def layer(w, b, x, ids):
    """Row by row."""
    if ids is None:
        return torch.stack(
            [F.linear(x[n], w[n], None if b is None else b[n]) for n in range(TASKS)]
        )
    return torch.stack(
        [F.linear(row, w[n], None if b is None else b[n]) for row, n in zip(x, ids, strict=True)]
    )


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ids", [None, IDS], ids=["batched", "ragged"])
def test_task_linear(ids, has_bias):
    x = draw(ROWS, INS) if ids is not None else draw(TASKS, ROWS, INS)
    w, b = draw(TASKS, OUTS, INS), draw(TASKS, OUTS) if has_bias else None
    close(functional.task_linear(x, w, b, ids), layer(w, b, x, ids))


def test_one_row_a_task_needs_no_dimension_of_rows():
    x, w, b = draw(TASKS, INS), draw(TASKS, OUTS, INS), draw(TASKS, OUTS)
    close(functional.task_linear(x, w, b), layer(w, b, x.unsqueeze(1), None).squeeze(1))


@pytest.mark.parametrize(("bias", "target_bias"), list(product([True, False], repeat=2)))
@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("ids", [None, IDS], ids=["batched", "ragged"])
def test_hyper_linear(ids, plan, bias, target_bias):
    x = draw(ROWS, INS) if ids is not None else draw(TASKS, ROWS, INS)
    h, params = draw(TASKS, FEATURES), OUTS * (INS + target_bias)
    head, head_bias = draw(params, FEATURES), draw(params) if bias else None
    flat = F.linear(h, head, head_bias)
    w = flat[:, : OUTS * INS].unflatten(1, (OUTS, INS))
    b = flat[:, OUTS * INS :] if target_bias else None
    y = functional.hyper_linear(x, h, head, head_bias, ids, target_bias=target_bias, plan=plan)
    close(y, layer(w, b, x, ids))


@pytest.mark.parametrize("ids", [None, IDS], ids=["batched", "ragged"])
def test_hyper_mlp_is_its_layers(ids):
    spec = hyperfast.MLPSpec((INS, 7, OUTS))
    x = draw(ROWS, INS) if ids is not None else draw(TASKS, ROWS, INS)
    h, head, bias = draw(TASKS, FEATURES), draw(spec.numel, FEATURES), draw(spec.numel)
    y = functional.hyper_mlp(x, h, head, bias, spec, [torch.nn.Tanh(), None], ids)
    cut = spec.layers[0].weight_numel + 7
    hidden = functional.hyper_linear(x, h, head[:cut], bias[:cut], ids).tanh()
    close(y, functional.hyper_linear(hidden, h, head[cut:], bias[cut:], ids))
