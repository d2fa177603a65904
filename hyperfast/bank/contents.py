"""What a bank holds, and every change of it: made in whole or not at all."""

from __future__ import annotations

import math
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hyperfast import checks
from hyperfast.bank import fork
from hyperfast.bank.file import BankFileError, raw
from hyperfast.bank.formats import format_of
from hyperfast.bank.log import Log, Record, pack_keys, records, unpack_keys
from hyperfast.bank.rows import Columns, Store
from hyperfast.bank.table import LATENT, SLOT, Change, Key, Named, Table, fits, integer
from hyperfast.layout import MLPSpec, check_transform, positive
from hyperfast.nn.copies import clone
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

Ids: TypeAlias = Tensor | Sequence[int] | int
Weights: TypeAlias = Tensor | Sequence[Tensor]
Module = TypeVar("Module", bound=nn.Module)

# Elements of the weights that are formed at once when tasks are added: 16 MB in float32.
STEP = 1 << 22


class Given(NamedTuple):
    """Networks that were given to a bank: how many, their latents if they have any, and their
    columns, a block at a time, unless these are made when they are used."""

    tasks: int
    z: Tensor | None
    blocks: Iterable[Columns] | None


class Contents:
    """What a bank holds: networks of one shape in one format, by task; what makes them of latents;
    and the file that it continues.

    Attributes:
        spec: layout of the weights.
        activations: the bank's own, after each layer (``None``: none), in the compute dtype.
        format: how weights are stored.
        device: where.
        max_bytes: the memory budget of the weights, or ``None``.
        hyper: the bank's own hypernetwork, or ``None``; ``mark``: a checksum of its parameters.
        table: which tasks there are.
        name: what ties a log to its snapshot; ``sequence``: the number of the last change.
        log: where changes are written before they are acknowledged.
        saving: held while a file is written.
    """

    # Nothing that is kept may be made in inference mode: it could not be changed outside.
    @torch.inference_mode(False)
    def __init__(
        self,
        spec: MLPSpec,
        activations: Sequence[nn.Module | None],
        dtype: torch.dtype | str,
        device: torch.device,
        *,
        transform: str = "",
        latent: tuple[int, torch.dtype] | None = None,
        max_bytes: int | None = None,
    ):
        self.spec = spec
        self.format = format_of(spec, dtype, transform)
        self.device = device
        self.activations = own_activations(activations, self.format.compute, device)
        self.max_bytes = max_bytes
        self.hyper: HyperNet | None = None
        self.mark: str | None = None
        size = self.format.task_bytes
        limit = None if max_bytes is None else positive("max_bytes", max_bytes) // size
        if limit == 0:
            raise ValueError(
                f"max_bytes must be at least {size}, the size of one task, got {max_bytes}"
            )
        self.table = Table(self.format, device, latent, limit)
        self.name = uuid.uuid4().hex
        self.sequence = 0
        self.log: Log | None = None
        self.saving = threading.Lock()
        fork.register(self)

    @classmethod
    def of_target(
        cls,
        spec: MLPSpec,
        target: TargetNet,
        dtype: torch.dtype,
        device: torch.device,
        hyper: HyperNet | None = None,
        max_bytes: int | None = None,
    ) -> Contents:
        """Without tasks yet."""
        if not isinstance(target, TargetNet):
            raise TypeError(f"target must be a TargetNet, got {type(target).__name__}")
        transform = check_transform("target.weight_transform", target.weight_transform)
        if transform is None:
            raise ValueError(
                "target must have a weight_transform with a name, or none: transform the weights "
                f"by {target.weight_transform}, then use from_weights"
            )
        activations = target.layer_activations(len(spec.layers))
        latent = None if hyper is None else (hyper.z_dim, hyper.dtype)
        contents = cls(
            *(spec, activations, dtype, device),
            transform=transform,
            latent=latent,
            max_bytes=max_bytes,
        )
        if hyper is not None:
            contents.attach(hyper)
        return contents

    @property
    def text(self) -> str | None:
        """The text of the networks, ``None`` where it has no word for an activation."""
        return self.spec.describe(self.activations, self.format.transform)

    def after_fork(self) -> None:
        self.saving = threading.Lock()

    # Reading

    def run(self, x: Tensor, ids: Tensor) -> Tensor:
        """``x (R, in)`` of the compute dtype, at least one row, through the networks of ``ids``."""
        if torch.is_autocast_enabled(self.device.type):  # it would cast the whole bank
            with torch.autocast(self.device.type, enabled=False):
                return self.run(x, ids)
        if self.table.deferred is not None:
            with self.table.deferred_visit(ids) as found:
                if found is not None:
                    columns, index, missing = found
                    y = self.format.apply(self.activations, columns, x, index)
                    return y.masked_fill(missing.unsqueeze(1), math.nan)
        pieces = [
            (where, self.format.apply(self.activations, columns, _some(x, where), index))
            for columns, where, index in self.table.visit(ids, self.generate)
        ]
        return _join(pieces, len(x))

    def check(self) -> None:
        """Raises what calls met of which the host has not heard yet."""
        if self.table.deferred is not None:
            self.table.deferred.wait()
            with self.table.lock:
                self.table.deferred.check()

    def weights(self, ids: Tensor) -> Tensor:
        """The flat weights ``(n, P)`` of tasks as stored, in the compute dtype."""
        if not len(ids):
            shape = 0, self.spec.numel
            return torch.empty(shape, dtype=self.format.compute, device=self.device)
        pieces = [
            (where, self.format.decode(tuple(c.index_select(0, index) for c in columns)))
            for columns, where, index in self.table.visit(ids, self.generate)
        ]
        return _join(pieces, len(ids))

    def latents(self, ids: Tensor) -> Tensor:
        """The latents ``(n, z_dim)`` of tasks."""
        with self.table.lock:
            slots = self.table.find(ids)[:, LATENT]
            if self.table.latents is None or bool((slots < 0).any()):
                raise ValueError("ids must be of tasks that were given by latents")
            return self.table.latents.column(0, slots)

    @torch.no_grad()
    def generate(self, z: Tensor) -> Columns:
        """The columns of the networks of ``z (n, z_dim)``."""
        assert self.hyper is not None
        with torch.autocast(self.device.type, enabled=False):
            return self.format.encode(self.spec.flatten(self.hyper(z)))

    # Changing

    def attach(self, hyper: HyperNet) -> None:
        """Takes a copy of ``hyper``: a bank must not change under further training."""
        mark = mark_of(hyper)
        self.hyper, self.mark = copy_module("hyper", hyper).eval(), mark
        if self.table.latents is None:
            self.table.latents = Store([(hyper.z_dim, hyper.dtype)], self.device)

    def given(self, z: Tensor | None, weights: Weights | None) -> Given:
        """Networks in the form in which they are kept, one of latents and weights being given."""
        if (z is None) == (weights is None):
            raise TypeError("one of z and weights must be given, and not both")
        size = max(1, STEP // self.spec.numel)
        if weights is not None:
            if self.max_bytes is not None:
                raise ValueError("weights cannot be given to a bank with a memory budget, only z")
            flat = to_flat(self.spec, weights)
            if flat.device != self.device:
                raise ValueError(f"weights must be on the device of the bank, {self.device}")
            return Given(len(flat), None, map(self.format.encode, flat.split(size)))
        if self.hyper is None:
            raise ValueError("z needs a hypernetwork: give it to TaskBank.open, or give weights")
        z = checks.check_tensor("z", z).detach()
        if z.ndim != 2 or z.shape[1] != self.hyper.z_dim:
            raise ValueError(f"z must have shape (n, {self.hyper.z_dim}), got {checks.shape(z)}")
        dtype, device = self.hyper.dtype, self.hyper.device
        if z.dtype != dtype or z.device != device:
            raise TypeError(f"z must be {dtype} on {device}, got {z.dtype}, {z.device}")
        blocks = None if self.max_bytes is not None else map(self.generate, z.split(size))
        return Given(len(z), z, blocks)

    @contextmanager
    def adding(self, given: Given, keys: Iterable[Key | None] | None = None) -> Iterator[Tensor]:
        """Adds tasks: made before the block, which gets their ids, and published after it, all at
        once. If the block raises, or the log cannot be written, nothing has changed.

        Args:
            keys: of each task its key, as :func:`to_key` gives it, or ``None``.
        """
        names = list(keys or ())
        if keys is not None and len(names) != given.tasks:
            raise ValueError(f"keys must hold {given.tasks} keys, one a task, got {len(names)}")
        with self.table.write:
            ids = self.table.fresh_ids(given.tasks)
            named = [
                (task, name)
                for task, name in zip(ids.tolist() if names else [], names, strict=True)
                if name is not None
            ]
            known, mine = self.table.keys, set[Key]()
            for _, name in named:
                if name in known or name in mine:
                    came = "comes twice" if name in mine else "is taken"
                    raise ValueError(
                        f"keys must be new, and different from each other: {name!r} {came}"
                    )
                mine.add(name)
            with self._changing("add", ids, given, named):
                yield ids

    @contextmanager
    def updating(self, ids: Tensor, given: Given) -> Iterator[None]:
        """Replaces the networks of tasks, in the same way."""
        if given.tasks != len(ids):
            raise ValueError(f"ids must hold {given.tasks} ids, one a network, got {len(ids)}")
        with self.table.write:
            self.table.find(ids)
            with self._changing("update", ids, given, []):
                yield

    def remove(self, ids: Tensor) -> None:
        """Removes tasks, all of them or, if it raises, none."""
        with self.table.write:
            self.table.find(ids)
            self.table.read_keys()
            self._record("remove", Change(ids, ids, ids, []), None)
            self.table.remove(ids)

    @contextmanager
    def _changing(
        self, op: Literal["add", "update"], ids: Tensor, given: Given, named: Named
    ) -> Iterator[None]:
        if self.log is not None:
            self.log.check_owner()  # before anything is made
        with self.table.prepare(ids, given.blocks, given.z, named) as change:
            yield
            self._record(op, change, given.z)
        {"add": self.table.add, "update": self.table.update}[op](change)

    def _record(self, op: str, change: Change, z: Tensor | None) -> None:
        """Acknowledges a change: when this returns, the log holds it."""
        if self.log is not None:
            content = {"ids": change.ids}
            if op != "remove" and self.max_bytes is None:
                columns = self.table.weights.take(change.slots)
                content |= zip(self.format.columns, columns, strict=True)
            if z is not None:
                content["latents"] = z
            if change.named:
                content["keys"] = pack_keys(change.named)
            self.log.append(self.sequence + 1, {"op": op}, content)
        self.sequence += 1

    def close(self) -> None:
        """Closes the log; in a forked process, lets go of it."""
        with self.saving, self.table.write:
            if self.log is not None:
                self.log.close()

    # The log, repeated

    def replay(self, file: BinaryIO, source: str) -> int:
        """Repeats what a log holds beyond the snapshot; returns where its last record ends, or 0 if
        it holds less than the snapshot.

        Raises:
            BankFileError: it does not fit.
        """
        end, last = 0, 0
        for entry in records(file, source):
            try:
                if end == 0:
                    if entry.meta["op"] != "begin" or entry.sequence > self.sequence:
                        raise ValueError("it begins in the middle")
                    if entry.meta["bank"] != self.name:
                        raise ValueError("it belongs to another bank; if it is old, delete it")
                elif entry.sequence != last + 1:
                    raise ValueError("a record is missing")
                elif entry.sequence > self.sequence:
                    self._repeat(entry)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise BankFileError(f"{source} does not fit its bank: {error}") from error
            end, last = entry.end, entry.sequence
        return end if last == self.sequence else 0

    def _repeat(self, entry: Record) -> None:
        """One change of a log, which is not trusted to fit."""
        op, tensors = entry.meta["op"], entry.tensors
        ids = to_ids(tensors["ids"], self.device, distinct=True)
        if op == "remove":
            self.remove(ids)
        elif op == "update":
            with self.updating(ids, self._given_in(tensors, len(ids))):
                pass
        elif op == "add":
            named = unpack_keys(tensors["keys"], set(ids.tolist())) if "keys" in tensors else []
            names = dict(named)
            keys = [names.get(task) for task in ids.tolist()] if names else None
            with self.adding(self._given_in(tensors, len(ids)), keys) as new:
                if not torch.equal(new, ids):
                    raise ValueError("its ids are not the next")
        else:
            raise ValueError(f"its change is {op!r}")
        self.sequence = entry.sequence

    def _given_in(self, tensors: Mapping[str, Tensor], count: int) -> Given:
        columns, z = None, None
        if self.max_bytes is None:
            columns = tuple(tensors[name] for name in self.format.columns)
            fits(self.table.weights.columns, columns, count)
        if (columns is None or "latents" in tensors) and self.table.latents is not None:
            z = tensors["latents"]
            fits(self.table.latents.columns, (z,), count)
        if columns is None and z is None:
            raise ValueError("it adds nothing")
        return Given(count, z, None if columns is None else [columns])

    # Copies: in memory, without the log. Weights that were generated within a budget are left out.

    @torch.inference_mode(False)
    def __getstate__(self) -> dict[str, Any]:
        table, kept = self.table, ("spec", "activations", "device", "max_bytes", "hyper", "mark")
        with ExitStack() as stack:
            with table.write:
                entries, named = stack.enter_context(table.frozen())
                sequence = self.sequence
            if self.max_bytes is not None:
                entries[:, SLOT] = -1
            weights = table.weights.take(renumbered(entries, SLOT))
            latents = None
            if table.latents is not None:
                latents = table.latents.column(0, renumbered(entries, LATENT))
        return {name: getattr(self, name) for name in kept} | {
            "dtype": self.format.dtype,
            "transform": self.format.transform,
            "latent": None if table.latents is None else table.latents.columns[0],
            "sequence": sequence,
            "named": named,
            "tensors": (entries, latents, *weights),
        }

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["spec"],
            state["activations"],
            state["dtype"],
            state["device"],
            transform=state["transform"],
            latent=state["latent"],
            max_bytes=state["max_bytes"],
        )
        if state["hyper"] is not None:
            self.attach(state["hyper"])
        self.mark, self.sequence = state["mark"], state["sequence"]
        # What is unpickled in inference mode could not be changed outside.
        entries, latents, *weights = [
            t.clone() if t is not None and t.is_inference() else t for t in state["tensors"]
        ]
        self.table.adopt(entries, lambda _: state["named"], tuple(weights), latents, {})
        self.table.read_keys()

    def __deepcopy__(self, memo: dict[int, Any]) -> Contents:
        twin = Contents.__new__(Contents)
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())  # which copies all that can change
        return twin


def renumbered(entries: Tensor, column: int) -> Tensor:
    """The slots in a column of entries (-1: none) in their order; in ``entries`` they become 0, 1,
    ..., as they are numbered in a file or a copy that holds no others."""
    held = entries[:, column] >= 0
    slots = entries[held, column]
    entries[held, column] = torch.arange(len(slots), dtype=torch.int64, device=slots.device)
    return slots


def to_ids(ids: Ids, device: torch.device, distinct: bool = False) -> Tensor:
    """``ids`` as a tensor ``(n,)`` on ``device``, the bank's."""
    if not isinstance(ids, Tensor):
        listed: Any = ids.tolist() if hasattr(ids, "tolist") else ids  # an array of numpy
        if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
            listed = [listed]
        wanted = "ids must be ints or an int64 tensor (bank.ids(keys) gives the ids of keys)"
        numbers = [integer(wanted, value) for value in listed]
        for number in numbers:
            if not -1 << 63 <= number < 1 << 63:
                raise IndexError(f"no task of the bank has the id {number}")
        ids = torch.tensor(numbers, dtype=torch.int64, device=device)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"ids must have shape (n,), got {checks.shape(ids)}")
    if distinct:
        check_distinct("ids", ids)
    return ids.to(device)


def check_distinct(name: str, ids: Tensor) -> None:
    """Raises ValueError where an id comes twice."""
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        twice = int(values[counts > 1][0])
        raise ValueError(f"{name} must be different from each other: {twice} comes twice")


def check_request(x: Tensor, task_ids: Tensor, spec: MLPSpec, device: torch.device) -> None:
    """Rows and their ids fit networks that are there; whether these have such ids is not asked."""
    checks.check_dense(x=checks.check_tensor("x", x))
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"x must be on the device of the bank, {device}, got {x.device}")
    checks.check_rows(x, spec.sizes[0], 0, checks.check_tensor("task_ids", task_ids), "")


def to_flat(spec: MLPSpec, weights: Weights) -> Tensor:
    """``weights`` as one tensor ``(n, P)``."""
    flat = (weights if isinstance(weights, Tensor) else spec.flatten(weights)).detach()
    if flat.ndim != 2 or flat.shape[1] != spec.numel:
        raise ValueError(f"weights must have shape (n, {spec.numel}), got {checks.shape(flat)}")
    if not flat.is_floating_point():
        raise TypeError(f"weights must be floating-point, got {flat.dtype}")
    return flat


# Modules that a bank holds


def mark_of(hyper: HyperNet) -> str:
    """A checksum of the parameters of ``hyper``."""
    total = 0
    for value in tree_leaves(hyper.state_dict()):
        if isinstance(value, Tensor):  # quantised layers keep other values, and tuples
            value = value.dequantize() if value.is_quantized else value
            total = zlib.crc32(raw(value.detach().cpu().contiguous()), total)
    return f"{total:08x}"


def copy_module(
    name: str,
    module: Module,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Module:
    """A copy that shares nothing with ``module``, in another dtype or on another device if wanted.

    Raises:
        TypeError: there can be no copy; the message names the argument ``name``.
    """
    try:
        twin = clone(module)
    except Exception as error:
        raise TypeError(
            f"{name} must be such that it can be copied, as a bank keeps its own: {error}"
        ) from error
    twin = twin.to(device=device, dtype=dtype)
    for part in twin.modules():  # tensors that are neither parameters nor buffers
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                wanted = dtype if value.is_floating_point() else None
                vars(part)[key] = value.to(device=device, dtype=wanted)
    return twin


def own_activations(
    activations: Sequence[nn.Module | None], dtype: torch.dtype, device: torch.device
) -> list[nn.Module | None]:
    """Copies, in eval mode; one that stands twice is one still."""
    copies = {
        id(a): copy_module("target", a, dtype, device).eval() for a in activations if a is not None
    }
    return [None if a is None else copies[id(a)] for a in activations]


def _some(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x[where]


def _join(pieces: list[tuple[Tensor | None, Tensor]], count: int) -> Tensor:
    """One tensor of ``count`` rows from pieces and their positions."""
    if pieces[0][0] is None:
        return pieces[0][1]
    whole = pieces[0][1].new_empty(count, pieces[0][1].shape[1])
    for where, piece in pieces:
        whole[where] = piece
    return whole
