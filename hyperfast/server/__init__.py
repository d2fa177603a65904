"""Requests of many callers, answered together."""

from hyperfast.server.stats import ServerStats
from hyperfast.server.task_server import TaskServer

__all__ = ["ServerStats", "TaskServer"]
