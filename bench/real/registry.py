"""The real workloads, in the order in which tables show them."""

from __future__ import annotations

from bench.real import (
    agcrn,
    condinst,
    dlinear,
    himnet,
    hyper_lstm,
    hypertab,
    lora,
    metarl,
    nmix,
    nnconv,
    population,
    siren,
)
from bench.real.real import Real

FILES = (
    *(nnconv, himnet, nmix, metarl, hypertab, dlinear),
    *(population, condinst, agcrn, siren, lora, hyper_lstm),
)
REAL: dict[str, Real] = {w.name: w for file in FILES for w in file.WORKLOADS}
