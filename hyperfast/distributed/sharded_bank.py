"""ShardedTaskBank: the tasks of a bank, shared among the ranks of a process group."""

from __future__ import annotations

import hashlib
import os
import secrets
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NoReturn, SupportsIndex, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfast import checks
from hyperfast.bank import TaskBank, report, snapshot
from hyperfast.bank.contents import Given, Weights, check_distinct, to_flat
from hyperfast.bank.file import BankFileError
from hyperfast.bank.table import Key, integer
from hyperfast.distributed.folder import Manifest, load, model, writing
from hyperfast.distributed.ranks import Ranks, owner
from hyperfast.layout import MLPSpec, positive
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

Keys: TypeAlias = Tensor | Sequence[Key]

# Ids of named tasks begin here; below lie numbers, given or issued.
NAMED = 1 << 62


class ShardedTaskBank:
    """A :class:`TaskBank` over many processes: each rank holds the tasks whose id's hash is its.

    Every method but ``len``, ``ids``, ``explain`` and ``close`` is collective, ``in`` too: all
    ranks of the group call it, in the same order and from one thread each, with rows and tasks of
    their own, any number of them or none. What raises on one rank raises on all, and then nothing
    has changed. Works under ``torchrun``, on any backend that serves the bank's device.

    What a TaskBank has and this has not: ``keys``, for names are not kept, their ids are made of
    them; ``module``, for no process has all weights; a log, so that changes are lost in a crash
    unless they were saved; copies and pickles, for a process group belongs to its process.

    A row costs two trips over the network: its id and inputs to the owner of its task, its outputs
    back. They are exchanged by ``all_to_all``, in the dtype in which the bank computes.

    ``bank(x, ids)`` equals, to the last bit, what one TaskBank of the same stored weights returns
    for the rows of all ranks in one batch, rank after rank. For the rows of a task meet at its
    owner in that order, and its other rows are all that the result of a row may depend on: the C++
    kernels run a task with more than 6 rows by other sums, equal up to rounding. So here as there,
    the same row in another batch may differ in its last bits. Weights are stored alike if they are
    given, or come from a file; those that a hypernetwork makes of latents are equal up to the
    rounding of a matrix product in a batch of another size.

    Made by :meth:`from_latents`, :meth:`from_weights` or :meth:`open`.

    Attributes:
        local: the bank of this rank, in which the ids of the tasks are keys. Read it only.
        rank, ranks: place in the group, and its size.

    Example:
        >>> hyper, mine = hyperfast.HyperNet(16, 64, 64, 10), torch.randn(1000, 16)  # on every rank
        >>> bank = hyperfast.ShardedTaskBank.from_latents(hyper, mine)
        >>> bank(torch.randn(3, 64), torch.tensor([7, 999, 7])).shape  # tasks of any rank
        torch.Size([3, 10])
    """

    def __init__(self, local: TaskBank, ranks: Ranks, issued: int = 0):
        self.local = local
        self._contents = contents = local.contents
        self._ranks = ranks
        self.rank, self.ranks = ranks.rank, ranks.size
        self._issued = issued  # ids below are spent
        kinds = contents.text or [
            type(a).__name__ for a in contents.activations
        ]  # a repr may hold an address
        meta = [local.spec, local.dtype, contents.mark, local.max_bytes, kinds]
        with ranks.agreed(2) as told:
            told[self.rank] = torch.tensor(
                [zlib.crc32(repr(meta).encode()), len(local)], dtype=torch.int64, device="cpu"
            )
        if len(told[:, 0].unique()) > 1:
            raise ValueError(
                "the ranks must give banks of equal sizes, dtype, activations and hypernetwork"
            )
        self._count = int(told[:, 1].sum())

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
        group: dist.ProcessGroup | None = None,
    ) -> ShardedTaskBank:
        """A bank of the networks that ``hyper`` makes of the ranks' ``z``; without ``keys`` their
        ids are ``0, 1, ...``, rank after rank.

        Args:
            z: ``(n, z_dim)``, this rank's part.
            hyper, dtype, target: as in :meth:`TaskBank.from_latents`, the same on all ranks.
            keys: as in :meth:`add`.
            max_bytes: memory budget of the weights, of each rank.
            group: by default that of all processes.

        Raises:
            TypeError, ValueError: as in :meth:`TaskBank.from_latents`; ranks that disagree.
        """
        ranks = Ranks(group)
        with ranks.agreed():
            none = _no_rows(checks.check_tensor("z", z))
            local = TaskBank.from_latents(
                hyper, none, dtype=dtype, target=target, max_bytes=max_bytes
            )
        bank = cls(local, ranks)
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
        group: dist.ProcessGroup | None = None,
    ) -> ShardedTaskBank:
        """A bank of the ranks' networks; without ``keys`` their ids are ``0, 1, ...``, rank after
        rank.

        Args:
            weights: flat ``(n, P)``, or ``(w1, b1, ...)`` with a leading ``n``, this rank's part.
            spec, dtype, target: as in :meth:`TaskBank.from_weights`, the same on all ranks.
            keys: as in :meth:`add`.
            group: by default that of all processes.

        Raises:
            TypeError, ValueError: as in :meth:`TaskBank.from_weights`; ranks that disagree.
        """
        ranks = Ranks(group)
        with ranks.agreed():
            none: Weights
            if isinstance(weights, Tensor):
                none = _no_rows(weights)
            else:
                none = [_no_rows(w) for w in weights]
            local = TaskBank.from_weights(spec, none, dtype=dtype, target=target)
        bank = cls(local, ranks)
        bank.add(weights=weights, keys=keys)
        return bank

    # Reading

    def __len__(self) -> int:
        """The number of tasks on all ranks. Not collective."""
        return self._count

    def __contains__(self, task: Key) -> bool:
        """Whether there is a task of this id or key: each rank asks for one of its own."""
        return bool(self._ask(lambda: (self.ids([task]),), self._known, found=False))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a ShardedTaskBank cannot be copied or pickled, as its process group belongs to this "
            "process: save it and open it elsewhere, or copy the local bank of this rank"
        )

    def __repr__(self) -> str:
        return f"ShardedTaskBank({len(self)} tasks on {self.ranks} ranks, here {self.local})"

    def ids(self, keys: Keys) -> Tensor:
        """The ids ``(n,)`` that stand for keys, of tasks that are there or not. Not collective.

        An int in ``[0, 2**62)`` is its own id; the id of a str is made of its BLAKE2b, so that no
        rank need know the others' names. That two of ``n`` names share an id has a probability of
        ``n**2 / 2**63``, 1e-7 for a million; :meth:`add` refuses the second.

        Raises:
            TypeError: a key that is neither, a tensor that is not int64.
            ValueError: an int out of range.
        """
        if isinstance(keys, Tensor):
            if keys.dtype != torch.int64 or keys.ndim != 1:
                raise TypeError(f"ids must be int64 of shape (n,), got {keys.dtype}, {keys.ndim}-d")
            return keys.to(self.local.device)
        numbers = [_id(key) for key in keys]
        return torch.tensor(numbers, dtype=torch.int64, device=self.local.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor, ids: Keys) -> Tensor:
        """Runs every row through the network of its task, wherever it is. No gradient flows.

        Args:
            x: ``(R, in)``, this rank's rows, any floating-point dtype and strides.
            ids: ``(R,)`` int64, or as many keys, in any order, with any repeats.

        Returns:
            ``(R, out)``, in the dtype of ``x``.

        Raises, on all ranks:
            ValueError, TypeError: as in :meth:`TaskBank.__call__`.
            IndexError: an id that is not, or no longer, in the bank.
            BankFileError: weights that were mapped from a file are damaged.
        """

        def rows() -> tuple[Tensor, Tensor]:
            local, tasks = self.local, self.ids(ids)
            checks.check_dense(x=checks.check_tensor("x", x))
            if not x.is_floating_point():
                raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
            checks.check_rows(x, local.spec.sizes[0], len(self), tasks, "")
            return tasks, x.to(self._contents.format.compute)

        return self._ask(rows, lambda tasks, x: self.local(x, tasks)).to(x.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def weights(self, ids: Keys) -> Tensor:
        """The flat weights ``(n, P)`` of tasks as stored; int8 widened to float32.

        Raises, on all ranks:
            IndexError: an id that is not in the bank.
            BankFileError: weights that were mapped from a file are damaged.
        """
        return self._ask(lambda: (self.ids(ids),), self.local.weights)

    def latents(self, ids: Keys) -> Tensor:
        """The latents ``(n, z_dim)`` of tasks.

        Raises, on all ranks:
            IndexError: an id that is not in the bank.
            ValueError: a task that was given by its weights.
        """
        return self._ask(lambda: (self.ids(ids),), self.local.latents)

    @torch.inference_mode(False)
    @torch.no_grad()
    def error_report(
        self, weights: Weights | None = None, *, ids: Keys | None = None, rows: int = 16
    ) -> report.ErrorReport:
        """What storing costs in accuracy, over the tasks that all ranks ask about; the same on all.

        Args:
            weights: the exact networks, an entry an id; without, those that the hypernetwork makes
                of the latents in float64. All ranks must give them, or none.
            ids: which tasks to compare; by default all, each by its owner.
            rows: random inputs of each task.

        Raises, on all ranks:
            ValueError: a task has no latent, and ``weights`` are not given; ranks that disagree.
        """
        local, contents = self.local, self._contents
        with self._ranks.agreed(2) as told:
            told[self.rank] = torch.tensor(
                [weights is None, positive("rows", rows)], dtype=torch.int64, device="cpu"
            )
        if len(told.unique(dim=0)) > 1:
            raise ValueError("the ranks must all give weights, or none, and the same rows")

        def asked() -> tuple[Tensor, ...]:
            if weights is None and local.hyper is None:
                raise ValueError("weights must be given, as the bank has no hypernetwork")
            if ids is None:
                if weights is not None:
                    raise ValueError("ids must be given, of the tasks that weights are compared to")
                return (self._ids_here(),)
            tasks = self.ids(ids)
            if weights is None:
                return (tasks,)
            flat = to_flat(local.spec, weights)
            if len(flat) != len(tasks):
                raise ValueError(
                    f"weights must hold {len(tasks)} networks, one an id, got {len(flat)}"
                )
            return tasks, flat.double()

        counts, sent, _ = self._route(asked)
        owned, *exact = self._ranks.exchange(counts, sent)
        width = 6 * len(local.spec.layers)
        with self._ranks.agreed(width) as told:
            right = exact[0] if exact else None
            errors = report.measure(contents, self._find(owned), right, rows)
            told[self.rank] = errors.flatten().view(torch.int64)
        errors = told.cpu().contiguous().view(torch.float64)
        errors = errors.view(self.ranks, len(local.spec.layers), 2, 3)
        title = f"{self.ranks} ranks against float64: {int(counts.sum())} tasks, {rows} rows each"
        return report.error_report(title, local.spec, report.joined(errors))

    def explain(self) -> report.Costs:
        """What a task costs, its weights kept or generated when it is used; and how many there are,
        on this rank. Not collective.

        Raises:
            ValueError: the bank has no hypernetwork.
        """
        return self.local.explain()

    # Changing

    def add(
        self,
        z: Tensor | None = None,
        *,
        weights: Weights | None = None,
        keys: Sequence[Key] | None = None,
    ) -> Tensor:
        """Adds the ranks' tasks and returns the ids ``(n,)`` of this rank's.

        Args:
            z: latents ``(n, z_dim)``, for a bank that has a hypernetwork.
            weights: instead, flat ``(n, P)`` or ``(w1, b1, ...)`` with a leading ``n``. All ranks
                must give the one or the other.
            keys: an int or a str for each, see :meth:`ids`; without, the next numbers that are
                above all that were ever used.

        Raises, on all ranks:
            ValueError: shapes that disagree, a key that is taken or given twice.
            TypeError: dtypes that disagree.
        """
        return self._change("add", z, weights, keys)

    def update(self, ids: Keys, z: Tensor | None = None, *, weights: Weights | None = None) -> None:
        """Replaces the networks of tasks, which keep their ids.

        Args:
            ids: different ids or keys; no task may be updated by two ranks.
            z, weights: as in :meth:`add`, an entry an id.

        Raises, on all ranks:
            IndexError: an id that is not in the bank.
            ValueError, TypeError: as in :meth:`add`.
        """
        self._change("update", z, weights, ids)

    def remove(self, ids: Keys) -> None:
        """Removes tasks. A number is not issued again; it, or a name, may be given to a new task.

        Raises, on all ranks:
            IndexError: an id that is not in the bank.
            ValueError: an id given twice.
        """
        counts, sent, _ = self._route(lambda: (self.ids(ids),))
        (owned,) = self._ranks.exchange(counts, sent)
        with self._ranks.agreed():
            check_distinct("keys", owned)
            tasks = self._find(owned)
        self.local.remove(tasks)
        self._count -= int(counts.sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _change(
        self,
        op: Literal["add", "update"],
        z: Tensor | None,
        weights: Weights | None,
        keys: Keys | None,
    ) -> Tensor:
        contents = self._contents
        with self._ranks.agreed(3) as told:
            given = contents.given(z, weights)
            ids = None if keys is None else self.ids(keys)
            if ids is not None and len(ids) != given.tasks:
                raise ValueError(
                    f"keys must hold {given.tasks} keys, one a network, got {len(ids)}"
                )
            if ids is not None and bool((ids < 0).any()):
                raise ValueError(f"keys must be in [0, 2**63), got {int(ids.min())}")
            numbers = [] if ids is None else ids[ids < NAMED].tolist()
            new = given.tasks if ids is None else 0
            told[self.rank] = torch.tensor(
                [given.z is None, new, max(numbers, default=-1)], dtype=torch.int64, device="cpu"
            )
        if len(told[:, 0].unique()) > 1:
            raise ValueError("the ranks must all give z, or all give weights")
        first = max(self._issued, int(told[:, 2].max()) + 1)
        if ids is None:
            start = first + int(told[: self.rank, 1].sum())
            ids = torch.arange(
                start, start + given.tasks, dtype=torch.int64, device=contents.device
            )

        def content() -> tuple[Tensor, ...]:
            if given.z is not None:
                return ids, given.z
            assert given.blocks is not None
            return (ids, *map(torch.cat, zip(*given.blocks, strict=True)))

        counts, sent, _ = self._route(content)
        owned, *columns = self._ranks.exchange(counts, sent)
        with ExitStack() as stack, self._ranks.agreed():
            # The stack publishes the change when all ranks have agreed, or undoes it.
            check_distinct("keys", owned)
            mine = Given(len(owned), None, [tuple(columns)])
            if given.z is not None:
                mine = contents.given(columns[0], None)
            if op == "add":
                names = owned.tolist()
                if taken := contents.table.keys.keys() & names:
                    raise ValueError(f"keys must be new, and the id {min(taken)} is taken")
                stack.enter_context(contents.adding(mine, names))
            else:
                stack.enter_context(contents.updating(self._find(owned), mine))
        if op == "add":
            self._count += int(counts.sum())
            self._issued = first + int(told[:, 1].sum())
        return ids

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Writes all tasks to a folder that all ranks see: a file a rank, and a manifest. A crash
        of any rank leaves what was there before, or all that is new. New files have the modes of
        those that they follow.

        Raises, on all ranks:
            ValueError: an activation that has no name, which a file cannot hold.
            BankFileError: another group saves into the folder.
            OSError: a file could not be written; what was there is unchanged.
        """
        folder = Path(path).resolve()
        with ExitStack() as stack:
            with self._ranks.agreed(1) as told:
                if self.rank == 0:
                    stack.enter_context(writing(folder))
                told[self.rank] = secrets.randbits(62)
            manifest = Manifest.new(int(told[0]), self.ranks, len(self), self._issued)
            with self._ranks.agreed():
                file = folder / manifest.files[self.rank]
                snapshot.save(self._contents, file, model(folder, self.rank))
            with self._ranks.agreed():
                if self.rank == 0:
                    manifest.write(folder)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        hyper: HyperNet | None = None,
        max_bytes: int | None = None,
        verify: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> ShardedTaskBank:
        """Opens a saved bank, with any number of ranks. With as many as it was saved by, each maps
        its file into memory; with another, each copies its tasks from all files.

        Args:
            hyper, max_bytes, verify: as in :meth:`TaskBank.open`.
            group: by default that of all processes.

        Raises, on all ranks:
            BankFileError: not a sharded bank, damaged, made with another hypernetwork, or not the
                same folder on all ranks.
            ValueError, OSError: as in :meth:`TaskBank.open`.
        """
        folder = Path(path).resolve()
        ranks = Ranks(group)
        with ranks.agreed(1) as told:
            manifest = Manifest.read(folder)
            told[ranks.rank] = manifest.checksum
        if len(told.unique()) > 1:
            raise BankFileError(f"{folder} does not hold the same on all ranks")
        with ranks.agreed():
            contents = load(
                folder, manifest, ranks.rank, ranks.size,
                hyper=hyper, max_bytes=max_bytes, verify=verify,
            )  # fmt: skip
        bank = cls(TaskBank(contents), ranks, manifest.issued)
        if len(bank) != manifest.tasks:
            raise BankFileError(f"{folder} holds {len(bank)} tasks, not {manifest.tasks}")
        return bank

    def close(self) -> None:
        """Does nothing, as there is no log: for code that closes a bank of either kind."""

    # Exchange

    def _route(
        self, content: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """What goes from where to where: counts ``(ranks, ranks)``, what ``content`` returns
        (ids ``(n,)``, and columns of as many rows) ordered by owner, and this order."""
        with self._ranks.agreed(self.ranks) as counts:
            columns = content()
            owners = owner(columns[0], self.ranks)
            order = owners.argsort(stable=True)
            sent = tuple(column.index_select(0, order) for column in columns)
            counts[self.rank] = owners.bincount(minlength=self.ranks)
        return counts, sent, order

    def _ask(
        self,
        question: Callable[[], tuple[Tensor, ...]],
        answer: Callable[..., Tensor],
        found: bool = True,
    ) -> Tensor:
        """Sends ids and columns to the owners, and returns in order what they answer: ``answer`` of
        local ids (of ids, where they need not be ``found``) and columns is a row for each."""
        counts, sent, order = self._route(question)
        received = self._ranks.exchange(counts, sent)
        with self._ranks.agreed():
            ids = self._find(received[0]) if found else received[0]
            rows = answer(ids, *received[1:])
        (rows,) = self._ranks.exchange(counts.mT, [rows])  # back the way they came
        return torch.empty_like(rows).index_copy_(0, order, rows)

    def _find(self, ids: Tensor) -> Tensor:
        """The ids in the local bank of tasks that this rank owns."""
        try:
            return self.local.ids(ids.tolist())
        except KeyError as error:
            raise IndexError(f"no task of the bank has the id {error}") from None

    def _known(self, ids: Tensor) -> Tensor:
        """Which of ``ids`` are tasks of this rank ``(n, 1)``."""
        keys = self._contents.table.keys
        known = [[task in keys] for task in ids.tolist()]
        return torch.tensor(known, dtype=torch.bool, device=ids.device).view(len(ids), 1)

    def _ids_here(self) -> Tensor:
        """The ids of the tasks of this rank."""
        keys = [*self._contents.table.keys]
        return torch.tensor(keys, dtype=torch.int64, device=self.local.device)


def _no_rows(rows: Tensor) -> Tensor:
    """``rows[:0]``; a 1-d tensor passes through, and is refused by ``add``."""
    return rows[:0] if rows.ndim > 1 else rows


def _id(key: Key) -> int:
    if isinstance(key, str):
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % NAMED + NAMED
    number = integer("keys must be str or int", key)
    if not 0 <= number < 2 * NAMED:
        raise ValueError(f"keys must be in [0, 2**63), got {number}")
    return number
