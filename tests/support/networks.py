"""Random networks, and what they should return."""

from functools import partial
from itertools import pairwise

import torch

from hyperfast.kernels import reference
from hyperfast.layout import Network, of_layer
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


def text(sizes, activations, has_bias=True):
    """The text of a network with these activations, one a layer, separated by commas; a single one
    stands behind all layers but the last."""
    names = activations.split(",")
    if len(names) == 1:
        names = [*names * (len(sizes) - 2), "identity"]
    layers = [
        f"{o}{' b' * has_bias}{'' if name == 'identity' else f' {name}'}"
        for o, name in zip(sizes[1:], names, strict=True)
    ]
    return f"{sizes[0]} > {', '.join(layers)}"


def expected(x, h, weight, bias, ids, network):
    """The layers, each by the specification and differentiated by PyTorch itself."""
    for layer in Network.parse(network).layers:
        made = of_layer(weight, bias, layer)
        x = layer.activate(reference.hyper_linear(x, h, *made, ids, layer.transform))
    return x


def stored(sizes, tasks, rows, *, ragged, dtype=torch.float64):
    params = sum(o * (i + 1) for i, o in pairwise(sizes))
    lead = (tasks * rows,) if ragged else (tasks, rows)
    x = torch.randn(*lead, sizes[0], dtype=torch.float64).to(dtype)
    weight = torch.randn(tasks, params, dtype=torch.float64).to(dtype)
    return x, weight, torch.randint(max(tasks - 1, 1), lead) if ragged else None


def apply_stored(x, weight, ids, network):
    """Row by row, in fp64: nothing shared with what is tested."""
    net = Network.parse(network)
    flat = x.double().reshape(-1, net.sizes[0])
    owners = ids if ids is not None else torch.arange(len(weight)).repeat_interleave(x.shape[1])
    out = [torch.empty(0, net.sizes[-1], dtype=torch.float64)]
    for row, owner in zip(flat, owners.tolist(), strict=True):
        for layer in net.layers:
            mine, m = weight[owner, layer.begin : layer.end].double(), layer.weight_numel
            row = layer.activate(
                mine[:m].view(layer.out_features, layer.in_features) @ row + mine[m:]
            )
        out.append(row.unsqueeze(0))
    return torch.cat(out).view(*x.shape[:-1], net.sizes[-1])
