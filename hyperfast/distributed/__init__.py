"""Models and banks shared among the processes of a group."""

from typing import Any

from hyperfast.distributed.sharded_bank import ShardedTaskBank

__all__ = ["ColwiseHyperMLP", "ShardedTaskBank", "parallelize"]


def __getattr__(name: str) -> Any:
    """DTensor takes about a second to import: only who asks for it waits."""
    if name in ("ColwiseHyperMLP", "parallelize"):
        from hyperfast.distributed import tensor_parallel

        return getattr(tensor_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
