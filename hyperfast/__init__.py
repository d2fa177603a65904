"""Thousands of small neural networks at once: hypernetworks, batched, at the machine's speed."""

from hyperfast import functional
from hyperfast.activations import Sine
from hyperfast.backend import use_backend
from hyperfast.bank import TaskBank
from hyperfast.hypernet import HyperNet
from hyperfast.model import HyperMLP
from hyperfast.module_target import ModuleTarget
from hyperfast.plan import explain
from hyperfast.server import TaskServer
from hyperfast.sharded_bank import ShardedTaskBank
from hyperfast.spec import MLPSpec
from hyperfast.target import TargetNet

__all__ = [
    "HyperMLP",
    "HyperNet",
    "MLPSpec",
    "ModuleTarget",
    "ShardedTaskBank",
    "Sine",
    "TargetNet",
    "TaskBank",
    "TaskServer",
    "explain",
    "functional",
    "use_backend",
]
__version__ = "0.1.0"
