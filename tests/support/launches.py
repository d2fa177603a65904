"""What the Triton launchers would launch for arguments of many sizes, recorded on CPU tensors and
compiled for devices that need not be there."""

from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hyperfast.kernels import triton as kernels
from hyperfast.kernels.triton import launch as launching
from hyperfast.layout import TRANSFORMS, Generated, Network
from tests.support.networks import text


class Target(NamedTuple):
    gpu: GPUTarget
    shared: int  # bytes that one program may have
    multiprocessors: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, 108),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, 132),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 304),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
KINDS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "high": torch.float32,
    "medium": torch.float32,
    "fp64": torch.float64,
}
RUNS_AS = {"bf16": "half", "fp16": "half"}
TILE = "BM", "BN", "BA", "BB", "BC", "BK", "BR"

# tasks, rows a task, in, out, features, ragged: many rows and few, wide layers and narrow.
SIZES = [
    (20000, 1, 128, 128, 64, False),
    (512, 4, 64, 10, 128, True),
    (4096, 1, 128, 128, 64, False),
    (64, 1, 8, 32, 64, False),
    (16, 64, 2, 64, 256, True),
]
# Networks: rows, sizes, activations, ragged. 16-bit kinds have a tile for each number of rows.
NETWORKS = [
    (40000, (64, 64, 10), "relu,identity", False),
    (40000, (2, 64, 64, 1), "tanh,silu,elu", True),
    (8448, (64, 64, 10), "relu,identity", False),
    (4224, (8, 32, 1), "elu,identity", False),
]


# Layers of transformed weights: one row a task, few and many.
TRANSFORMED = [
    (64, 1, 8, 32, 8, False),
    (128, 4, 64, 10, 8, True),
    (16, 64, 64, 64, 8, True),
]
TRANSFORMED_NETWORK = "64 > 64 b silu softplus(W), 64 relu abs(W), 10 b exp(W)"


class Launch(NamedTuple):
    """One kernel with what the compiler sees of its arguments."""

    kernel: object
    signature: tuple
    constants: tuple
    aligned: tuple
    options: tuple

    @classmethod
    def of(cls, kernel, args, named):
        options = {n: named.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in named}
        if kernel.debug:
            options["debug"] = True
        signature, constants, aligned = {}, dict(named), []
        for p, value in zip(kernel.params, args, strict=False):
            if isinstance(value, torch.Tensor):
                signature[p.name] = "*" + TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    aligned.append(p.name)
            elif value is None or (value == 1 and not p.do_not_specialize):
                constants[p.name] = value
            else:
                signature[p.name] = "i64" if value >= 2**31 else "i32"
                if value % 16 == 0 and not p.do_not_specialize:
                    aligned.append(p.name)
        return cls(
            kernel,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(aligned),
            tuple(options.items()),
        )

    def __str__(self):
        tile = ",".join(f"{n}={v}" for n, v in self.constants if n in TILE)
        options = ",".join(f"{n[4:]}={v}" for n, v in self.options)
        return f"{self.kernel.__name__} {tile} {options}"

    def compile(self, target):
        names = self.kernel.arg_names
        constants = {(names.index(n),): v for n, v in self.constants}
        signature = dict(self.signature) | {n: "constexpr" for n, _ in self.constants}
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in self.aligned}
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=dict(self.options))


def recorded(kind, target, work):
    """What ``work`` would launch on a device."""
    found = {}

    def record(kernel, programs, *args, **named):
        found[Launch.of(kernel, args, named)] = None

    with instead(record, kind, target):
        work()
    return list(found)


@contextmanager
def instead(start, kind, target):
    """Launches for a device are handed to ``start``."""

    def handed(kernel, programs, *args, **named):
        if kernel is launching._keys:  # read by what is not replaced
            args[1].zero_()
        start(kernel, programs, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "start", handed)
        patch.setattr(launching, "multiprocessors", lambda _: TARGETS[target].multiprocessors)
        patch.setattr(launching, "hopper", lambda _: target == "sm_90")
        patch.setattr(launching.gpu, "arithmetic", lambda dtype: RUNS_AS.get(kind, kind))
        yield


def launches(kind, target):
    """What the ops would launch: in bf16 on a Hopper for arguments of every size, else the tiles of
    many rows, batched and mixed, of each layer and of a network."""
    return recorded(kind, target, partial(run_kind, kind, (kind, target) == ("bf16", "sm_90")))


def run_kind(kind, every):
    few = kind in ("fp16", "medium")  # whose other kernels are those of another kind
    for size in SIZES if every else SIZES[: 1 if few else 2]:
        run_all(KINDS[kind], *size)
    if kind == "fp16":
        return
    for network in NETWORKS if every else NETWORKS[1:2]:
        run_network(KINDS[kind], *network)
    if few:
        return
    for size in TRANSFORMED if every else TRANSFORMED[-1:]:
        run_transformed(KINDS[kind], *size, "softplus")
    for transform in TRANSFORMS if every else ():
        run_transformed(KINDS[kind], *TRANSFORMED[-1], transform)
    run_stored(KINDS[kind], 20000, TRANSFORMED_NETWORK)


def run_all(dtype, tasks, n, ins, out, features, ragged):
    rows = (tasks * n,) if ragged else (tasks, n)
    p = out * ins

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    ids = torch.zeros(rows, dtype=torch.int64) if ragged else None
    x, grad, h = empty(*rows, ins), empty(*rows, out), empty(tasks, features)
    head, bias, w = empty(p + out, features), empty(p + out), empty(1, out, ins)
    w = w.expand(tasks, -1, -1)
    made = Generated.of_head(head, bias, ins, True)
    kernels.hyper_linear(x, h, *made, ids, "", "contract")
    kernels.hyper_linear(grad, h, *made.transposed, ids, "", "contract")
    kernels.hyper_linear_grad_h(grad, x, made.matrix, made.vector, ids, tasks, "contract")
    kernels.hyper_linear_grad_weight(grad, x, h, ids, True, "contract")
    kernels.hyper_linear_grad_weight(grad, x, h[:, :1], ids, True, "contract")
    kernels.task_linear(x, w, empty(tasks, out), ids)
    kernels.task_linear(grad, w.mT, None, ids)
    kernels.task_linear_grad_weight(grad, x, ids, tasks)


def run_transformed(dtype, tasks, n, ins, out, features, ragged, transform):
    rows = (tasks * n,) if ragged else (tasks, n)

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    ids = torch.zeros(rows, dtype=torch.int64) if ragged else None
    x, grad, h = empty(*rows, ins), empty(*rows, out), empty(tasks, features)
    made = Generated.of_head(empty(out * ins + out, features), empty(out * ins + out), ins, True)
    kernels.hyper_linear(x, h, *made, ids, transform, "materialize")
    kernels.hyper_linear(grad, h, *made.transposed, ids, transform, "materialize")
    mask = [True, True, True]
    kernels.hyper_linear_backward(grad, x, h, *made[:3], ids, transform, mask, "materialize")


def run_network(dtype, rows, sizes, activations, ragged):
    """Generated, with what the backward pass needs; given."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    params = sum(o * (i + 1) for i, o in pairwise(sizes))
    ids = torch.zeros(rows, dtype=torch.int64) if ragged else None
    x = empty(rows, sizes[0]) if ragged else empty(rows, 1, sizes[0])
    network = text(sizes, activations)
    head = empty(params, 64), empty(params)
    kernels.hyper_mlp(x, empty(rows, 64), *head, ids, network, ragged)
    if ragged:
        hidden = empty(rows * sum(sizes[1:]))
        mask = [True, False, False, False]
        grad = empty(rows, sizes[-1])
        kernels.hyper_mlp_backward(grad, x, empty(rows, 64), *head, ids, hidden, network, mask)
        run_stored(dtype, rows, network)


def run_stored(dtype, rows, network):
    """Given networks, with few rows a task and with many; of int8."""
    net = Network.parse(network)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    x, ids = empty(rows, net.sizes[0]), torch.zeros(rows, dtype=torch.int64)
    for tasks in (rows, 500):
        kernels.task_mlp(x, empty(1, net.numel).expand(tasks, -1), None, ids, network)
    steps = empty(1, net.weight_numel, dtype=torch.int8).expand(rows, -1)
    vectors = empty(1, net.vector_numel).expand(rows, -1)
    kernels.task_mlp(x, steps, vectors, ids, network)
