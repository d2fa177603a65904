"""The C++ kernels keep no memory from call to call."""

import ctypes
import platform

import pytest
import torch

from hyperfast.ops import layer as ops

if ops.EXTENSION_ERROR:  # importing hyperfast._C here would register its kernels for all tests
    pytest.skip(ops.EXTENSION_ERROR, allow_module_level=True)
op = torch.ops.hyperfast

FIELDS = [
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
]


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def bytes_in_use():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    return mallinfo2().uordblks


X, H, G = torch.randn(4, 3, 5), torch.randn(4, 6), torch.randn(4, 3, 2)
V, BIAS, W = torch.randn(12, 6), torch.randn(12), torch.randn(4, 2, 5)
P = 3 * 6 + 2 * 4
MLP = (X, H, torch.randn(P, 6), torch.randn(P), None, (5, 3, 2), True, "elu,identity")
Y, Z, FLAT = torch.randn(4, 3, 2), torch.randn(4 * 3 * 3), torch.randn(4, P)
CALLS = {
    "task_linear": lambda: op.task_linear(X, W, W[:, :, 0], None),
    "task_linear_grad_weight": lambda: op.task_linear_grad_weight(G, X, None, 4),
    "hyper_linear": lambda: op.hyper_linear(X, H, V, BIAS, None, True, "tile"),
    "hyper_linear_grad_x": lambda: op.hyper_linear_grad_x(G, H, V[:10], None, None, ""),
    "hyper_linear_grad_h": lambda: op.hyper_linear_grad_h(G, X, V, None, 4, True, ""),
    "hyper_mlp": lambda: op.hyper_mlp(*MLP, True),
    "hyper_mlp_backward": lambda: op.hyper_mlp_backward(Y, *MLP[:5], Z, *MLP[5:], [True] * 4),
    "task_mlp": lambda: op.task_mlp(X, FLAT, None, None, (5, 3, 2), True, "elu,identity"),
    "hyper_linear_grad_weight": lambda: op.hyper_linear_grad_weight(G, X, H, None, True, ""),
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts glibc's heap")
@pytest.mark.parametrize("name", CALLS)
def test_no_byte_stays(name):
    """Less than a byte a call; the smallest block that malloc hands out has 24."""
    call, times = CALLS[name], 20_000
    for _ in range(2000):
        call()
    before = bytes_in_use()
    for _ in range(times):
        call()
    assert bytes_in_use() - before < times
