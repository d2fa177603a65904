"""Every handwritten digit becomes a network: 1,797 neural representations, learned at once.

A quarter of the pixels of every 8x8 digit of scikit-learn is hidden. One latent a digit, turned by
one hypernetwork into a small network ``(x, y) -> ink``, is fitted to the rest. What is hidden is
then read off, and all networks draw their digit four times larger, in one call:

    python -m hyperfast demo --out digits.png

Three things make the pictures good:

- A pixel of this data set is the share of inked points in a 4x4 block of the scanned bitmap, so the
  network is fitted through that sensor: its ink, averaged over the pixel. Fitting a share of
  independent yes-or-no points is what cross-entropy does. Strokes come out finer than pixels.
- Coordinates enter as Fourier features (Tancik et al. 2020), and the hidden layer is a sine
  (Sitzmann et al. 2020): smooth between the pixels.
- Noise on the latents while training (a variational auto-decoder of fixed width, Zadeh et al. 2019)
  spreads every digit over a neighbourhood: what is true of its neighbours fills its gaps, and the
  way from one digit to another leads over digits.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hyperfast.recipes.digits_model import SIDE, ZOOM, load, load_digits, psnr, replace, save, train
from hyperfast.recipes.digits_picture import picture
from hyperfast.recipes.digits_rivals import bicubic, interpolate, neighbours, race, radial
from hyperfast.recipes.options import check_picture

EXTRAS = {
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "tqdm": "tqdm",
}


def peak_memory() -> float | None:
    """Most memory the process ever held, in MB; None where the system does not say (Windows)."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what cannot work ends here, before anything is learned."""
    parser = argparse.ArgumentParser("python -m hyperfast demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="learn for a shorter time")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("digits.png"),
        metavar="PATH.png",
        help="the picture (default: %(default)s); the model goes beside it, as PATH.safetensors",
    )
    args = parser.parse_args(argv)
    missing = [name for name, module in EXTRAS.items() if not importlib.util.find_spec(module)]
    if missing:
        parser.error(f"{', '.join(missing)} not found; try: pip install 'hyperfast[demo]'")
    check_picture(parser, args.out)
    return args


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Learns, measures, saves, draws; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv)
    digits = load_digits()
    n, pixels = digits.pixels.shape
    print(f"{n:,} digits of {SIDE}x{SIDE} pixels, {(~digits.kept[0]).sum()} of {pixels} held out")
    with torch.enable_grad():
        fields = train(digits, epochs=15 if args.quick else 100)
    learned = time.perf_counter() - start
    z = fields.latents.weight
    drawn = fields.draw(z)
    peak = peak_memory()

    path = args.out.with_suffix(".safetensors")
    save(fields, path)
    again = load(path)
    if not torch.equal(again.draw(again.latents.weight), drawn):
        raise RuntimeError(f"the model read back from {path} draws something else")

    hidden = ~digits.kept
    scores = {
        name: psnr(images[hidden], digits.pixels[hidden])
        for name, images in {
            "hyperfast": fields.pixels(z),
            "bicubic interpolation": interpolate(bicubic, digits),
            "radial basis functions, tuned": interpolate(radial, digits),
            "the eight digits most alike": neighbours(digits),
        }.items()
    }
    print("\nPSNR on the held-out pixels")
    for name, score in scores.items():
        print(f"  {name:<32}{score:8.2f} dB")

    print(f"\nAll {n:,} networks made and drawn at {SIDE * ZOOM}x{SIDE * ZOOM}, images a second")
    seconds = race(fields, rounds=3 if args.quick else 7)
    for name, s in seconds.items():
        print(f"  {name:<32}{n / s:8,.0f}   time {s / seconds['hyperfast']:.2f} of hyperfast's")

    networks = n * fields.model.hyper.total_target_params
    model = sum(p.numel() for p in fields.parameters())
    print(f"""
Numbers stored
  weights of the {n:,} networks     {networks:9,}
  hypernetwork and latents         {model:9,}   {networks / model:.1f} times fewer
  pixels                           {n * pixels:9,}   {n * pixels / model:.2f} of the model's
""")
    if peak is not None:
        print(f"Peak memory up to the drawing in one call: {peak:,.0f} MB resident")
    smooth = interpolate(radial, digits, SIDE * ZOOM)
    shown = scores["radial basis functions, tuned"], scores["hyperfast"]
    figure = picture(digits, fields, smooth, shown)
    replace(args.out, lambda tmp: figure.savefig(tmp, format="png"))
    print(f"Wrote {args.out} and {path}; read back, the model draws the same bit for bit.")
    print(f"{time.perf_counter() - start:.0f} s, of which {learned:.0f} s were spent learning.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
