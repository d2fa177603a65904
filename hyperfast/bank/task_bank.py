"""TaskBank: the weights of many small networks, ready to be applied to mixed batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.bank import report, snapshot
from hyperfast.bank.contents import Contents, Ids, Weights, check_request, to_flat, to_ids
from hyperfast.bank.export import BankModule
from hyperfast.bank.table import Key, integer, several, to_key
from hyperfast.layout import MLPSpec, positive
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

    Hypernetwork and activations are copies, in eval mode: the bank does not change under further
    training. ``copy.copy``, ``copy.deepcopy`` and ``pickle`` make a bank of its own, in memory:
    equal, but without the log. A forked process has such a copy too: it can read the bank, and
    change it if it has no log; a log stays with the process that opened it.

    Attributes:
        spec: layout of the weights.
        dtype: what they are stored as.
        device: where.
        max_bytes: the memory budget of the weights, or ``None``.
        hyper: the bank's copy of its hypernetwork, or ``None``.
        contents: all that it holds, for the library itself.

    Example:
        >>> hyper = hyperfast.HyperNet(16, 64, 64, 10)
        >>> bank = hyperfast.TaskBank.from_latents(hyper, torch.randn(1000, 16), dtype=torch.int8)
        >>> bank(torch.randn(3, 64), torch.tensor([7, 999, 7])).shape  # three rows
        torch.Size([3, 10])
    """

    def __init__(self, contents: Contents):
        self.contents = contents

    @property
    def spec(self) -> MLPSpec:
        return self.contents.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.contents.format.dtype

    @property
    def device(self) -> torch.device:
        return self.contents.device

    @property
    def max_bytes(self) -> int | None:
        return self.contents.max_bytes

    @property
    def hyper(self) -> HyperNet | None:
        return self.contents.hyper

    def __copy__(self) -> TaskBank:
        return copy.deepcopy(self)

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
            TypeError: ``hyper`` does not generate an MLP, or cannot be copied; dtypes disagree.
            ValueError: shapes that disagree, a budget below one task.
        """
        if not isinstance(hyper, HyperNet) or not isinstance(hyper.spec, MLPSpec):
            raise TypeError(f"hyper must be a HyperNet that generates an MLP, got {hyper!r}")
        target = TargetNet(hyper.target_activation) if target is None else target
        dtype = hyper.dtype if dtype is None else dtype
        bank = cls(Contents.of_target(hyper.spec, target, dtype, hyper.device, hyper, max_bytes))
        bank.add(checks.check_tensor("z", z), keys=keys)
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
        dtype = flat.dtype if dtype is None else dtype
        bank = cls(Contents.of_target(spec, target, dtype, flat.device))
        bank.add(weights=flat, keys=keys)
        return bank

    # Reading

    def __len__(self) -> int:
        """The number of tasks."""
        return self.contents.table.count

    def __contains__(self, task: object) -> bool:
        """Whether ``task`` is the id of a task in the bank; for keys ask ``bank.keys``."""
        number = integer("a task id must be an int; for keys ask bank.keys", task)
        try:
            ids = to_ids(number, self.device)
            with self.contents.table.lock:
                self.contents.table.find(ids)
        except IndexError:
            return False
        return True

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"TaskBank({len(self)} tasks, {self.spec}, {dtype})"

    @property
    def keys(self) -> Mapping[Key, int]:
        """The ids of the tasks that have a key, by key; a view that changes with the bank."""
        return MappingProxyType(self.contents.table.keys)

    def ids(self, keys: Iterable[Key] | None = None) -> Tensor:
        """The ids of the tasks with these keys, or of all tasks.

        Raises:
            KeyError: no task has the key.
            TypeError: one key instead of several, or one that is neither str nor int.
        """
        return self.contents.table.ids(None if keys is None else several(keys))

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """Runs every row through the network of its task. No gradient flows.

        On a CUDA or ROCm device the host does not wait for the ids: the rows of an id that is not
        there are NaN, and a later call, of whomever, or :meth:`check`, raises. So a call can be
        captured in a graph, which sees later changes; when the bank has moved to larger memory (see
        :meth:`update`), capture again, until then :meth:`check` raises. A graph must not outlive
        its bank, whose memory it reads. Calls and changes are to be on one stream, or ordered by
        events. The host still reads ids where the bank has a memory budget, and where int8 runs
        layer by layer, for an activation without a name.

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
            IndexError: an id that is not, or no longer, in the bank; on a GPU, of an earlier call.
            BankFileError: weights that were mapped from a file are damaged.
        """
        check_request(x, task_ids, self.spec, self.device)
        if not len(x):
            return x.new_empty(0, self.spec.sizes[-1])
        return self.contents.run(x.to(self.contents.format.compute), task_ids).to(x.dtype)

    def check(self) -> None:
        """Waits for the calls so far on the current stream, where they are on a GPU, and raises
        what they met; where they raised at once, it does nothing.

        Raises:
            IndexError: an id that was not, or no longer, in the bank.

        Example:
            >>> hyper = hyperfast.HyperNet(2, 3, (4,), 1)
            >>> bank = hyperfast.TaskBank.from_latents(hyper, torch.randn(9, 2))
            >>> y = bank(torch.randn(5, 3), torch.arange(5))
            >>> bank.check()  # all five are there
        """
        self.contents.check()

    @torch.inference_mode(False)
    @torch.no_grad()
    def weights(self, ids: Ids) -> Tensor:
        """The flat weights ``(n, P)`` of tasks as stored; int8 widened to float32.

        Raises:
            IndexError: an id that is not in the bank.
            BankFileError: weights that were mapped from a file are damaged.
        """
        return self.contents.weights(to_ids(ids, self.device))

    def latents(self, ids: Ids) -> Tensor:
        """The latents ``(n, z_dim)`` of tasks.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError: a task that was given by its weights.
        """
        return self.contents.latents(to_ids(ids, self.device))

    @torch.inference_mode(False)
    def module(self) -> BankModule:
        """A module that does what the bank does now, for ``torch.export``: ``module(x, task_ids)``.

        It holds a copy of the weights, in the dtype that the bank computes in; int8 is widened.
        """
        return BankModule(self.contents)

    def error_report(
        self, weights: Weights | None = None, *, ids: Ids | None = None, rows: int = 16
    ) -> report.ErrorReport:
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
        errors = report.measure(self.contents, ids, flat, positive("rows", rows))
        title = f"{self} against float64: {len(ids)} tasks, {rows} rows each"
        return report.error_report(title, self.spec, errors)

    def explain(self) -> report.Costs:
        """What a task costs in memory and time, its weights kept or generated when it is used.

        Raises:
            ValueError: the bank has no hypernetwork.
        """
        return report.explain(self.contents)

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
            OSError: the log could not be written, or is that of another process.
        """
        names = None if keys is None else [to_key(key) for key in several(keys)]
        with self.contents.adding(self.contents.given(z, weights), names) as ids:
            pass
        return ids

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, ids: Ids, z: Tensor | None = None, *, weights: Weights | None = None) -> None:
        """Replaces the networks of tasks, which keep their ids and keys; all or none.

        New networks are stored beside the old, and then take their place. On a GPU a bank that has
        just grown keeps room for a sixteenth of what was added, at least 64; to update more tasks
        at a time than there is room for moves it to larger memory.

        Args:
            ids: different ids.
            z, weights: as in :meth:`add`, an entry an id.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError, TypeError, OSError: as in :meth:`add`.
        """
        ids = to_ids(ids, self.device, distinct=True)
        with self.contents.updating(ids, self.contents.given(z, weights)):
            pass

    @torch.inference_mode(False)
    def remove(self, ids: Ids) -> None:
        """Removes tasks and their keys; all or none. Their ids will never stand for others.

        Raises:
            IndexError: an id that is not in the bank.
            ValueError: an id given twice.
            OSError: the log could not be written.
        """
        self.contents.remove(to_ids(ids, self.device, distinct=True))

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Writes all tasks to a safetensors file, which a crash leaves as it was or complete. It
        keeps the mode of the file that it replaces.

        Others may read and change the bank meanwhile; their changes are not in the file. A bank
        with a memory budget writes its latents only. If the bank was opened from ``path`` with a
        log, the log loses what the file now holds.

        Raises:
            ValueError: an activation that has no name, which a file cannot hold.
            BankFileError: another bank writes the file, or has it open with a log.
            OSError: the file could not be written, or this is a fork of the process that has it
                open with a log; the old one is unchanged.
        """
        snapshot.save(self.contents, Path(path).resolve())

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
                time can do so, in the process that opened it. The changes in an existing log are
                read in any case.
            verify: check all of the file now, not each part when it is first used.

        Raises:
            BankFileError: not a bank, damaged, made with another hypernetwork, or open with a log
                elsewhere. Damage of the weights shows when they are first used.
            ValueError: ``hyper`` or ``max_bytes`` do not fit the bank.
            OSError: the file cannot be read.
        """
        path = Path(path).resolve()
        return cls(snapshot.open_contents(path, hyper, max_bytes, log=log, verify=verify))

    def close(self) -> None:
        """Closes the log, so that another bank can open it. Changes raise OSError from now on. In a
        forked process it lets go of the log, which its owner keeps."""
        self.contents.close()
