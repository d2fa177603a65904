"""The command line that recipes share."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence


def parse(
    argv: Sequence[str] | None, name: str, about: str | None, needs: Mapping[str, str]
) -> argparse.Namespace:
    """The options of ``python -m hyperfast.recipes.NAME``; what cannot work ends here, before
    anything is learned.

    Args:
        argv: the arguments, by default the process's.
        name: of the recipe.
        about: its docstring, of which ``--help`` shows the first line.
        needs: packages of the extra ``demo`` and the modules by which they are imported.
    """
    first = (about or "").split("\n")[0]
    parser = argparse.ArgumentParser(f"python -m hyperfast.recipes.{name}", description=first)
    parser.add_argument("--quick", action="store_true", help="learn for a shorter time")
    args = parser.parse_args(argv)
    missing = [package for package, module in needs.items() if not importlib.util.find_spec(module)]
    if missing:
        parser.error(f"{', '.join(missing)} not found; try: pip install 'hyperfast[demo]'")
    return args
