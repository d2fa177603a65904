"""The registered ops. To import this package is to register them, as who loads an exported program
must."""

from hyperfast.ops.hyper_lstm import hyper_lstm, hyper_lstm_backward
from hyperfast.ops.layer import (
    hyper_linear,
    hyper_linear_backward,
    hyper_linear_grad_h,
    hyper_linear_grad_weight,
    task_linear,
    task_linear_grad_weight,
)
from hyperfast.ops.low_rank import add_low_rank_, low_rank, low_rank_backward
from hyperfast.ops.mixer import mixer, mixer_backward
from hyperfast.ops.network import hyper_mlp, hyper_mlp_backward, task_mlp, task_mlp_backward
from hyperfast.ops.trunk import trunk_mlp, trunk_mlp_backward

__all__ = [
    "add_low_rank_",
    "hyper_linear",
    "hyper_linear_backward",
    "hyper_linear_grad_h",
    "hyper_linear_grad_weight",
    "hyper_lstm",
    "hyper_lstm_backward",
    "hyper_mlp",
    "hyper_mlp_backward",
    "low_rank",
    "low_rank_backward",
    "mixer",
    "mixer_backward",
    "task_linear",
    "task_linear_grad_weight",
    "task_mlp",
    "task_mlp_backward",
    "trunk_mlp",
    "trunk_mlp_backward",
]
