"""What a PyTorch user can write without a library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import linear

from bench.problem import ACTIVATIONS, Problem, target_weights
from bench.rivals.rival import Network, in_bf16, load_linears, torch_rival
from bench.workloads import MLP, Workload


class Activation(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def target_module(workload: Workload) -> nn.Sequential:
    """One target network as an ordinary module: Linear, activation, ..., Linear."""
    modules: list[nn.Module] = []
    for i, o in workload.layers:
        modules += [nn.Linear(i, o), Activation(workload.activation)]
    return nn.Sequential(*modules[:-1])


def generator(problem: Problem) -> tuple[nn.Sequential, tuple[Tensor, ...]]:
    w = problem.workload
    module = nn.Sequential(nn.Linear(w.z_dim, w.H), nn.ReLU(), nn.Linear(w.H, w.P))
    module.to(problem.z.dtype)
    return module, load_linears(module, problem)


def loop(problem: Problem) -> Network:
    """Weights of all tasks by one GEMM, then one small network after another. unbind rather than
    indexing: the gradient of b indexings is b full-size tensors."""
    generate, leaves = generator(problem)
    activation = ACTIVATIONS[problem.workload.activation]

    def single(z: Tensor, x: Tensor) -> Tensor:
        """The body alone, as one writes it for a single task."""
        rows = x.squeeze(0)
        for index, (weight, bias) in enumerate(target_weights(generate(z), problem.workload)):
            rows = linear(
                rows if index == 0 else activation(rows), weight.squeeze(0), bias.squeeze(0)
            )
        return rows.unsqueeze(0)

    def function(z: Tensor, x: Tensor) -> Tensor:
        layers = [
            (weight.unbind(), bias.unbind())
            for weight, bias in target_weights(generate(z), problem.workload)
        ]
        outputs = []
        for task, rows in enumerate(x.unbind()):
            for index, (weights, biases) in enumerate(layers):
                rows = linear(rows if index == 0 else activation(rows), weights[task], biases[task])
            outputs.append(rows)
        return torch.stack(outputs)

    return (single if problem.workload.B == 1 else function), leaves


def vmap_functional_call(problem: Problem) -> Network:
    generate, leaves = generator(problem)
    target = target_module(problem.workload).to("meta")
    names = [name for name, _ in target.named_parameters()]
    apply = vmap(lambda parameters, rows: functional_call(target, parameters, (rows,)))

    def function(z: Tensor, x: Tensor) -> Tensor:
        layers = target_weights(generate(z), problem.workload)
        flat = [tensor for layer in layers for tensor in layer]
        return apply(dict(zip(names, flat, strict=True)), x)

    return function, leaves


def apply_bmm(workload: MLP, layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    activation = ACTIVATIONS[workload.activation]
    for index, (weight, bias) in enumerate(layers):
        x = x if index == 0 else activation(x)
        x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return x


def bmm(problem: Problem) -> Network:
    generate, leaves = generator(problem)

    def function(z: Tensor, x: Tensor) -> Tensor:
        return apply_bmm(problem.workload, target_weights(generate(z), problem.workload), x)

    return function, leaves


def bmm_by_layer(problem: Problem) -> Network:
    """A GEMM for each layer's share of the head, so that one layer's weights can be dropped before
    the next are made: the fastest plain PyTorch we know once compiled (max-autotune adds nothing on
    a CPU)."""
    generate, leaves = generator(problem)
    trunk = generate[:-1]
    head_weight, head_bias = leaves[2:]
    w = problem.workload
    sizes = [size for i, o in w.layers for size in (o * i, o)]

    def function(z: Tensor, x: Tensor) -> Tensor:
        features = trunk(z)
        pieces = zip(head_weight.split(sizes), head_bias.split(sizes), strict=True)
        made = iter([linear(features, weight, bias) for weight, bias in pieces])
        layers = [(next(made).unflatten(1, (o, i)), next(made)) for i, o in w.layers]
        return apply_bmm(w, layers, x)

    return function, leaves


def compiled(network: Callable[[Problem], Network]) -> Callable[[Problem], Network]:
    def build(problem: Problem) -> Network:
        function, leaves = network(problem)
        return torch.compile(function, fullgraph=True, dynamic=False), leaves

    return build


TORCH_RIVALS = (
    torch_rival("loop", "one GEMM for all weights, then a Python loop over tasks", loop),
    torch_rival("vmap", "torch.func.vmap(functional_call)", vmap_functional_call),
    torch_rival("bmm", "one GEMM for all weights, then baddbmm a layer", bmm),
    torch_rival("bmm compiled", "the same under torch.compile", compiled(bmm)),
    torch_rival(
        "bmm by layer compiled",
        "a GEMM for each layer's share of the head, then baddbmm, under torch.compile",
        compiled(bmm_by_layer),
    ),
    in_bf16("bmm bf16", "bmm in bfloat16", bmm),
    in_bf16("bmm by layer compiled bf16", "the same by layer and compiled", compiled(bmm_by_layer)),
)
