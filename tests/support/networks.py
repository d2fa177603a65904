"""Random networks, and what they should return."""

from functools import partial

import torch

from hyperfast.kernels import reference
from hyperfast.layout import TRANSFORMS, Network, of_layer
from tests.support.draw import draw

# Biases in some layers only, and a transform of each kind.
MIXED = (
    "3 > 5 tanh, 4 b sin:1.5 abs(W), 2",
    "5 > 33 b silu square(W), 17 softplus, 1 b tanh exp(W)",
    "1 > 63 softplus(W), 3 b elu",
    "2 > 2 b abs(W)",
)


def random(sizes, tasks, rows, features, *, target_bias=True, **options):
    """:func:`random_for` a network of these sizes."""
    return random_for(text(sizes, "identity", target_bias), tasks, rows, features, **options)


def random_for(network, tasks, rows, features, *, ragged=False, bias=True, grad=True):
    """Arguments of ``hyper_mlp`` up to the network. When ragged, the last of several tasks has no
    rows, and rows come in mixed order."""
    net = Network.parse(network)
    lead = (tasks * rows,) if ragged else (tasks, rows)
    ids = torch.randint(max(tasks - 1, 1), lead) if ragged else None

    rand = partial(draw, grad=grad)
    # So that hidden layers stay of the order of 1, and sines of sines do not amplify rounding: with
    # a bias of 1, half a unit in the inputs moves gradients in fp64 by as much as plain fp32 errs.
    scale = max(net.sizes) ** -0.5
    head = rand(net.numel, features, scale=scale * features**-0.5)
    return [
        *(rand(*lead, net.sizes[0]), rand(tasks, features), head),
        *(rand(net.numel, scale=scale) if bias else None, ids),
    ]


def text(sizes, activations, has_bias=True):
    """The text of a network with these activations, one a layer, in a list or separated by commas;
    a single one that is not in a list stands behind all layers but the last."""
    names = activations.split(",") if isinstance(activations, str) else activations
    if isinstance(activations, str) and len(names) == 1:
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
    return stored_for(text(sizes, "identity"), tasks, rows, ragged=ragged, dtype=dtype)


def stored_for(network, tasks, rows, *, ragged, dtype=torch.float64, scale=1.0):
    """Rows, parameters and ids of given networks; the last of several tasks has no mixed rows."""
    net = Network.parse(network)
    lead = (tasks * rows,) if ragged else (tasks, rows)
    x, weight = draw(*lead, net.sizes[0]), draw(tasks, net.numel, scale=scale)
    ids = torch.randint(max(tasks - 1, 1), lead) if ragged else None
    return x.to(dtype), weight.to(dtype), ids


def expected_stored(x, weight, ids, network):
    """The layers of given networks by the specification."""
    for layer in Network.parse(network).layers:
        own = weight[:, layer.begin : layer.end]
        w = own[:, : layer.weight_numel].unflatten(1, (layer.out_features, layer.in_features))
        w = TRANSFORMS[layer.transform].value(w) if layer.transform else w
        bias = own[:, layer.weight_numel :] if layer.bias else None
        x = layer.activate(reference.task_linear(x, w, bias, ids))
    return x


def apply_stored(x, weight, ids, network):
    """Row by row, in fp64: nothing shared with what is tested."""
    net = Network.parse(network)
    flat = x.double().reshape(-1, net.sizes[0])
    owners = ids if ids is not None else torch.arange(len(weight)).repeat_interleave(x.shape[1])
    out = [torch.empty(0, net.sizes[-1], dtype=torch.float64)]
    for row, owner in zip(flat, owners.tolist(), strict=True):
        for layer in net.layers:
            mine, m = weight[owner, layer.begin : layer.end].double(), layer.weight_numel
            w = TRANSFORMS[layer.transform].value(mine[:m]) if layer.transform else mine[:m]
            row = w.view(layer.out_features, layer.in_features) @ row
            row = layer.activate(row + mine[m:] if layer.bias else row)
        out.append(row.unsqueeze(0))
    return torch.cat(out).view(*x.shape[:-1], net.sizes[-1])
