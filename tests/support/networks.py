"""Random networks, and what they should return."""

from functools import partial
from itertools import pairwise

import torch

from hyperfast.kernels import reference
from hyperfast.ops import network as mlp_ops
from tests.support.draw import draw


def random(sizes, tasks, rows, features, *, ragged=False, bias=True, target_bias=True, grad=True):
    """Arguments of ``hyper_mlp`` up to the sizes. When ragged, the last of several tasks has no
    rows, and rows come in mixed order."""
    params = sum(o * (i + target_bias) for i, o in pairwise(sizes))
    lead = (tasks * rows,) if ragged else (tasks, rows)
    ids = torch.randint(max(tasks - 1, 1), lead) if ragged else None

    rand = partial(draw, grad=grad)
    # So that hidden layers stay of the order of 1, and sines of sines do not amplify rounding.
    head = rand(params, features, scale=(features * max(sizes)) ** -0.5)
    return [
        *(rand(*lead, sizes[0]), rand(tasks, features), head),
        *(rand(params) if bias else None, ids),
    ]


def expected(x, h, weight, bias, ids, sizes, target_bias, activations):
    """The layers, each by the specification and differentiated by PyTorch itself."""
    for layer in mlp_ops.layers_of(sizes, target_bias, activations):
        part = None if bias is None else bias[layer.begin : layer.end]
        rows = weight[layer.begin : layer.end]
        x = layer.activate(reference.hyper_linear(x, h, rows, part, ids, target_bias))
    return x


def text(sizes, first, last):
    return ",".join([first] * (len(sizes) - 2) + [last])


def stored(sizes, tasks, rows, *, ragged, dtype=torch.float64):
    params = sum(o * (i + 1) for i, o in pairwise(sizes))
    lead = (tasks * rows,) if ragged else (tasks, rows)
    x = torch.randn(*lead, sizes[0], dtype=torch.float64).to(dtype)
    weight = torch.randn(tasks, params, dtype=torch.float64).to(dtype)
    return x, weight, torch.randint(max(tasks - 1, 1), lead) if ragged else None


def apply_stored(x, weight, ids, sizes, activations):
    """Row by row, in fp64: nothing shared with what is tested."""
    layers = mlp_ops.layers_of(sizes, True, activations)
    flat = x.double().reshape(-1, sizes[0])
    owners = ids if ids is not None else torch.arange(len(weight)).repeat_interleave(x.shape[1])
    out = [torch.empty(0, sizes[-1], dtype=torch.float64)]
    for row, owner in zip(flat, owners.tolist(), strict=True):
        begin = 0
        for layer in layers:
            m = layer.ins * layer.out
            w = weight[owner, begin : begin + m].view(layer.out, layer.ins)
            row = layer.activate(
                w.double() @ row + weight[owner, begin + m :][: layer.out].double()
            )
            begin += m + layer.out
        out.append(row.unsqueeze(0))
    return torch.cat(out).view(*x.shape[:-1], sizes[-1])
