"""Builds of the C++ kernels that tests run on."""

from hyperfast import _C


def isas():
    """Those that can run on this machine, best first."""
    if hasattr(_C, "isas"):
        return _C.isas()
    return ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
