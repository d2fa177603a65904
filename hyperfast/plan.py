"""The choice of plan for a generated layer, and its explanation: pure functions of sizes.

A plan's time is modelled as its FLOPs at the device's rate, plus the memory traffic of what does
not fit its last-level cache, plus a fixed cost a block. The model orders the plans; it does not
predict seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hyperfast.model import HyperMLP

PLANS = ("contract", "tile", "materialize")


class Layer(NamedTuple):
    """The sizes of one generated layer: ``rows`` in all, spread over ``tasks``."""

    tasks: int
    rows: int
    in_features: int
    out_features: int
    features: int
    ragged: bool = False
    bias: bool = True

    @property
    def params(self) -> int:
        return self.out_features * (self.in_features + self.bias)


class Device(NamedTuple):
    """What plain PyTorch reaches: FLOP/s, bytes/s on new memory, seconds a block, cache bytes."""

    flops: float
    bandwidth: float
    overhead: float
    cache: int


# The CPU's figures order the plans as measured in fp32 on two Zen 5 cores with 32 MB of L3.
DEVICES = {
    "cpu": Device(flops=2e11, bandwidth=1e10, overhead=2e-5, cache=24 << 20),
    "cuda": Device(flops=4e14, bandwidth=3e12, overhead=1e-5, cache=32 << 20),
}

# Elements of the temporaries of one block: 1 MB in fp32, half of a usual L2 cache.
BLOCK = 1 << 18


@dataclass(frozen=True)
class Cost:
    """What one plan takes for one layer, forward."""

    plan: str
    flops: int
    bytes: int
    extra_bytes: int
    seconds: float


@lru_cache(maxsize=4096)
def costs(layer: Layer, itemsize: int, device: str = "cpu") -> dict[str, Cost]:
    """The cost of every plan, by name."""
    machine = DEVICES.get(device, DEVICES["cuda"])
    b, r, i, o, k, ragged, _ = layer
    p = layer.params
    generated = 2 * b * p * k + 2 * r * p
    pair = min(i * k, o * k, i * o)  # the smallest temporary of a row, see eager._trilinear
    # FLOPs, elements of the largest temporary, blocks, extra reads of the head's weight. Mixed
    # rows gather their weights, a copy each.
    table = {
        "contract": (2 * r * p * k, r * pair, -(-r * pair // BLOCK), -(-r * pair // BLOCK)),
        "tile": (generated, b * p + ragged * r * p, 2 * -(-b * p // BLOCK), -(-b * p // BLOCK)),
        "materialize": (generated, b * p + ragged * r * p, 1, 0),
    }
    io = p * k + b * k + r * (i + o)
    result = {}
    for name, (flops, temporary, blocks, reads) in table.items():
        extra = temporary if name == "materialize" else min(temporary, BLOCK)
        spills = extra * itemsize > machine.cache
        moved = (io + reads * p * k + 2 * extra * spills) * itemsize
        seconds = flops / machine.flops + blocks * machine.overhead
        seconds += 2 * extra * itemsize * spills / machine.bandwidth
        result[name] = Cost(name, flops, moved, extra * itemsize, seconds)
    return result


@lru_cache(maxsize=4096)
def choose(layer: Layer, itemsize: int, device: str = "cpu") -> str:
    """The name of the plan of least cost."""
    return min(costs(layer, itemsize, device).values(), key=lambda c: c.seconds).plan


@dataclass(frozen=True)
class Explanation:
    """The plan of every layer of a model, forward; ``print`` shows it as a table."""

    title: str
    layers: tuple[tuple[str, Cost], ...]

    def __str__(self) -> str:
        head = f"{'layer':>12} {'plan':<12} {'MFLOP':>10} {'MB moved':>10} {'MB extra':>10}"
        rows = [(name, c.plan, c.flops, c.bytes, c.extra_bytes) for name, c in self.layers]
        rows.append(
            ("total", "", sum(r[2] for r in rows), sum(r[3] for r in rows), max(r[4] for r in rows))
        )
        lines = [
            f"{name:>12} {plan:<12} {f / 1e6:>10.3f} {b / 1e6:>10.3f} {e / 1e6:>10.3f}"
            for name, plan, f, b, e in rows
        ]
        return "\n".join([self.title, head, *lines])

    __repr__ = __str__


def explain(
    model: HyperMLP, x_shape: Sequence[int], z_shape: Sequence[int], *, ragged: bool = False
) -> Explanation:
    """The plan chosen for every layer of ``model``, its FLOPs, bytes and extra memory.

    In the way of ``numpy.einsum_path``: nothing runs. FLOPs and bytes are those of one forward
    pass without the trunk; extra memory is what is neither input, parameter nor output.

    Args:
        model: a :class:`hyperfast.HyperMLP`.
        x_shape: ``(B, N, in)`` or ``(B, in)``, or ``(R, in)`` with ``ragged``.
        z_shape: ``(B, z_dim)``.
        ragged: whether rows name their tasks by ``task_ids``.

    Raises:
        TypeError: the model is not one whose layers are generated and applied in one op each.
        ValueError: shapes that do not fit the model or each other.
    """
    mlp = getattr(model, "mlp", None)
    if mlp is None:
        raise TypeError("model must be a HyperMLP whose target is a TargetNet without transform")
    spec, hyper = mlp[0], model.hyper
    x_shape, z_shape = tuple(x_shape), tuple(z_shape)
    if len(z_shape) != 2 or z_shape[1] != hyper.z_dim:
        raise ValueError(f"z_shape must be (B, {hyper.z_dim}), got {z_shape}")
    fits = len(x_shape) == 2 if ragged else len(x_shape) in (2, 3) and x_shape[0] == z_shape[0]
    if not fits or x_shape[-1] != spec.sizes[0]:
        b, i = z_shape[0], spec.sizes[0]
        want = f"(R, {i})" if ragged else f"({b}, N, {i}) or ({b}, {i})"
        raise ValueError(f"x_shape must be {want}, got {x_shape}")
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    weight = hyper.head.weight
    explained = []
    for layer in spec.layers:
        i, o = layer.in_features, layer.out_features
        sizes = Layer(z_shape[0], rows, i, o, hyper.head.in_features, ragged, layer.bias)
        table = costs(sizes, weight.element_size(), weight.device.type)
        name = choose(sizes, weight.element_size(), weight.device.type)
        explained.append((f"{i} -> {o}", table[name]))
    title = f"x {x_shape}, z {z_shape}, {str(weight.dtype).removeprefix('torch.')}"
    return Explanation(f"{title} on {weight.device.type}", tuple(explained))
