"""Many stored networks: served in mixed batches, changed while they serve, kept in files."""

from hyperfast.bank.file import BankFileError
from hyperfast.bank.report import Costs, ErrorReport, LayerError
from hyperfast.bank.task_bank import TaskBank

__all__ = ["BankFileError", "Costs", "ErrorReport", "LayerError", "TaskBank"]
