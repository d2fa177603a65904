"""Hypernetwork packages from PyPI, each doing the same work with its own hyper- and target network.

None of them batches the target network over tasks, so each gets torch.func.vmap around its own
forward, which is faster than the loop over tasks that their examples show.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import vmap

from bench.absent import require
from bench.problem import ACTIVATIONS, Problem, target_weights
from bench.rivals.plain import generator, target_module
from bench.rivals.rival import Network, load_linears, torch_rival


def hypnettorch(problem: Problem) -> Network:
    """HMLP generates, its MLP applies. HMLP's per-task lists would cost a Python loop, so its flat
    output is taken."""
    hnets, mnets = require("hypnettorch.hnets"), require("hypnettorch.mnets.mlp")
    w = problem.workload
    target = mnets.MLP(
        n_in=w.sizes[0],
        n_out=w.sizes[-1],
        hidden_layers=list(w.sizes[1:-1]),
        activation_fn=ACTIVATIONS[w.activation],
        no_weights=True,
        verbose=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that no embeddings are kept inside: z is ours
        hyper = hnets.HMLP(
            target.param_shapes,
            uncond_in_size=w.z_dim,
            cond_in_size=0,
            num_cond_embs=0,
            layers=(w.H,),
            verbose=False,
        )
    leaves = tuple(hyper.unconditional_params)
    with torch.no_grad():
        for leaf, value in zip(leaves, problem.parameters, strict=True):
            leaf.copy_(value)
    apply = vmap(lambda weights, rows: target(rows, weights=weights))

    def function(z: Tensor, x: Tensor) -> Tensor:
        flat = hyper(uncond_input=z, ret_format="flattened")
        return apply([t for layer in target_weights(flat, w) for t in layer], x)

    return function, leaves


def hyperlight(problem: Problem) -> Network:
    """A hypernetized module and hyperlight.HyperNet; its input encoding is switched off."""
    hl = require("hyperlight")
    w = problem.workload
    plain = target_module(w)
    target = hl.hypernetize(plain, modules=[m for m in plain if isinstance(m, nn.Linear)])
    hyper = hl.HyperNet(
        input_shapes={"z": (w.z_dim,)},
        output_shapes=target.external_shapes(),
        hidden_sizes=[w.H],
        encoding=None,
        fc_kws={"nonlinearity": "ReLU"},
    )
    leaves = load_linears(hyper.backbone, problem)

    def one_task(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
        with target.using_externals(weights):
            return target(rows)

    apply = vmap(one_task)

    def function(z: Tensor, x: Tensor) -> Tensor:
        if w.B == 1:  # its HyperNet drops a batch of one
            return one_task(hyper(z=z), x.squeeze(0)).unsqueeze(0)
        return apply(hyper(z=z), x)

    return function, leaves


def hyper_nn(problem: Problem) -> Network:
    """Its ready-made networks own their embeddings; z comes in by subclassing, as its base class
    intends. The package supplies the split and the functional target."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it builds on functorch.make_functional, deprecated
        base = require("hypernn.torch").TorchHyperNetwork
        generate, leaves = generator(problem)

        class Conditional(base):  # type: ignore[misc, valid-type]
            def generate_params(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                return generate(z), {}

        hyper = Conditional(target_module(problem.workload))

    def one_task(flat: Tensor, rows: Tensor) -> Tensor:
        return hyper.target_forward(rows, generated_params=flat)

    apply = vmap(one_task)

    def function(z: Tensor, x: Tensor) -> Tensor:
        return apply(hyper.generate_params(z)[0], x)

    return function, leaves


PACKAGES = (
    torch_rival("hypnettorch", "HMLP and its MLP under torch.func.vmap", hypnettorch),
    torch_rival(
        "hyperlight", "HyperNet and a hypernetized target under torch.func.vmap", hyperlight
    ),
    torch_rival("hyper-nn", "TorchHyperNetwork's target under torch.func.vmap", hyper_nn),
)
