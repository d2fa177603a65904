"""The registry: every entry of the race, in the order in which tables show them."""

from __future__ import annotations

from .hyperfast_entry import HYPERFAST
from .jax_rival import JAX_RIVAL
from .packages import PACKAGES
from .torch_rivals import TORCH_RIVALS

RIVALS = {r.name: r for r in (*HYPERFAST, *TORCH_RIVALS, JAX_RIVAL, *PACKAGES)}

# Ratios are taken to this entry.
OURS = "hyperfast"
