"""The ops of generated layers on the rows of a head, as a hypernetwork has them."""

import torch

from hyperfast.layout import Generated

op = torch.ops.hyperfast


def hyper_linear(x, h, weight, bias, ids, has_bias, plan):
    made = Generated.of_head(weight, bias, x.shape[-1], has_bias)
    return op.hyper_linear(x, h, *made, ids, "", plan)


def grad_x(grad, h, weight, bias, ids, plan):
    """``weight`` and ``bias`` hold no rows of the layer's bias."""
    sizes = grad.shape[-1], len(weight) // grad.shape[-1]
    shared = None if bias is None else bias.unflatten(0, sizes)
    made = Generated(weight.unflatten(0, sizes), shared)
    return op.hyper_linear(grad, h, *made.transposed, ids, "", plan)


def backward(grad, x, h, weight, bias, ids, has_bias, transform, plan):
    """All gradients but that of x, the gradient of G formed once."""
    made = Generated.of_head(weight, bias, x.shape[-1], has_bias)[:3]
    return op.hyper_linear_backward(grad, x, h, *made, ids, transform, [True] * 3, plan)


def grad_h(grad, x, weight, ids, tasks, has_bias, plan):
    made = Generated.of_head(weight, None, x.shape[-1], has_bias)
    return op.hyper_linear_grad_h(grad, x, made.matrix, made.vector, ids, tasks, plan)
