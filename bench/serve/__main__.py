"""``python -m bench.serve``: what a TaskServer answers for 1 to 64 clients, beside its bank alone.

``--stress SECONDS`` adds what a service must survive: see :mod:`bench.serve.stress`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.serve import clients
from bench.serve.stress import stress

CLIENTS = (1, 2, 4, 8, 16, 32, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 an error or a lost future under stress; a wrong answer raises."""
    p = argparse.ArgumentParser("python -m bench.serve", description=__doc__)
    p.add_argument("--clients", type=int, nargs="*", default=CLIENTS, help="numbers of threads")
    p.add_argument("--rounds", type=int, default=5, help="turns of each way (5)")
    p.add_argument("--seconds", type=float, default=0.5, help="of a turn (0.5)")
    p.add_argument("--stress", type=float, metavar="SECONDS", help="and then this")
    p.add_argument("--json", type=Path, metavar="FILE", help="where to save what was measured")
    args = p.parse_args(argv)
    result: dict[str, Any] = {
        **machine.circumstances(torch.get_num_threads()),
        "bank": {"tasks": clients.TASKS, "sizes": clients.SIZES},
    }
    # What is not measured now is kept from before.
    old = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    result |= {key: old[key] for key in ("turns", "stress") if key in old}
    if args.clients:
        result["turns"] = {
            "commit": machine.commit(),
            "rounds": args.rounds,
            "seconds": args.seconds,
            "results": clients.race(clients.TASKS, args.clients, args.rounds, args.seconds),
        }
    status = 0
    if args.stress:
        found = result["stress"] = {"commit": machine.commit(), **stress(args.stress)}
        print(json.dumps(found, indent=1))
        status = int(bool(found["errors"] or found["lost"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
