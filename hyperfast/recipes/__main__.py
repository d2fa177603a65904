"""``python -m hyperfast.recipes``: which recipes there are, a line each."""

from __future__ import annotations

import argparse
import ast
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path


def recipes() -> dict[str, str]:
    """The names of the recipes, and what each says first of itself. None is imported: they need
    packages of their own."""
    folder, found = Path(__file__).parent, {}
    for module in pkgutil.iter_modules([str(folder)]):
        tree = ast.parse((folder / f"{module.name}.py").read_text(encoding="utf-8"))
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if runs and not module.name.startswith("_"):
            found[module.name] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints them."""
    argparse.ArgumentParser("python -m hyperfast.recipes", description=__doc__).parse_args(argv)
    found = recipes()
    width = max(map(len, found))
    for name, about in found.items():
        print(f"{name:{width}}  {about}")
    print("\npython -m hyperfast.recipes.NAME runs one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
