"""TaskBank: the weights of many small networks, ready to be applied to mixed batches."""

from __future__ import annotations

import copy
import json
import os
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hyperfast import bank_report, checks
from hyperfast.activations import NAMES, resolve
from hyperfast.bank_file import (
    Array,
    BankFileError,
    Snapshot,
    open_regular,
    raw,
    write_snapshot,
)
from hyperfast.bank_log import Log, Record, records
from hyperfast.bank_module import BankModule
from hyperfast.bank_store import Columns, Format, Guard, Store
from hyperfast.bank_table import LATENT, ROW, Change, Key, Named, Table, fits
from hyperfast.hypernet import HyperNet
from hyperfast.spec import MLPSpec, positive
from hyperfast.target import TargetNet

Ids: TypeAlias = Tensor | Sequence[int] | int
Weights: TypeAlias = Tensor | Sequence[Tensor]

# Elements of the weights that are formed at once when tasks are added: 16 MB in float32.
STEP = 1 << 22


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
        self.hyper = copy.deepcopy(hyper).eval() if hyper is not None else None
        self._mark = _mark(hyper) if hyper is not None else None
        self._activations = copy.deepcopy(target).layer_activations(len(spec.layers))
        self._format = Format(spec, dtype)
        row_bytes = self._format.row_bytes
        limit = None if max_bytes is None else positive("max_bytes", max_bytes) // row_bytes
        if limit == 0:
            raise ValueError(
                f"max_bytes must be at least {row_bytes}, the size of one task, got {max_bytes}"
            )
        if hyper is not None:
            latent = (hyper.z_dim, hyper.head.weight.dtype)
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
        weight = hyper.head.weight
        dtype = weight.dtype if dtype is None else dtype
        bank = cls(hyper.spec, target, dtype, weight.device, hyper, max_bytes=max_bytes)
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
        flat = _flat(spec, weights)
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
                self._table.find(self._ids(task))
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
        """
        return self._table.ids(keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Runs every row through the network of its task. No gradient flows.

        Args:
            x: ``(R, in)``, any floating-point dtype and strides. It is cast to the dtype of the
                bank, float32 for int8, in which every layer takes its input and gives its output.
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
        ids = self._ids(ids)
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
        ids = self._ids(ids)
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
        ids = self.ids() if ids is None else self._ids(ids)
        flat = None if weights is None else _flat(self.spec, weights)
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
        count, z, columns = self._source(z, weights)
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
        ids = self._ids(ids, distinct=True)
        count, z, columns = self._source(z, weights)
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
        ids = self._ids(ids, distinct=True)
        with self._table.write:
            self._table.find(ids)
            self._table.read_keys()
            self._record("remove", Change(ids, ids, ids, []), None)
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
            self._record(op, change, z)
        {"add": self._table.add, "update": self._table.update}[op](change)

    def _ids(self, ids: Ids, distinct: bool = False) -> Tensor:
        """``ids`` as a tensor ``(n,)`` on the bank's device."""
        if not isinstance(ids, Tensor):
            listed = ids if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
            for value in listed:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(
                        f"ids must be ints or an int64 tensor, got {value!r}; "
                        "bank.ids(keys) gives the ids of keys"
                    )
            ids = torch.tensor(listed, dtype=torch.int64)
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {ids.dtype}")
        if ids.ndim != 1:
            raise ValueError(f"ids must have shape (n,), got {checks.shape(ids)}")
        if distinct and len(ids.unique()) < len(ids):
            raise ValueError("ids must be different from each other")
        return ids.to(self.device)

    def _source(
        self, z: Tensor | None, weights: Weights | None
    ) -> tuple[int, Tensor | None, Iterator[Columns] | None]:
        """How many tasks, their latents, and their columns, a block at a time."""
        if (z is None) == (weights is None):
            raise TypeError("one of z and weights must be given, and not both")
        size = max(1, STEP // self.spec.numel)
        if weights is not None:
            if self.max_bytes is not None:
                raise ValueError("weights cannot be given to a bank with a memory budget, only z")
            flat = _flat(self.spec, weights)
            if flat.device != self.device:
                raise ValueError(f"weights must be on the device of the bank, {self.device}")
            return len(flat), None, (self._format.encode(part) for part in flat.split(size))
        if self.hyper is None:
            raise ValueError("z needs a hypernetwork: give it to TaskBank.open, or give weights")
        z = checks.tensor("z", z).detach()
        if z.ndim != 2 or z.shape[1] != self.hyper.z_dim:
            raise ValueError(f"z must have shape (n, {self.hyper.z_dim}), got {checks.shape(z)}")
        weight = self.hyper.head.weight
        if z.dtype != weight.dtype or z.device != weight.device:
            raise TypeError(
                f"z must be {weight.dtype} on {weight.device}, got {z.dtype}, {z.device}"
            )
        if self.max_bytes is not None:
            return len(z), z, None
        return len(z), z, (self._generate(part) for part in z.split(size))

    def _generate(self, z: Tensor) -> Columns:
        """The columns of the networks of ``z (n, z_dim)``."""
        assert self.hyper is not None
        with torch.autocast(self.device.type, enabled=False):
            return self._format.encode(self.spec.flatten(self.hyper(z)))

    def _apply(self, columns: Columns, x: Tensor, rows: Tensor) -> Tensor:
        return self._format.apply(self._activations, columns, x, rows)

    def _record(self, op: str, change: Change, z: Tensor | None) -> None:
        """Acknowledges a change: when this returns, the log holds it."""
        if self._log is not None:
            content = {"ids": change.ids}
            if op != "remove" and self.max_bytes is None:
                rows = self._table.weights.take(change.rows)
                content |= zip(self._format.columns, rows, strict=True)
            if z is not None:
                content["latents"] = z
            if change.names:
                content["keys"] = _pack(change.names)
            self._log.append(self._sequence + 1, {"op": op}, content)
        self._sequence += 1

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
        path = Path(path).resolve()
        with self._saving, ExitStack() as stack:
            log = self._log if self._log is not None and not self._log.file.closed else None
            own = log is not None and log.path == _log_path(path)
            stale = None
            if not own and _log_path(path).exists():  # it continues the file that is replaced
                stale = Log(_log_path(path))
                stack.callback(stale.close)
            with self._table.write:
                meta = self._meta() if own else self._meta() | {"bank": uuid.uuid4().hex}
                end = log.end if log is not None else 0
                entries, names = stack.enter_context(self._table.frozen())
            if self.max_bytes is not None:
                entries[:, ROW] = -1
            content: dict[str, tuple[Array, Iterable[Tensor]]] = dict(
                _pieces(self._table.weights, self._format.columns, entries[:, ROW])
            )
            if self._table.latents is not None:
                content |= _pieces(self._table.latents, ["latents"], entries[:, LATENT])
            content["table"] = Array(entries.dtype, tuple(entries.shape)), [entries]
            if names:
                packed = _pack(names)
                content["keys"] = Array(packed.dtype, tuple(packed.shape)), [packed]
            write_snapshot(path, meta, content)
            if stale is not None:
                stale.path.unlink()
            if own and log is not None:
                with self._table.write:
                    log.trim(end, self._name, meta["sequence"])

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
            journal = Log(_log_path(path)) if log else None
            file: BinaryIO | None = None
            if journal is not None:
                stack.callback(journal.close)
                file = journal.file
            elif _log_path(path).exists():
                file = stack.enter_context(open_regular(_log_path(path)))
            bank = cls._load(path, hyper, max_bytes)
            if verify:
                bank._table.check()
                bank._table.read_keys()
            end = bank._replay(file, str(_log_path(path))) if file is not None else 0
            if journal is not None:
                bank._continue(journal, end)
                stack.pop_all()
        return bank

    def close(self) -> None:
        """Closes the log, so that another bank can open it. Changes raise OSError from now on."""
        with self._saving, self._table.write:
            if self._log is not None:
                self._log.close()

    def _meta(self) -> dict[str, Any]:
        return {
            "bank": self._name,
            "sequence": self._sequence,
            "sizes": list(self.spec.sizes),
            "bias": self.spec.bias,
            "activations": [_activation_name(a) for a in self._activations],
            "dtype": str(self.dtype).removeprefix("torch."),
            "hyper": self._mark,
            "max_bytes": self.max_bytes,
        }

    @classmethod
    def _load(cls, path: Path, hyper: HyperNet | None, max_bytes: int | None) -> TaskBank:
        snapshot = Snapshot(path)
        meta, tensors, guards = snapshot.meta, snapshot.tensors, snapshot.guards
        if meta.get("max_bytes") is None and max_bytes is not None:
            raise ValueError("max_bytes must be None for a bank that was saved without a budget")
        try:
            guards["table"](None)
            latents = tensors.pop("latents", None)
            packed = tensors.pop("keys", None)
            spec, layers = MLPSpec(meta["sizes"], meta["bias"]), meta["activations"]
            bank = cls(
                spec,
                TargetNet(layers if layers[-1] is not None else layers[:-1]),
                getattr(torch, meta["dtype"]),
                torch.device("cpu"),
                latent=None if latents is None else (latents.shape[1], latents.dtype),
                max_bytes=meta["max_bytes"] if max_bytes is None else max_bytes,
            )
            if type(meta["sequence"]) is not int or not 0 <= meta["sequence"] < 1 << 62:
                raise ValueError("its sequence number")
            bank._name, bank._sequence, bank._mark = meta["bank"], meta["sequence"], meta["hyper"]
            columns = tuple(tensors.pop(name) for name in bank._format.columns)
            keys = None if packed is None else partial(_read_keys, packed, guards["keys"], path)
            bank._table.adopt(tensors.pop("table"), keys, columns, latents, guards)
            if tensors:
                raise ValueError(f"it holds {sorted(tensors)} as well")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BankFileError(f"{path} is not a bank that can be read: {error}") from error
        if hyper is not None:
            bank._attach(hyper, path)
        elif bank.max_bytes is not None:
            raise ValueError(f"hyper must be given: {path} holds latents, not weights")
        return bank

    def _attach(self, hyper: HyperNet, path: Path) -> None:
        """Takes ``hyper`` as the hypernetwork of an opened bank."""
        if not isinstance(hyper, HyperNet):
            raise TypeError(f"hyper must be a HyperNet, got {type(hyper).__name__}")
        weight = hyper.head.weight
        if hyper.spec != self.spec or weight.device != self.device:
            raise ValueError(f"hyper must generate {self.spec} on {self.device}, got {hyper!r}")
        latent = (hyper.z_dim, weight.dtype)
        known = self._table.latents.columns[0] if self._table.latents is not None else latent
        if self._mark not in (None, _mark(hyper)) or known != latent:
            raise BankFileError(f"{path} was made with another hypernetwork than hyper")
        self.hyper, self._mark = copy.deepcopy(hyper).eval(), _mark(hyper)
        self._table.latents = self._table.latents or Store([latent], self.device)

    def _replay(self, file: BinaryIO, source: str) -> int:
        """Repeats what a log holds beyond the snapshot; returns where its last record ends."""
        end, last = 0, 0
        for record in records(file, source):
            try:
                if end == 0:
                    if record.meta["op"] != "begin" or record.sequence > self._sequence:
                        raise ValueError("it begins in the middle")
                    if record.meta["bank"] != self._name:
                        raise ValueError("it belongs to another bank; if it is old, delete it")
                elif record.sequence != last + 1:
                    raise ValueError("a record is missing")
                elif record.sequence > self._sequence:
                    self._repeat(record)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise BankFileError(f"{source} does not fit its bank: {error}") from error
            end, last = record.end, record.sequence
        return end if last == self._sequence else 0

    def _repeat(self, record: Record) -> None:
        """One change of a log, which is not trusted to fit."""
        op, tensors, table = record.meta["op"], record.tensors, self._table
        ids = self._ids(tensors["ids"], distinct=True)
        if op == "add" and not torch.equal(ids, table.fresh_ids(len(ids))):
            raise ValueError("its ids are not the next")
        if op != "add":
            table.find(ids)
        if op == "remove":
            table.remove(ids)
        else:
            columns, z = None, None
            if self.max_bytes is None:
                columns = tuple(tensors[name] for name in self._format.columns)
                fits(table.weights.columns, columns, len(ids))
            if (columns is None or "latents" in tensors) and table.latents is not None:
                z = tensors["latents"]
                fits(table.latents.columns, (z,), len(ids))
            names = _unpack(tensors["keys"], set(ids.tolist())) if "keys" in tensors else []
            if names and not table.keys.keys().isdisjoint(key for _, key in names):
                raise ValueError("its keys are taken")
            if columns is None and z is None:
                raise ValueError("it adds nothing")
            with self._changing(op, ids, [columns] if columns else None, z, names):
                pass
        self._sequence = record.sequence

    def _continue(self, log: Log, end: int) -> None:
        """Writes changes to ``log`` from now on, after its record that ends at ``end``."""
        torn = os.fstat(log.file.fileno()).st_size - end
        if end and torn:
            warnings.warn(
                f"{log.path} ended in {torn} bytes of a change that was never acknowledged; "
                "they are cut off",
                stacklevel=3,
            )
        if end:
            log.cut(end)
        else:
            log.own()
            log.begin(self._name, self._sequence)
        self._log = log


def _join(parts: list[tuple[Tensor | None, Tensor]], count: int) -> Tensor:
    """One tensor of ``count`` rows from pieces and their positions."""
    if parts[0][0] is None:
        return parts[0][1]
    whole = parts[0][1].new_empty(count, parts[0][1].shape[1])
    for where, part in parts:
        whole[where] = part
    return whole


def _flat(spec: MLPSpec, weights: Weights) -> Tensor:
    """``weights`` as one tensor ``(n, P)``."""
    flat = (weights if isinstance(weights, Tensor) else spec.flatten(weights)).detach()
    if flat.ndim != 2 or flat.shape[1] != spec.numel:
        raise ValueError(f"weights must have shape (n, {spec.numel}), got {checks.shape(flat)}")
    if not flat.is_floating_point():
        raise TypeError(f"weights must be floating-point, got {flat.dtype}")
    return flat


def _mark(hyper: HyperNet) -> str:
    """A checksum of the parameters of ``hyper``."""
    total = 0
    for value in hyper.state_dict().values():
        total = zlib.crc32(raw(value.detach().cpu().contiguous()), total)
    return f"{total:08x}"


def _activation_name(activation: nn.Module | None) -> str | None:
    """The name by which a file knows ``activation``."""
    if activation is None:
        return None
    for name, kind in NAMES.items():
        if type(activation) is kind and repr(activation) == repr(resolve(name)):
            return name
    raise ValueError(f"a file can hold the activations {sorted(NAMES)}, and not {activation}")


def _pack(names: Named) -> Tensor:
    """Ids and keys as JSON, in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def _unpack(packed: Tensor, ids: set[int]) -> Named:
    """What :func:`_pack` packed; raises ValueError or TypeError for anything else, or for a key of
    a task that is not in ``ids``."""
    names = [(task, key) for task, key in json.loads(bytes(raw(packed)))]
    if not all(task in ids and type(key) in (str, int) for task, key in names):
        raise ValueError("its keys are not str or int, or not of its tasks")
    if not len(names) == len({task for task, _ in names}) == len({key for _, key in names}):
        raise ValueError("its keys are not different")
    return names


def _read_keys(packed: Tensor, guard: Guard, path: Path, ids: set[int]) -> Named:
    guard(None)
    try:
        return _unpack(packed, ids)
    except (ValueError, TypeError, RecursionError) as error:
        raise BankFileError(f"the keys of {path} cannot be read: {error}") from error


def _pieces(
    store: Store, names: Iterable[str], rows: Tensor
) -> Iterator[tuple[str, tuple[Array, Iterable[Tensor]]]]:
    """What ``rows`` (-1: none) of a store hold, for a file, 4 MB at a time. Changes ``rows`` to the
    rows of the file."""
    held = rows >= 0
    kept = rows[held]
    rows[held] = torch.arange(len(kept), device=rows.device)
    for n, (name, (width, dtype)) in enumerate(zip(names, store.columns, strict=True)):
        array = Array(dtype, (len(kept), width))
        yield name, (array, map(partial(store.column, n), kept.split(64 * array.step)))


def _log_path(path: Path) -> Path:
    return path.with_name(path.name + ".log")
