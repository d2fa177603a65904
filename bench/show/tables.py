"""Results as tables."""

from __future__ import annotations

from bench.rivals import OURS
from bench.show.results_file import Results, Row
from bench.workloads import MODES

BUSY = 0.1  # share of the machine taken by others above which a table says so


def rows_of(results: Results, mode: str) -> dict[str, dict[str, Row]]:
    """workload -> rival -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in results["results"]:
        if row["mode"] == mode:
            found.setdefault(row["workload"], {})[row["rival"]] = row
    return found


def is_real(fact: Row) -> bool:
    """Whether a results file's workload is one of bench/real."""
    return "about" in fact


def part(results: Results, real: bool) -> Results:
    """The results of the real workloads alone, or of the others."""
    facts = {n: fact for n, fact in results["workloads"].items() if is_real(fact) == real}
    rows = {
        key: [row for row in results[key] if row["workload"] in facts]
        for key in ("results", "absent")
    }
    return {**results, "workloads": facts, **rows}


def _rivals(results: Results) -> list[str]:
    seen = {row["rival"] for row in results["results"] + results["absent"]}
    return [name for name in results["rivals"] if name in seen and name != OURS]


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['ratio']:.2f}x" if row["ratio"] is not None else duration(row["median_s"])


def mebibytes(row: Row | None) -> str:
    if row is None or row["peak_extra_bytes"] is None:
        return "-"
    return f"{row['peak_extra_bytes'] / 2**20:.1f}"


def table(header: list[str], body: list[list[str]], markdown: bool) -> list[str]:
    """Its lines; the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    bar = " | " if markdown else "  "

    def line(cells: list[str]) -> str:
        text = bar.join(
            [cells[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        )
        return f"| {text} |" if markdown else text

    rule = line(
        ["-" * widths[0]] + ["-" * (w - 1) + (":" if markdown else "-") for w in widths[1:]]
    )
    return [line(header), rule, *map(line, body)]


def headline(results: Results) -> str:
    machine, versions = results["machine"], results["versions"]
    libraries = ", ".join(f"{k} {versions[k]}" for k in ("torch", "jax") if k in versions)
    isa = next((f for f in ("avx512f", "avx2", "asimd") if f in machine["isa"]), "no SIMD named")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {isa}; {results['threads']} threads; "
        f"{libraries}; fp32; commit {results['commit'][:10]}"
        f"{'+changes' if results['commit'].endswith('+changes') else ''}; {results['date']}"
    )


def text(results: Results, markdown: bool = False) -> str:
    """Times of ours and ratios of the others, peak memory, and who was absent and why."""
    lines = [headline(results), ""]
    for real in (False, True):
        lines += _races(part(results, real), markdown)
    return "\n".join(lines + _limits(results, markdown) + _remarks(results)).rstrip()


def _races(results: Results, markdown: bool) -> list[str]:
    rivals = _rivals(results)
    lines: list[str] = []
    for mode in MODES:
        rows = rows_of(results, mode)
        if not rows:
            continue
        lines += [f"{mode}: time of {OURS}, then how many times longer each rival takes", ""]
        body = []
        for workload, by_rival in rows.items():
            ours = by_rival.get(OURS)
            mine = duration(ours["median_s"]) if ours else "-"
            body.append([workload, mine] + [_cell(by_rival.get(name)) for name in rivals])
        lines += [*table(["workload", OURS, *rivals], body, markdown), ""]
    for mode in MODES:
        rows = rows_of(results, mode)
        if any(row["peak_extra_bytes"] is not None for by in rows.values() for row in by.values()):
            lines += [f"{mode}: peak extra memory in MiB, beyond inputs and what is returned", ""]
            body = [
                [workload] + [mebibytes(by.get(name)) for name in (OURS, *rivals)]
                for workload, by in rows.items()
            ]
            lines += [*table(["workload", OURS, *rivals], body, markdown), ""]
    return lines


def over_floor(row: Row, ceilings: dict[str, float]) -> float:
    """How many times longer a call takes than the machine must for its FLOPs or for its bytes,
    whichever are more."""
    return min(ceilings["gflops"] / row["gflops"], ceilings["read_gbytes"] / row["gbytes"])


def _limits(results: Results, markdown: bool) -> list[str]:
    """How much of the machine ours uses: of its multiply-adds, and of its memory's reads."""
    ceilings = results["ceilings"]
    if ceilings is None:
        return []
    peak, read = ceilings["gflops"], ceilings["read_gbytes"]
    body = [
        [
            *(row["workload"], row["mode"]),
            *(f"{row['gflops']:.1f}", f"{row['gflops'] / peak:.0%}"),
            *(f"{row['gbytes']:.2f}", f"{row['gbytes'] / read:.0%}"),
            f"{over_floor(row, ceilings):.1f}x",
        ]
        for row in part(results, False)["results"]
        if row["rival"] == OURS
    ]
    if not body:
        return []
    title = (
        f"{OURS} against ceilings of the same machine: {peak:.0f} GFLOP/s in products of floats, "
        f"{read:.1f} GB/s read; FLOPs of the textbook way, bytes that must be moved, and the time "
        "over what the nearer ceiling allows"
    )
    header = ["workload", "mode", "GFLOP/s", "of peak", "GB/s", "of reads", "over the floor"]
    return [title, "", *table(header, body, markdown), ""]


def _remarks(results: Results) -> list[str]:
    lines = [] if results["memory"].startswith("peak") else [f"memory {results['memory']}"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results["absent"]:
        places = reasons.setdefault((row["rival"], row["reason"]), [])
        places.append(f"{row['workload']} {row['mode']}")
    for (rival, reason), places in reasons.items():
        where = places[0] if len(places) == 1 else f"{len(places)} races"
        lines.append(f"absent: {rival} in {where}: {reason}")
    loads = {(r["workload"], r["mode"]): r["foreign_load"] or 0.0 for r in results["results"]}
    busy = [f"{w} {m} ({load:.0%})" for (w, m), load in loads.items() if load > BUSY]
    if busy:
        lines.append(f"other processes kept the machine busy during: {', '.join(busy)}")
    return lines
