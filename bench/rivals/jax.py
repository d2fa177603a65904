"""JAX: one task's function, vmapped over tasks, jitted together with its gradient."""

from __future__ import annotations

from typing import Any

from bench.absent import require
from bench.problem import Problem
from bench.rivals.rival import Call, Rival


def build(problem: Problem, mode: str) -> Call:
    jax = require("jax")
    jnp = jax.numpy
    w = problem.workload
    activation = {"relu": jax.nn.relu, "sin": jnp.sin}[w.activation]
    device = jax.devices("cpu")[0]

    def array(tensor: Any) -> Any:
        if tensor.is_cuda:
            return jax.dlpack.from_dlpack(tensor)
        return jax.device_put(tensor.numpy(), device)

    parameters = tuple(array(t) for t in problem.parameters)
    z, x, grad = array(problem.z), array(problem.x), array(problem.grad)

    # A slice of the head for each layer, rather than slices of one flat vector: half the time of
    # forward+backward on mlp128_n1, and no slower elsewhere.
    def one_task(parameters: Any, z: Any, x: Any) -> Any:
        trunk_weight, trunk_bias, head_weight, head_bias = parameters
        features = jax.nn.relu(z @ trunk_weight.T + trunk_bias)
        offset = 0

        def generate(count: int) -> Any:
            nonlocal offset
            piece = slice(offset, offset + count)
            offset += count
            return features @ head_weight[piece].T + head_bias[piece]

        for index, (i, o) in enumerate(w.layers):
            weight, bias = generate(o * i).reshape(o, i), generate(o)
            x = (x if index == 0 else activation(x)) @ weight.T + bias
        return x

    network = jax.vmap(one_task, in_axes=(None, 0, 0))

    def value_and_grad(parameters: Any, z: Any, x: Any, grad: Any) -> Any:
        y, pullback = jax.vjp(lambda p, z: network(p, z, x), parameters, z)
        grads, grad_z = pullback(grad)
        return (y, *grads, grad_z)

    if mode == "forward":
        forward = jax.jit(network)
        return lambda: (forward(parameters, z, x).block_until_ready(),)
    both = jax.jit(value_and_grad)
    return lambda: jax.block_until_ready(both(parameters, z, x, grad))


JAX_RIVAL = Rival("jax", "jit(vmap), gradients by vjp inside the jit", build)
