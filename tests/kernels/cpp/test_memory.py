"""The C++ kernels keep no memory from call to call."""

import ctypes
import platform

import pytest
import torch

from hyperfast.layout import Generated
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR

if EXTENSION is None:
    pytest.skip(EXTENSION_ERROR, allow_module_level=True)
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
W = torch.randn(4, 2, 5)
MADE = Generated.of_head(torch.randn(12, 6), torch.randn(12), 5, True)
P = 3 * 6 + 2 * 4
NETWORK = "5 > 3 b elu, 2 b"
OF_H = MADE.matrix, MADE.vector
MLP = (X, H, torch.randn(P, 6), torch.randn(P), None, NETWORK)
Y, Z, FLAT = torch.randn(4, 3, 2), torch.randn(4 * 3 * 3), torch.randn(4, P)
TRUNK = H, [torch.randn(6, 6), torch.randn(6)]
STATE = [torch.zeros(3, n) for n in (2, 2, 1, 1)]
SHAPES = (12, 5), (12, 2), (4, 1), (4,), (12, 1), (12,), (12, 2, 1), (4, 1, 2)
LSTM = X[0], None, STATE, [torch.zeros(s) for s in SHAPES], [3]
KEPT = [*STATE, torch.zeros(3, 20)]
LAYERS = (4, 5), (6, 4), (4, 5), (3, 4), (3, 5), (1, 3), (3, 5)  # hyper 4, embed 3
MIXER = H[:, :2], X[:, 0], [torch.zeros(s) for o, i in LAYERS for s in ((o, i), (o,))]
CALLS = {
    "task_linear": lambda: op.task_linear(X, W, W[:, :, 0], None),
    "task_linear_grad_weight": lambda: op.task_linear_grad_weight(G, X, None, 4),
    "low_rank": lambda: op.low_rank(X, W, W.mT, X[:, 0], X, None),
    "add_low_rank_": lambda: op.add_low_rank_(X.clone(), X, W, W.mT, X[:, 0], None),
    "low_rank_backward": lambda: op.low_rank_backward(X, X, W, W.mT, None, [True] * 4),
    "hyper_linear": lambda: op.hyper_linear(X, H, *MADE, None, "exp", "tile"),
    "hyper_linear_grad_h": lambda: op.hyper_linear_grad_h(G, X, *OF_H, None, 4, ""),
    "hyper_linear_backward": lambda: op.hyper_linear_backward(
        G, X, H, *MADE[:3], None, "exp", [True] * 3, ""
    ),
    "hyper_mlp": lambda: op.hyper_mlp(*MLP, True),
    "hyper_mlp_backward": lambda: op.hyper_mlp_backward(Y, *MLP[:5], Z, *MLP[5:], [True] * 4),
    "trunk_mlp": lambda: op.trunk_mlp(X, *TRUNK, *MLP[2:5], "6 > 6 b relu", NETWORK, True),
    "trunk_mlp_backward": lambda: op.trunk_mlp_backward(
        Y, X, *TRUNK, *MLP[2:5], H, Z, "6 > 6 b relu", NETWORK, [True] * 5
    ),
    "task_mlp": lambda: op.task_mlp(X, FLAT, None, None, NETWORK),
    "task_mlp_backward": lambda: op.task_mlp_backward(Y, X, FLAT, None, NETWORK, [True] * 2),
    "hyper_linear_grad_weight": lambda: op.hyper_linear_grad_weight(G, X, H, None, True, ""),
    "hyper_lstm": lambda: op.hyper_lstm(*LSTM, True),
    "mixer": lambda: op.mixer(*MIXER, True),
    "mixer_backward": lambda: op.mixer_backward(
        Y[:, 0, :1], *MIXER, torch.zeros(4, 64), [True] * 3
    ),
    "hyper_lstm_backward": lambda: op.hyper_lstm_backward(None, STATE, *LSTM, KEPT, [True] * 9),
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
