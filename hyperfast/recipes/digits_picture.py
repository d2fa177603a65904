"""The demo's picture: what is given, what is made of it, the ways between digits, all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperfast.recipes.digits_model import DigitFields, Digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 12.0, 11.65, 150
NIGHT, CHALK, DIM, HIDDEN = "#0b0e14", "#ece7db", "#8b93a1", "#2b6b74"
INK = ("#141925", "#5b2a6f", "#d1495b", "#f4a259", "#fdf3d8")
EXAMPLES = range(10)  # the first ten of the data set happen to be 0 to 9
CORNERS = (0, 6, 2, 7)
STEPS = 9
COLUMNS = 60  # of the wall


def picture(
    digits: Digits, fields: DigitFields, smooth: Tensor, psnr: tuple[float, float]
) -> Figure:
    """Examples, a walk in latent space, and a wall of all digits.

    Args:
        digits: what was learned.
        fields: the model that learned it.
        smooth: ``(n, 32 * 32)``, the digits interpolated.
        psnr: of the interpolation and of the model, in dB.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    ink = LinearSegmentedColormap.from_list("ink", INK).with_extremes(bad=HIDDEN)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=NIGHT)
    z = fields.latents.weight.detach()
    with torch.no_grad():
        drawn = fields.draw(z)
        between = fields.draw(square(z[list(CORNERS)], STEPS))

    def place(left: float, top: float, width: float, height: float) -> Axes:
        """Axes in inches from the top left corner."""
        ax = figure.add_axes(
            (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        )
        ax.set_axis_off()
        return ax

    def write(left: float, top: float, text: str, size: float, color: str = DIM) -> None:
        figure.text(left / WIDTH, 1 - top / HEIGHT, text, size=size, color=color, va="baseline")

    def show(ax: Axes, image: Tensor, interpolation: str = "nearest") -> None:
        ax.imshow(image.numpy(), cmap=ink, vmin=0, vmax=1, interpolation=interpolation)

    write(0.4, 0.62, f"{len(z):,} handwritten digits, {len(z):,} small networks", 21, CHALK)
    write(0.4, 0.92, "all of them made by one hypernetwork, each from its own latent", 11.5)

    chosen = list(EXAMPLES)
    rows = {
        "original, 8x8": digits.pixels[chosen],
        "given: three pixels in four; the others measure what follows": digits.pixels.masked_fill(
            ~digits.kept, torch.nan
        )[chosen],
        f"the best interpolation, 32x32: {psnr[0]:.1f} dB": smooth[chosen],
        f"the networks, 32x32: {psnr[1]:.1f} dB": drawn[chosen].flatten(1),
    }
    for n, (title, images) in enumerate(rows.items()):
        top = 1.3 + n * 0.98
        write(0.4, top, title, 9.5, CHALK if n == 3 else DIM)
        side = int(images.shape[1] ** 0.5)
        for m, image in enumerate(images):
            ax = place(0.4 + m * 0.69, top + 0.08, 0.63, 0.63)
            show(ax, image.view(side, side))

    write(8.03, 1.3, "from digit to digit: the latents in between", 9.5, CHALK)
    ax = place(8.03, 1.38, 3.57, 3.57)
    show(ax, mosaic(between, STEPS, 0), interpolation="auto")

    order = digits.labels.argsort(stable=True)
    wall = mosaic(drawn[order], COLUMNS, 1)
    write(0.4, 5.45, f"all {len(z):,}, drawn in one call", 9.5, CHALK)
    ax = place(0.4, 5.55, 11.2, 11.2 * wall.shape[0] / wall.shape[1])
    show(ax, wall, interpolation="auto")
    return figure


def square(corners: Tensor, steps: int) -> Tensor:
    """``(steps**2, z_dim)``: between four latents, row by row.

    Directions and lengths are interpolated apart: a mean of latents alone would be too short, and
    short latents draw the blurred mean of all digits.
    """
    t = torch.linspace(0, 1, steps)
    t = torch.stack((1 - t, t))
    share = torch.einsum("ai,bj->ijab", t, t).flatten(2).flatten(0, 1)
    length = corners.norm(dim=1, keepdim=True)
    return nn.functional.normalize(share @ (corners / length)) * (share @ length)


def mosaic(images: Tensor, columns: int, gap: int) -> Tensor:
    """``images (n, side, side)`` in rows of ``columns``, ``gap`` points between them."""
    images = nn.functional.pad(images, (0, gap, 0, gap))
    images = torch.cat((images, images.new_zeros(-len(images) % columns, *images.shape[1:])))
    return images.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
