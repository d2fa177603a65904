"""Who cannot take part, and says why."""

from __future__ import annotations

import importlib
from types import ModuleType


class Unavailable(Exception):
    """This rival cannot do this work here; the message says why and goes into the results."""


def require(package: str) -> ModuleType:
    """Imports an optional package, or says that it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} cannot be imported: {error}") from error
