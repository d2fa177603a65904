"""The kernels of a deep convolutional network, made by one small network at a tenth of the numbers.

The static hypernetwork of Ha, Dai, Le 2016 ("HyperNetworks", sections 3.1 and 4.1), at the scale of
scikit-learn's digits: six 3x3 convolutions with batch norm sort 8x8 images. Once all kernels are
parameters; once those behind the first layer come of one generator of two layers, which all of them
share, and of an embedding for every block of 16 output and 16 input channels, a
:class:`hyperfast.nets.StaticHyperNet`. Both train alike, from several seeds, each with a split of
its own into images to learn from and 500 held out:

    python -m hyperfast.recipes.static --out static.png

Fewer parameters may simply suffice. So a third network has its own kernels again, but narrow
layers, for about as many parameters as the second. The picture shows kernels: a square is one of
16 input channels (across) and 16 output channels (down).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nets import StaticHyperNet
from hyperfast.recipes.digits_model import SIDE, load_digits, replace
from hyperfast.recipes.digits_picture import mosaic
from hyperfast.recipes.options import parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK, Z_DIM = 16, 16
HELD_OUT = 500
EXTRAS = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "tqdm": "tqdm"}


class Split(NamedTuple):
    """Images ``(n, 1, 8, 8)`` and labels ``(n,)`` to learn from, and those held out."""

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor


def load(seed: int) -> Split:
    """The digits in random order, the last of them held out."""
    digits = load_digits()
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(seed))
    x, y = digits.pixels[order].view(-1, 1, SIDE, SIDE), digits.labels[order]
    return Split(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:])


def own(width: int = BLOCK) -> nn.Sequential:
    """The network with kernels of its own; channels double where images are halved."""
    layers: list[nn.Module] = []
    ins = 1
    for times, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
        conv = nn.Conv2d(ins, width * times, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width * times), nn.ReLU()]
        ins = width * times
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, 10))


def generated() -> StaticHyperNet:
    """The same, whose kernels behind the first layer are generated."""
    return StaticHyperNet(
        own(),
        Z_DIM,
        chunks=(BLOCK, BLOCK),
        params=lambda name, p: p.ndim > 2 and name != "0.weight",
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "own kernels": own,
    "generated kernels": generated,
    "own kernels, narrow": lambda: own(5),
}


def train(
    name: str,
    make: Callable[[], nn.Module],
    data: Split,
    *,
    epochs: int,
    lr: float = 1e-2,
    seed: int,
) -> nn.Module:
    """A network, fitted to the images to learn from."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(data.x)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for ids in tqdm(batches, desc=f"{name}, seed {seed}", unit="step"):
        loss = F.cross_entropy(net(data.x[ids]), data.y[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, data: Split) -> float:
    """On the images held out."""
    return float((net(data.x_held).argmax(1) == data.y_held).float().mean())


@torch.no_grad()
def picture(plain: nn.Module, static: StaticHyperNet) -> Figure:
    """The first block of every kernel, its own above and generated below."""
    from matplotlib.figure import Figure

    made = static.weights()
    figure = Figure(figsize=(2.6 * len(made), 5.6), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(made))
    for column, (name, kernel) in enumerate(made.items()):
        for row, w in enumerate((plain.get_parameter(name), kernel)):
            image = mosaic(w[:BLOCK, :BLOCK].flatten(0, 1), BLOCK, 1)
            limit, ax = float(image.abs().max()), axes[row, column]
            ax.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            ax.set_title(f"{('own', 'generated')[row]}, of {w.shape[0]} x {w.shape[1]}", size=10)
            ax.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all networks, compares, draws; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "static", __doc__, EXTRAS, picture=True)
    seeds, epochs = (2, 3) if args.quick else (5, 20)
    scores: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for seed in range(seeds):
        data = load(seed)
        nets = {
            name: train(name, m, data, epochs=epochs, seed=seed) for name, m in NETWORKS.items()
        }
        for name, net in nets.items():
            scores[name].append(accuracy(net, data))
    print(
        f"\n{'':<22}parameters   right of {HELD_OUT} held out, mean and deviation of {seeds} seeds"
    )
    for name, net in nets.items():
        found = 100 * torch.tensor(scores[name])
        count = sum(p.numel() for p in net.parameters())
        print(f"  {name:<20}{count:>10,}   {found.mean():6.2f} +- {found.std():.2f} %")
    _, static, _ = nets.values()
    assert isinstance(static, StaticHyperNet)
    blocks, kernels = len(static.hyper.generator.embeddings), static.hyper.total_target_params
    made = sum(p.numel() for p in static.hyper.parameters())
    print(f"\n{kernels:,} numbers of kernels come of {made:,}, {blocks} embeddings among them")
    figure = picture(nets["own kernels"], static)
    replace(args.out, lambda tmp: figure.savefig(tmp, format="png"))
    print(f"Wrote {args.out}\n{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
