"""``python -m hyperfast {demo,recipes,info,bench}``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hyperfast", description=__doc__)
    parser.add_argument(
        "command",
        choices=("demo", "recipes", "info", "bench"),
        help="demo: learn 1,797 digits and draw them at once; recipes: list whole programs; info: "
        "what is built and what is chosen; bench: time hyperfast beside its rivals",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options; --help")
    args = parser.parse_args(argv)
    if args.command == "info":
        if args.rest:
            parser.error(f"info takes no options, got {' '.join(args.rest)}")
        from hyperfast.info import report

        print(report())
        return 0
    if args.command == "demo":
        import hyperfast.recipes.digits as digits

        return digits.main(args.rest)
    if args.command == "recipes":
        import hyperfast.recipes.__main__ as recipes

        return recipes.main(args.rest)
    return _bench(args.rest)


def _bench(rest: Sequence[str]) -> int:
    """The benchmarks live beside the package, in a checkout, and are no part of a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "run.py").is_file():
        print(
            "hyperfast bench: needs a checkout, where bench/ lies beside hyperfast/",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.run").main(list(rest))


if __name__ == "__main__":
    sys.exit(main())
