"""The command line that recipes share."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def parse(
    argv: Sequence[str] | None,
    name: str,
    about: str | None,
    needs: Mapping[str, str],
    *,
    files: Mapping[str, str] | None = None,
    out: str | None = None,
) -> argparse.Namespace:
    """The options of ``python -m hyperfast.recipes.NAME``; what cannot work ends here, before
    anything is learned.

    Args:
        argv: the arguments, by default the process's.
        name: of the recipe.
        about: its docstring, of which ``--help`` shows the first line.
        needs: packages of the extra ``demo`` and the modules by which they are imported.
        files: names and explanations of options that take a file, which must exist.
        out: where ``--out`` leads by default, for a recipe that draws a picture.
    """
    first = (about or "").split("\n")[0]
    parser = argparse.ArgumentParser(f"python -m hyperfast.recipes.{name}", description=first)
    parser.add_argument("--quick", action="store_true", help="learn for a shorter time")
    for option, text in (files or {}).items():
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=text)
    if out is not None:
        text = "the picture (default: %(default)s)"
        parser.add_argument("--out", type=Path, default=Path(out), metavar="PATH.png", help=text)
    args = parser.parse_args(argv)
    missing = [package for package, module in needs.items() if not importlib.util.find_spec(module)]
    if missing:
        parser.error(f"{', '.join(missing)} not found; try: pip install 'hyperfast[demo]'")
    for option in files or {}:
        path = getattr(args, option)
        if path is not None and not path.is_file():
            parser.error(f"--{option} must be a file, got {path}")
    if out is not None:
        check_picture(parser, args.out)
    return args


def check_picture(parser: argparse.ArgumentParser, out: Path) -> None:
    """Ends the program where ``--out`` cannot become a PNG."""
    if out.suffix != ".png":
        parser.error(f"--out must end in .png, got {out}")
    if not os.access(out.parent, os.W_OK):
        parser.error(f"--out must lie in a folder that exists and can be written to, got {out}")
    if out.is_dir():
        parser.error(f"--out must be a file, got the folder {out}")
