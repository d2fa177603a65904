"""The registered ops as Triton kernels, for CUDA and ROCm devices; signatures are those of the ops.

``layers``     the ops of single layers: which plan, hence which kernels
``trilinear``  a generated layer and its derivatives, the weights never stored
``parts``      fp32 numbers as sums of bf16, which matrix units multiply
``grouped``    rows times the given weights of their tasks, and the gradient of those
``network``    a generated network: in one kernel where it fits, else by its layers
``stored``     given networks: likewise
``look_up``    the slots of a bank's tasks
``activation`` what follows a layer, and the transforms of weights, inside a kernel
``launch``     tiles, rows and tasks, the choice of a configuration
``direct``     compiled kernels, launched without Triton's look-up of them

Rows of mixed tasks are never moved: they are read, and written, as they lie where they are few, or
through the order that a stable sort of their task ids gives. Offsets that can pass 2^31 elements
are 64-bit. No kernel adds floats atomically: the same arguments give the same bits.

``HYPERFAST_AUTOTUNE=1`` times the configurations of a kernel at the first call of a size, and keeps
the fastest. With ``HYPERFAST_DIRECT_LAUNCH=0`` every launch is Triton's own.
"""

from hyperfast.kernels.triton.layers import (
    hyper_linear,
    hyper_linear_backward,
    hyper_linear_grad_h,
    hyper_linear_grad_weight,
    task_linear,
    task_linear_grad_weight,
)
from hyperfast.kernels.triton.network import hyper_mlp, hyper_mlp_backward
from hyperfast.kernels.triton.stored import task_mlp, task_mlp_backward

__all__ = [
    "hyper_linear",
    "hyper_linear_backward",
    "hyper_linear_grad_h",
    "hyper_linear_grad_weight",
    "hyper_mlp",
    "hyper_mlp_backward",
    "task_linear",
    "task_linear_grad_weight",
    "task_mlp",
    "task_mlp_backward",
]
