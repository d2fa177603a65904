"""``python -m bench.gpu.exact``: products of small integers, which floats hold exactly. Every sum
is right to the last bit, in any order and in any precision, or it is wrong.

A product on a matrix unit with an operand in registers may be assembled wrongly, which shows in
some runs of some shapes; so shapes are many, drawn at random, and each runs again and again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hyperfast
from bench.gpu.device import DEVICE, KINDS, REHEARSAL, facts, select
from hyperfast.kernels import reference
from hyperfast.layout import MLPSpec, Network, of_layer
from hyperfast.ops.network import hyper_mlp, task_mlp
from hyperfast.plans import gpu

# What a side of a product may be: whole tiles, and what is left over at their edges.
SIDES = (1, 3, 4) if REHEARSAL else (8, 16, 33, 64, 64, 100, 128, 128)
TASKS = (1, 3, 5) if REHEARSAL else (7, 64, 300, 700, 2000)
# Rows a task, of stored networks: enough for products on matrix units, of a stretch of rows.
MANY, MOST_ROWS = ((5, 17) if REHEARSAL else (40, 200)), 12800
SHAPES, REPEATS = (7, 2) if REHEARSAL else (100, 20)


OPS = (
    "hyper_linear", "hyper_linear_grad_h", "hyper_linear_grad_weight", "task_linear",
    "task_linear_grad_weight", "hyper_mlp", "task_mlp",
)  # fmt: skip


class Shape(NamedTuple):
    op: str
    kind: str
    tasks: int
    rows: int
    ins: int
    outs: int
    features: int
    ragged: bool


def shapes(count: int, seed: int = 0) -> list[Shape]:
    """At random, of every op and kind in turns. Many rows a task are mixed: others are a library's
    product."""
    draw = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != "fp64"] or list(KINDS)
    found = []
    for n in range(count):
        op = OPS[n % len(OPS)]
        rows = draw.choice((1, 2, *MANY) if op.startswith("task") else (1, 1, 2, 5))
        shape = Shape(
            op,
            kinds[n // len(OPS) % len(kinds)],
            draw.choice([tasks for tasks in TASKS if tasks * rows <= MOST_ROWS]),
            rows,
            draw.choice(SIDES),
            draw.choice(SIDES),
            draw.choice(SIDES),
            rows in MANY or draw.random() < 0.5,
        )
        found.append(shape)
    return found


def case(shape: Shape, seed: int = 0) -> tuple[Callable[[], Tensor], Tensor]:
    """A call, and what it must return."""
    dtype = select(shape.kind)
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def integers(*size: int, most: int = 4) -> Tensor:
        found = torch.randint(-most, most + 1, size, generator=generator, device=DEVICE)
        return found.to(torch.float64)

    lead = (shape.tasks * shape.rows,) if shape.ragged else (shape.tasks, shape.rows)
    ids = None
    if shape.ragged:
        ids = torch.randint(shape.tasks, lead, generator=generator, device=DEVICE)
        if shape.rows in MANY:  # half of them are of one task, whose sum is made in parts
            ids *= torch.randint(2, lead, generator=generator, device=DEVICE)
    make = _network if shape.op.endswith("mlp") else _layer
    call, want = make(shape, integers, lead, ids, dtype)
    return call, want.to(dtype)


Made = tuple[Callable[[], Tensor], Tensor]


def _layer(shape: Shape, integers: Any, lead: tuple[int, ...], ids: Any, dtype: Any) -> Made:
    """An op, and what the specification says."""
    tasks, ins, outs, features = shape.tasks, shape.ins, shape.outs, shape.features
    x, grad, h = integers(*lead, ins), integers(*lead, outs), integers(tasks, features)
    matrix, vector = integers(outs, ins, features), integers(outs, features)
    tensors: Any
    tensors, rest, plan = {
        "hyper_linear": (
            (x, h, matrix, integers(outs, ins), vector, integers(outs)), (ids, ""), "contract",
        ),
        "hyper_linear_grad_h": ((grad, x, matrix, vector), (ids, tasks), "contract"),
        "hyper_linear_grad_weight": ((grad, x, h), (ids, True), "contract"),
        "task_linear": ((x, integers(tasks, outs, ins), integers(tasks, outs)), (ids,), None),
        "task_linear_grad_weight": ((grad, x), (ids, tasks), None),
    }[shape.op]  # fmt: skip
    want = getattr(reference, shape.op)(*tensors, *rest)
    rounded = [t.to(dtype) for t in tensors]
    rest = (*rest, plan) if plan else rest
    return lambda: getattr(torch.ops.hyperfast, shape.op)(*rounded, *rest), want


def _network(shape: Shape, integers: Any, lead: tuple[int, ...], ids: Any, dtype: Any) -> Made:
    """Hidden layers are rounded as they are stored; with numbers from -1 to 1 no product is."""
    stored = shape.op == "task_mlp"
    sizes = min(shape.ins, 64), min(shape.outs, 64), min(shape.features, 16)
    spec = MLPSpec(sizes)
    text = spec.describe([torch.nn.ReLU(), None])
    assert text is not None
    features = min(shape.features, 16)
    x = integers(*lead, sizes[0], most=1)
    h = integers(shape.tasks, features, most=1)
    head, bias = integers(spec.numel, features, most=1), integers(spec.numel, most=1)
    flat = integers(shape.tasks, spec.numel, most=1)
    want = x
    for layer, (i, o) in zip(Network.parse(text).layers, pairwise(sizes), strict=True):
        if stored:
            own = flat[:, layer.begin : layer.end]
            w, b = own[:, : i * o].unflatten(1, (o, i)), own[:, i * o :]
            want = reference.task_linear(want, w, b, ids)
        else:
            want = reference.hyper_linear(want, h, *of_layer(head, bias, layer), ids)
        want = layer.activate(want).to(dtype).double()
    x, h, head, bias, flat = (t.to(dtype) for t in (x, h, head, bias, flat))
    if stored:
        return lambda: task_mlp(x, flat, None, ids, text), want
    return lambda: hyper_mlp(x, h, head, bias, ids, text, False)[0], want


def wrong(shape: Shape, repeats: int) -> dict[str, Any] | None:
    """How often an answer was wrong, and by how much at worst; nothing where none was."""
    call, want = case(shape)
    times, worst = 0, 0.0
    for _ in range(repeats):
        y = call()
        if not torch.equal(y, want):
            times += 1
            worst = max(worst, float((y.double() - want.double()).abs().max()))
    return {"shape": shape, "times": times, "worst": worst} if times else None


@contextmanager
def split() -> Iterator[None]:
    """fp32 in parts however little there is to multiply: these products an assembler may get
    wrong, not those of vector units."""
    chosen = gpu.products
    gpu.products = lambda dtype, *_: gpu.SPLIT.get(kind := gpu.arithmetic(dtype), kind)
    try:
        yield
    finally:
        gpu.products = chosen


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.gpu.exact", description=__doc__)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    found: dict[str, Any] = {"ptxas": facts()["ptxas"], "shapes": 0, "repeats": REPEATS}
    found |= {"wrong": [], "failed": []}
    with hyperfast.use_backend("triton"), split():
        for shape in shapes(SHAPES):
            if time.perf_counter() > end:
                break
            try:
                fault = wrong(shape, REPEATS)
            except Exception as error:
                found["failed"].append(f"{shape}: {type(error).__name__}: {error}"[:300])
                fault = None
            found["shapes"] += 1
            found["wrong"] += [fault] if fault else []
            args.out.write_text(json.dumps(found))  # a device that fails may end the process


if __name__ == "__main__":
    main()
