"""TaskBank: the weights of many small networks, ready to be applied to mixed batches."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.bank import report as bank_report
from hyperfast.bank import snapshot as bank_snapshot
from hyperfast.bank.contents import Ids, Weights, to_columns, to_flat, to_ids
from hyperfast.bank.export import BankModule
from hyperfast.bank.file import open_regular
from hyperfast.bank.log import Log
from hyperfast.bank.replay import log_path, record, replay, resume
from hyperfast.bank.rows import Columns, Format
from hyperfast.bank.table import LATENT, Change, Key, Named, Table
from hyperfast.layout import MLPSpec, positive
from hyperfast.nn.copies import clone
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet


class TaskBank:
    """Stores one small network a task, and applies them to rows of mixed tasks.

    ``bank(x, task_ids)`` equals ``target(x, weights, task_ids)`` on the weights as stored. Made by
    :meth:`from_latents`, :meth:`from_weights` or :meth:`open`.

    All methods may be called from several threads at once. A call sees every task either before or
    after an :meth:`update`, never between, and the same in all its rows.

    A bank with a memory budget (``max_bytes``) holds latents, and the weights of the tasks used
    last; the others are generated again when they are asked for, equal up to the rounding of a
    matrix product in a batch of another size.

    Attributes:
        spec: layout of the weights.
        dtype: what they are stored as.
        device: where.
        max_bytes: the memory budget of the weights, or ``None``.
        hyper: the bank's copy of its hypernetwork, or ``None``.
    """

    # Nothing that is kept may be made in inference mode: it could not be changed outside.
    @torch.inference_mode(False)
    def __init__(
        self,
        spec: MLPSpec,
        target: TargetNet,
        dtype: torch.dtype,
        device: torch.device,
        hyper: HyperNet | None = None,
        latent: tuple[int, torch.dtype] | None = None,
        max_bytes: int | None = None,
    ):
        if target.weight_transform is not None:
            raise ValueError(
                "target must have no weight_transform: transform the weights, then use from_weights"
            )
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.max_bytes = max_bytes
        # Copies: a bank must not change under further training.
        self.hyper = clone(hyper).eval() if hyper is not None else None
        self._mark = bank_snapshot.mark(hyper) if hyper is not None else None
        self._activations = clone(target).layer_activations(len(spec.layers))
        self._format = Format(spec, dtype)
        row_bytes = self._format.row_bytes
        limit = None if max_bytes is None else positive("max_bytes", max_bytes) // row_bytes
        if limit == 0:
            raise ValueError(
                f"max_bytes must be at least {row_bytes}, the size of one task, got {max_bytes}"
            )
        if hyper is not None:
            latent = (hyper.z_dim, hyper.dtype)
        self._table = Table(self._format, device, latent, limit)
        self._name = uuid.uuid4().hex
        self._sequence = 0  # of the last change
        self._log: Log | None = None
        self._saving = threading.Lock()

    @classmethod
    def from_latents(
        cls,
        hyper: HyperNet,
        z: Tensor,
        *,
        dtype: torch.dtype | None = None,
        keys: Sequence[Key] | None = None,
        target: TargetNet | None = None,
        max_bytes: int | None = None,
    ) -> TaskBank:
        """A bank of the networks that ``hyper`` makes of ``z``; their ids are ``0, 1, ...``.

        Args:
            hyper: is copied.
            z: ``(B, z_dim)``.
            dtype: float32, bfloat16, float16, float64, or int8 with a scale for every output row;
                by default that of ``hyper``.
            keys: a name of each task, str or int, for :meth:`ids`.
            target: by default ``TargetNet(hyper.target_activation)``.
            max_bytes: memory budget of the weights; without, all are kept.

        Raises:
            TypeError: ``hyper`` does not generate an MLP, or dtypes disagree.
            ValueError: shapes that disagree, a budget below one task.
        """
        if not isinstance(hyper, HyperNet) or not isinstance(hyper.spec, MLPSpec):
            raise TypeError(f"hyper must be a HyperNet that generates an MLP, got {hyper!r}")
        target = TargetNet(hyper.target_activation) if target is None else target
        dtype = hyper.dtype if dtype is None else dtype
        bank = cls(hyper.spec, target, dtype, hyper.device, hyper, max_bytes=max_bytes)
        bank.add(z, keys=keys)
        return bank

    @classmethod
    def from_weights(
        cls,
        spec: MLPSpec,
        weights: Weights,
        *,
        dtype: torch.dtype | None = None,
        keys: Sequence[Key] | None = None,
        target: TargetNet | None = None,
    ) -> TaskBank:
        """A bank of given networks; their ids are ``0, 1, ...``.

        Args:
            spec: the sizes of the networks.
            weights: flat ``(B, P)``, or ``(w1, b1, ...)`` with a leading ``B``.
            dtype: as in :meth:`from_latents`; by default that of ``weights``.
            keys: a name of each task, str or int, for :meth:`ids`.
            target: by default ``TargetNet()``, which has ReLU.

        Raises:
            TypeError: ``spec`` is not an MLPSpec, ``weights`` are not floating-point.
            ValueError: shapes that disagree.
        """
        if not isinstance(spec, MLPSpec):
            raise TypeError(f"spec must be an MLPSpec, got {type(spec).__name__}")
        flat = to_flat(spec, weights)
        target = TargetNet() if target is None else target
        bank = cls(spec, target, flat.dtype if dtype is None else dtype, flat.device)
        bank.add(weights=flat, keys=keys)
        return bank

    # Reading

    def __len__(self) -> int:
        """The number of tasks."""
        return self._table.count

    def __contains__(self, task: object) -> bool:
        """Whether ``task`` is the id of a task in the bank; for keys ask ``bank.keys``."""
        if not isinstance(task, int):
            raise TypeError(f"a task id must be an int, got {task!r}; for keys ask bank.keys")
        try:
            with self._table.lock:
                self._table.find(to_ids(task, self.device))
        except (IndexError, RuntimeError):  # no such task, or more than 64 bits
            return False
        return True

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"TaskBank({len(self)} tasks, {self.spec}, {dtype})"

    @property
    def keys(self) -> Mapping[Key, int]:
        """The ids of the tasks that have a key, by key; a view that changes with the bank."""
        return MappingProxyType(self._table.keys)

    def ids(self, keys: Iterable[Key] | None = None) -> Tensor:
        """The ids of the tasks with these keys, or of all tasks.

        Raises:
            KeyError: no task has the key.
            TypeError: one key instead of several.
        """
        if isinstance(keys, str):  # which is iterable, too
            raise TypeError(f"keys must hold keys, got the single key {keys!r}")
        return self._table.ids(keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Runs every row through the network of its task. No gradient flows.

        Args:
            x: ``(R, in)``, any floating-point dtype and strides. It is cast to the dtype of the
                bank, float32 for int8; sums, and in one fused op hidden layers too, are of float32
                at least.
            task_ids: ``(R,)`` int64, in any order, with any repeats.

        Returns:
            ``(R, out)``, in the dtype of ``x``.

        Raises:
            ValueError: shapes or devices that disagree.
            TypeError: ``x`` is not floating-point, or ``task_ids`` not int64.
            IndexError: an id that is not, or no longer, in the bank.
            BankFileError: weights that were mapped from a file are damaged.
        """
        checks.dense(x=checks.tensor("x", x))
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"x must be on the device of the bank, {self.device}, got {x.device}")
        checks.rows(x, self.spec.sizes[0], len(self), checks.tensor("task_ids", task_ids), "")
        if not len(x):
            return x.new_empty(0, self.spec.sizes[-1])
        if torch.is_autocast_enabled(self.device.type):  # it would cast the whole bank
            with torch.autocast(self.device.type, enabled=False):
                return self(x, task_ids)
        rows = x.to(self._format.compute)
        parts = [
            (where, self._apply(columns, rows if where is None else rows[where], local))
            for columns, where, local in self._table.visit(task_ids, self._generate)
        ]
        return _join(parts, len(x)).to(x.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def weights(self, ids: Ids) -> Tensor:
        """The flat weights ``(n, P)`` of tasks as stored; int8 widened to float32.

        Raises:
            IndexError: an id that is not in the bank.
            BankFileError: weights that were mapped from a file are damaged.
        """
        ids = to_ids(ids, self.device)
        if not len(ids):
            return torch.empty(0, self.spec.numel, dtype=self._format.compute, device=self.device)
        parts = [
            (where, self._format.decode(tuple(c.index_select(0, local) for c in columns)))
            for columns, where, local in self._table.visit(ids, self._generate)
        ]
        return _join(parts, len(ids))

    def latents(self, ids: Ids) -> Tensor:
        """The latents ``(n, z_dim)`` of tasks.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError: a task that was given by its weights.
        """
        ids = to_ids(ids, self.device)
        with self._table.lock:
            rows = self._table.find(ids)[:, LATENT]
            if self._table.latents is None or bool((rows < 0).any()):
                raise ValueError("ids must be of tasks that were given by latents")
            return self._table.latents.column(0, rows)

    @torch.inference_mode(False)
    def module(self) -> BankModule:
        """A module that does what the bank does now, for ``torch.export``: ``module(x, task_ids)``.

        It holds a copy of the weights, in the dtype that the bank computes in; int8 is widened.
        """
        return BankModule(self)

    def error_report(
        self, weights: Weights | None = None, *, ids: Ids | None = None, rows: int = 16
    ) -> bank_report.ErrorReport:
        """What storing costs in accuracy: of every layer the error of weights and of outputs.

        Args:
            weights: the exact networks, an entry an id; without, those that the hypernetwork makes
                of the latents in float64.
            ids: which tasks to compare; by default all.
            rows: random inputs of each task.

        Raises:
            ValueError: a task has no latent, and ``weights`` are not given.
        """
        ids = self.ids() if ids is None else to_ids(ids, self.device)
        flat = None if weights is None else to_flat(self.spec, weights)
        if flat is None and self.hyper is None:
            raise ValueError("weights must be given, as the bank has no hypernetwork")
        if flat is not None and len(flat) != len(ids):
            raise ValueError(f"weights must hold {len(ids)} networks, one an id, got {len(flat)}")
        return bank_report.error_report(self, ids, flat, positive("rows", rows))

    def explain(self) -> bank_report.Costs:
        """What a task costs in memory and time, its weights kept or generated when it is used.

        Raises:
            ValueError: the bank has no hypernetwork.
        """
        if self.hyper is None:
            raise ValueError("only a bank with a hypernetwork can generate weights again")
        return bank_report.explain(self)

    # Changing

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self,
        z: Tensor | None = None,
        *,
        weights: Weights | None = None,
        keys: Sequence[Key] | None = None,
    ) -> Tensor:
        """Adds tasks and returns their ids ``(n,)``; all of them or, if it raises, none.

        Args:
            z: latents ``(n, z_dim)``, for a bank that has a hypernetwork.
            weights: instead, flat ``(n, P)`` or ``(w1, b1, ...)`` with a leading ``n``.
            keys: a name of each task, str or int.

        Raises:
            ValueError: shapes that disagree, a key that is taken.
            TypeError: dtypes that disagree.
            OSError: the log could not be written.
        """
        count, z, columns = to_columns(self, z, weights)
        names = list(keys) if keys is not None else []
        if keys is not None and len(names) != count:
            raise ValueError(f"keys must hold {count} keys, one a task, got {len(names)}")
        for key in names:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"keys must be str or int, got {key!r}")
        table = self._table
        with table.write:
            if len(set(names)) < len(names) or not table.keys.keys().isdisjoint(names):
                raise ValueError("keys must be new, and different from each other")
            ids = table.fresh_ids(count)
            named = list(zip(ids.tolist(), names, strict=True)) if names else []
            with self._changing("add", ids, columns, z, named):
                pass
        return ids

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, ids: Ids, z: Tensor | None = None, *, weights: Weights | None = None) -> None:
        """Replaces the networks of tasks, which keep their ids and keys; all or none.

        Args:
            ids: different ids.
            z, weights: as in :meth:`add`, an entry an id.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError, TypeError, OSError: as in :meth:`add`.
        """
        ids = to_ids(ids, self.device, distinct=True)
        count, z, columns = to_columns(self, z, weights)
        if count != len(ids):
            raise ValueError(f"ids must hold {count} ids, one a network, got {len(ids)}")
        with self._table.write:
            self._table.find(ids)
            with self._changing("update", ids, columns, z, []):
                pass

    @torch.inference_mode(False)
    def remove(self, ids: Ids) -> None:
        """Removes tasks and their keys; all or none. Their ids will never stand for others.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError: an id given twice.
            OSError: the log could not be written.
        """
        ids = to_ids(ids, self.device, distinct=True)
        with self._table.write:
            self._table.find(ids)
            self._table.read_keys()
            record(self, "remove", Change(ids, ids, ids, []), None)
            self._table.remove(ids)

    @contextmanager
    def _changing(
        self,
        op: Literal["add", "update"],
        ids: Tensor,
        columns: Iterable[Columns] | None,
        z: Tensor | None,
        names: Named,
    ) -> Iterator[None]:
        """New content of tasks, made before the block and published after it; if the block raises,
        nothing has changed. The caller holds the table's ``write``."""
        with self._table.prepare(ids, columns, z, names) as change:
            yield
            record(self, op, change, z)
        {"add": self._table.add, "update": self._table.update}[op](change)

    def _generate(self, z: Tensor) -> Columns:
        """The columns of the networks of ``z (n, z_dim)``."""
        assert self.hyper is not None
        with torch.autocast(self.device.type, enabled=False):
            return self._format.encode(self.spec.flatten(self.hyper(z)))

    def _apply(self, columns: Columns, x: Tensor, rows: Tensor) -> Tensor:
        return self._format.apply(self._activations, columns, x, rows)

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Writes all tasks to a safetensors file, which a crash leaves as it was or complete.

        Others may read and change the bank meanwhile; their changes are not in the file. A bank
        with a memory budget writes its latents only. If the bank was opened from ``path`` with a
        log, the log loses what the file now holds.

        Raises:
            ValueError: an activation that has no name, which a file cannot hold.
            BankFileError: another bank writes the file, or has it open with a log.
            OSError: the file could not be written; the old one is unchanged.
        """
        bank_snapshot.save(self, Path(path).resolve())

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def open(
        cls,
        path: str | os.PathLike,
        *,
        hyper: HyperNet | None = None,
        max_bytes: int | None = None,
        log: bool = False,
        verify: bool = False,
    ) -> TaskBank:
        """Opens a saved bank. Its weights are mapped into memory and read when first used, and
        processes that open the same file share them. The file must not be changed in place.

        Args:
            hyper: the hypernetwork that the bank was made with. It is needed to add latents, and
                by a bank that was saved with a memory budget.
            max_bytes: another budget for such a bank.
            log: write every change to ``path + ".log"`` before it is acknowledged. One bank at a
                time can do so. The changes in an existing log are read in any case.
            verify: check all of the file now, not each part when it is first used.

        Raises:
            BankFileError: not a bank, damaged, made with another hypernetwork, or open with a log
                elsewhere. Damage of the weights shows when they are first used.
            ValueError: ``hyper`` or ``max_bytes`` do not fit the bank.
            OSError: the file cannot be read.
        """
        path = Path(path).resolve()
        os.stat(path)  # before a log is made for it
        with ExitStack() as stack:
            # The log before the snapshot: it is cut only after a newer snapshot is there, so that
            # it begins no later than the one that is opened.
            journal = Log(log_path(path)) if log else None
            file: BinaryIO | None = None
            if journal is not None:
                stack.callback(journal.close)
                file = journal.file
            elif log_path(path).exists():
                file = stack.enter_context(open_regular(log_path(path)))
            bank = bank_snapshot.load(cls, path, hyper, max_bytes)
            if verify:
                bank._table.check()
                bank._table.read_keys()
            end = replay(bank, file, str(log_path(path))) if file is not None else 0
            if journal is not None:
                resume(bank, journal, end)
                stack.pop_all()
        return bank

    def close(self) -> None:
        """Closes the log, so that another bank can open it. Changes raise OSError from now on."""
        with self._saving, self._table.write:
            if self._log is not None:
                self._log.close()


def _join(parts: list[tuple[Tensor | None, Tensor]], count: int) -> Tensor:
    """One tensor of ``count`` rows from pieces and their positions."""
    if parts[0][0] is None:
        return parts[0][1]
    whole = parts[0][1].new_empty(count, parts[0][1].shape[1])
    for where, part in parts:
        whole[where] = part
    return whole
