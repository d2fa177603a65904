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
    picture: bool = False,
    files: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """The options of ``python -m hyperfast.recipes.NAME``; what cannot work ends here, before
    anything is learned.

    Args:
        argv: the arguments, by default the process's.
        name: of the recipe.
        about: its docstring, of which ``--help`` shows the first line.
        needs: packages of the extra ``demo`` and the modules by which they are imported.
        picture: whether it writes one, by default ``NAME.png``.
        files: names and explanations of options that take a file, which must exist.
    """
    parser = parser_of(f"python -m hyperfast.recipes.{name}", about)
    for option, text in (files or {}).items():
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=text)
    if picture:
        add_out(parser, f"{name}.png", "the picture (default: %(default)s)")
    args = finish(parser, argv, needs)
    for option in files or {}:
        path = getattr(args, option)
        if path is not None and not path.is_file():
            parser.error(f"--{option} must be a file, got {path}")
    return args


def parser_of(command: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of a command, with the option that all have."""
    parser = argparse.ArgumentParser(command, description=(about or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="learn for a shorter time")
    return parser


def add_out(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """An option for the path of a picture."""
    parser.add_argument("--out", type=Path, default=Path(default), metavar="PATH.png", help=what)


def finish(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, needs: Mapping[str, str]
) -> argparse.Namespace:
    """The options, if the packages are there, and a picture can be written."""
    args = parser.parse_args(argv)
    missing = [package for package, module in needs.items() if not importlib.util.find_spec(module)]
    if missing:
        parser.error(f"{', '.join(missing)} not found; try: pip install 'hyperfast[demo]'")
    if (out := vars(args).get("out")) is not None:
        if out.suffix != ".png":
            parser.error(f"--out must end in .png, got {out}")
        if not os.access(out.parent, os.W_OK):
            parser.error(f"--out must lie in a folder that exists and can be written to, got {out}")
        if out.is_dir():
            parser.error(f"--out must be a file, got the folder {out}")
    return args
