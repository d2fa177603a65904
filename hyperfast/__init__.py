"""Thousands of small neural networks at once: hypernetworks, batched, at the machine's speed."""

from hyperfast import functional
from hyperfast.activations import Sine
from hyperfast.bank import TaskBank
from hyperfast.distributed.sharded_bank import ShardedTaskBank
from hyperfast.layout import MLPSpec
from hyperfast.nn.any_module import ModuleTarget
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.linear import HyperLinear, TaskLinear
from hyperfast.nn.model import HyperMLP
from hyperfast.nn.target import TargetNet
from hyperfast.nn.task_mlp import TaskMLP
from hyperfast.ops.backends import use_backend
from hyperfast.plans.explain import explain
from hyperfast.server import TaskServer

__all__ = [
    "HyperLinear",
    "HyperMLP",
    "HyperNet",
    "MLPSpec",
    "ModuleTarget",
    "ShardedTaskBank",
    "Sine",
    "TargetNet",
    "TaskBank",
    "TaskLinear",
    "TaskMLP",
    "TaskServer",
    "explain",
    "functional",
    "use_backend",
]
__version__ = "0.1.0"
