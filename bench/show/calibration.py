"""What a calibration found, case by case, and the rates as the package holds them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from bench.measure import calibrate
from bench.measure.calibrate import Row
from hyperfast.plans import choose
from hyperfast.plans.sizes import PLANS, Sizes

MOST = 1.15  # a chosen plan may take so many times as long as the fastest


def text(rows: Sequence[Row]) -> str:
    """The regret of every case by the rates fitted to all; the worst and the mean, also by those
    that the package holds now; and the fitted rates as it would hold them."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        fitted = calibrate.fit(mine, device) if device in choose.RATES else None
        cells = "".join(f"{name:>13}" for name in (*Sizes._fields[:5], *PLANS))
        lines.append(f"{device}:{cells[len(device) + 1 :]}  regret  (microseconds)")
        for row in mine:
            times = [row["seconds"].get(name) for name in PLANS]
            values = [*row["layer"], *(f"{t * 1e6:.4g}" if t else "-" for t in times)]
            lost, chosen = calibrate.regret(row, fitted)
            lines.append("".join(f"{v:>13}" for v in values) + f"  {lost:6.2f}  {chosen}")
        ways = {"fitted": fitted} if fitted else {}
        for whose, rates in {**ways, "plans": None}.items():
            losses = [calibrate.regret(row, rates)[0] for row in mine]
            mean = geometric_mean(losses)
            lines.append(
                f"{device}, {whose}: regret {max(losses):.2f} at worst, {mean:.3f}"
                f" in the mean, above {MOST} in {sum(r > MOST for r in losses)} of {len(mine)}"
            )
        if fitted is None:
            continue
        lines += [f'    "{device}": {{']
        for name, work in fitted.items():
            lines.append(f'        "{name}": Work({", ".join(f"{v:.3g}" for v in work)}),')
        lines += ["    },", ""]
    return "\n".join(lines)
