"""Which slots the tasks of a bank have, for ids that only the device has seen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton.launch import up

PLACE = tl.constexpr((1 << 32) - 1)
NOBODY = (1 << 63) - 1  # in place of the id of a task that is missing: none is
_NOBODY = tl.constexpr(NOBODY)


@triton.jit(do_not_specialize=["rows", "places", "end"])
def _look_up(ids, codes, slots, missing, fault, rows, places, end, ids_r, BLOCK: tl.constexpr):
    """``slots[r] = codes[place] ^ ids[r]`` where this is below ``end``; else 0, ``missing[r]``, and
    the id, or another that is missing, in ``fault``."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = r < rows
    id = tl.load(ids + r * ids_r, live, 0)
    place = id & PLACE
    known = place < places
    slot = tl.load(codes + place, live & known, -1) ^ id
    known = known & (slot >= 0) & (slot < end)
    tl.store(slots + r, tl.where(known, slot, 0), live)
    tl.store(missing + r, known == 0, live)
    told = tl.minimum(id, _NOBODY - 1)
    tl.store(fault + r * 0, told, live & (known == 0))


def look_up(ids: Tensor, codes: Tensor, end: int, fault: Tensor) -> tuple[Tensor, Tensor]:
    """The slots ``(R,)``, below ``end``, of the tasks ``ids (R,)``, and which of these are missing
    from the table of ``codes``; one that is goes to ``fault (1,)``."""
    slots, missing = torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)
    launch.start(
        _look_up, up(len(ids), 1024), ids, codes, slots, missing, fault,
        len(ids), len(codes), end, ids.stride(0), BLOCK=1024,
    )  # fmt: skip
    return slots, missing
