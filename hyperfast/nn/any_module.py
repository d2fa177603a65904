"""Any ``nn.Module`` as a target network: which of its parameters are generated, and how it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from hyperfast import checks
from hyperfast.activations import ELEMENTWISE
from hyperfast.checks import Weights
from hyperfast.layout import MLPSpec, ParamSpec
from hyperfast.nn.copies import clone
from hyperfast.nn.target import TargetNet

Params: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


def _lstm(*args: Any) -> tuple[Tensor, ...]:
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(_enabled=False)  # its fused layer has no rule for vmap either
    try:
        return torch.ops.aten.lstm.input.decompose(*args)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / v.square().sum_to_size(g.shape).sqrt())


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Gradients that depend on the index: vmap's rule has the rows of all tasks in one table, where
    the padding row is the first task's alone, and counts the indices of all tasks together."""
    y = F.embedding(input, weight, None, max_norm, norm_type, False, sparse)
    if scale_grad_by_freq:
        flat = input.flatten()
        count = y.new_zeros(weight.shape[0]).scatter_add(0, flat, y.new_ones(flat.shape))
        y = y.detach() + (y - y.detach()) / count[flat].view(*input.shape, 1)
    if padding_idx is not None:
        y = torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), y.detach(), y)
    return y


def _aten_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any) -> Tensor:
    return _embedding(indices, weight, None if padding_idx < 0 else padding_idx, None, 2.0, *args)


def _autocast(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``op`` under autocast, which does not see the convolutions inside vmap."""

    def cast(*args: Any, **kwargs: Any) -> Tensor:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        args, kwargs = tree_map_only(
            Tensor, lambda t: t if t.dtype == torch.float64 else t.to(dtype), (args, kwargs)
        )
        return op(*args, **kwargs)

    return cast


# Ops that vmap has no rule for, or a wrong one, and what stands in for them.
_aten = torch.ops.aten
REPLACED: dict[Callable, Callable] = {
    torch.gru: _aten.gru.input.decompose,
    torch.gru_cell: _aten.gru_cell.default.decompose,
    torch.lstm: _lstm,
    torch.lstm_cell: _aten.lstm_cell.default.decompose,
    torch.rnn_relu: _aten.rnn_relu.input.decompose,
    torch.rnn_relu_cell: _aten.rnn_relu_cell.default.decompose,
    torch.rnn_tanh: _aten.rnn_tanh.input.decompose,
    torch.rnn_tanh_cell: _aten.rnn_tanh_cell.default.decompose,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    torch.embedding: _aten_embedding,
    **{op: _autocast(op) for op in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{
        op: _autocast(op)
        for op in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    },
}


# What a net may return beside tensors: nothing that could hold one.
PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, Enum)


class ModuleTarget(nn.Module):
    """A module, some of whose parameters are given at the call: ``forward(x, weights)``.

    It works on a copy of ``net``. The parameters that are not generated stay parameters of this
    copy, shared by all tasks; ``parameters()`` and ``state_dict()`` hold these alone. A parameter
    that the net has under several names (tied) is generated once.

    All tasks run in one ``torch.vmap``, recurrent layers and attention included. A module that
    vmap cannot run (a branch on values, ``.item()``) raises torch's error; loop over the tasks
    with unbatched weights then. The weights are there during the call alone, so no part of the net
    may run again in the backward pass, as under ``torch.utils.checkpoint``: checkpoint the whole
    model. An output that is no tensor is
    returned once, as it is. Dropout draws anew for every task. ``torch.compile`` takes all but
    recurrent layers, which Dynamo refuses, and attention in eval mode, which wants
    ``torch.backends.mha.set_fastpath_enabled(False)`` first.

    Args:
        net: the module. It is left as it is.
        names: the parameters to generate, in the order of the weights.

    Attributes:
        names: those names.
        spec: their layout.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: no name, a name that the net does not have, a parameter named twice, or lazy
            parameters, whose shapes are not known before the net has run once.

    Example:
        >>> target = hyperfast.ModuleTarget(torch.nn.Conv1d(1, 4, 3), ["weight"])
        >>> target(torch.rand(5, 7, 1, 8), [torch.randn(5, 4, 1, 3)]).shape  # 5 tasks
        torch.Size([5, 7, 4, 6])
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        super().__init__()
        known = {alias: aliases for aliases in parameter_names(net) for alias in aliases}
        self.names = tuple(names)
        if not self.names or not known.keys() >= set(self.names):
            raise ValueError(f"names must be some of {list(known)}, got {list(self.names)}")
        self._aliases = [known[name] for name in self.names]
        if len({aliases[0] for aliases in self._aliases}) < len(self.names):
            raise ValueError(f"names must name every parameter once, got {list(self.names)}")
        self.spec = ParamSpec(tuple(tuple(net.get_parameter(n).shape) for n in self.names))
        self.net = clone(net)
        # What hooks compute at every call, as pruning does: the call leaves it as it was.
        self._computed = [
            (module, name, value)
            for module in self.net.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ]
        for aliases in self._aliases:
            for alias in aliases:
                path, _, name = alias.rpartition(".")
                owner = self.net.get_submodule(path)
                delattr(owner, name)
                setattr(owner, name, torch.empty(0))  # functional_call wants something to replace

    def forward(self, x: Any, weights: Weights, task_ids: Tensor | None = None) -> Any:
        """Runs the net once, or once for every task.

        Args:
            x: the net's input: a tensor, a tuple of positional arguments or a dict of keyword
                arguments, of tensors or nested structures of them. With batched weights every
                tensor has a leading ``B``, and task ``b`` sees entry ``b``: ``(B, N, C, H, W)`` is
                ``N`` images a task. With ``task_ids`` it is a leading ``R`` instead, and every row
                reaches the net as a batch of one: ``(R, C, H, W)`` is one image a row.
            weights: one tensor a generated parameter, all with a leading ``B`` or none: a sequence,
                an ``nn.ParameterList``, or a dict by name, of which other names are left out.
            task_ids: ``(R,)`` int64: row ``r`` runs with the weights of task ``task_ids[r]``, of
                which it gets a copy: memory for ``R`` networks.

        Returns:
            What the net returns, every tensor with a leading ``B`` where the weights have one. With
            ``task_ids`` it is a leading ``R``, in place of the dimension of the batch of one.

        Raises:
            ValueError: shapes that disagree.
            TypeError: weights that are not tensors, ids that are not int64, a NestedTensor x, an
                output of a type that might hold tensors unseen.
            IndexError: a task id out of range.
            RuntimeError: a norm that would update running statistics, which the tasks share; a
                checkpoint inside the net.
        """
        if isinstance(weights, Mapping | nn.ParameterDict):
            weights = self._by_name(weights)
        weights = checks.check_tensors("weights", weights)
        tasks = self._tasks(weights)
        if tasks is None:
            if task_ids is not None:
                raise ValueError(
                    "task_ids needs weights with a leading task dimension, "
                    f"got weights[0] of shape {checks.shape(weights[0])}"
                )
            return self._call(x, weights)
        self._refuse_running_statistics()
        if any(t.is_nested for t in _tensors(x)):
            raise TypeError(
                "x must be dense where a ModuleTarget has batched weights, got a NestedTensor: "
                "give its rows with task_ids, or loop over x.unbind()"
            )
        if task_ids is None:
            for t in _tensors(x):
                if t.ndim == 0 or len(t) != tasks:
                    raise ValueError(
                        f"x must have a leading dimension of {tasks}, as weights holds {tasks} "
                        f"tasks, got shape {checks.shape(t)}"
                    )
            return self._batched(x, weights, tasks)
        for t in _tensors(x):
            if t.ndim == 0:
                raise ValueError("x must have a leading dimension of rows, got a scalar")
            checks.check_rows(t.new_empty(len(t), 0), 0, tasks, task_ids, "weights")
        if not torch.compiler.is_compiling():
            checks.check_in_range(task_ids, tasks)
        x = tree_map_only(Tensor, lambda t: t.unsqueeze(1), x)
        weights = [w.index_select(0, task_ids) for w in weights]
        y = self._batched(x, weights, len(task_ids))
        return tree_map_only(Tensor, lambda t: t.squeeze(1), y)

    def _by_name(self, weights: Mapping[str, Tensor] | nn.ParameterDict) -> list[Tensor]:
        found = []
        for aliases in self._aliases:
            name = next((alias for alias in aliases if alias in weights), None)
            if name is None:
                raise ValueError(
                    f"weights must hold {list(self.names)}, got {list(weights.keys())}"
                )
            found.append(weights[name])
        return found

    def _tasks(self, weights: Sequence[Tensor]) -> int | None:
        """The number of tasks, ``None`` where the weights have no such dimension."""
        shapes = self.spec.shapes
        if len(weights) != len(shapes):
            raise ValueError(
                f"weights must hold {len(shapes)} tensors, one for each of {list(self.names)}, "
                f"got {len(weights)}"
            )
        batch: tuple[int, ...] = ()
        for n, (w, shape) in enumerate(zip(weights, shapes, strict=True)):
            got = checks.shape(checks.check_tensor(f"weights[{n}]", w))
            if n == 0 and got[1:] == shape:
                batch = got[:1]
            if got != (*batch, *shape):
                raise ValueError(
                    f"weights[{n}], {self.names[n]!r}, must have shape {(*batch, *shape)}"
                    f"{f' or (B, *{shape})' if n == 0 else ''}, got {got}"
                )
        return batch[0] if batch else None

    def _call(self, x: Any, weights: Sequence[Tensor]) -> Any:
        named = {
            alias: w for w, names in zip(weights, self._aliases, strict=True) for alias in names
        }
        try:
            with _no_checkpoint():
                if isinstance(x, dict):
                    return functional_call(self.net, named, (), x)
                return functional_call(self.net, named, x)
        finally:
            for module, name, value in self._computed:
                setattr(module, name, value)

    def _batched(self, x: Any, weights: Sequence[Tensor], tasks: int) -> Any:
        if tasks == 0:  # convolutions cannot be vmapped over nothing
            x, weights = tree_map_only(Tensor, _one_more, (x, tuple(weights)))
            return tree_map_only(Tensor, lambda t: t[:0], self._batched(x, weights, 1))
        on_cpu = weights[0].device.type == "cpu"
        in_dims = tree_map(lambda t: 0 if isinstance(t, Tensor) else None, x)
        others: list[Any] = []
        structure: Any = None

        def call(x: Any, weights: Sequence[Tensor]) -> list[Tensor]:
            nonlocal structure
            leaves, structure = tree_flatten(self._call(x, weights))
            others[:] = [None if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        run = torch.vmap(call, (in_dims, 0), randomness="different")
        # vmap has no rule for the CPU's flash attention and would loop over the tasks
        with _Replaced(), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            tensors = iter(run(x, tuple(weights)))
        leaves = [next(tensors) if other is None else other.value for other in others]
        return tree_unflatten(leaves, structure)

    def _refuse_running_statistics(self) -> None:
        for name, module in self.net.named_modules():
            if module.training and getattr(module, "track_running_stats", False):
                raise RuntimeError(
                    f"{name or 'net'} ({type(module).__name__}) is in training mode and would "
                    "update running statistics, which all tasks share: call eval() on it, build it "
                    "with track_running_stats=False, or use a GroupNorm or LayerNorm"
                )

    def extra_repr(self) -> str:
        return f"generated={list(self.names)}"


class _Plain(NamedTuple):
    """A part of an output that is no tensor, the same for all tasks."""

    value: Any


def _plain(value: Any) -> _Plain:
    if value is not None and not isinstance(value, PLAIN):
        raise TypeError(
            "net must return tensors, nested in tuples, lists and dicts, where weights are "
            f"batched; got {type(value).__name__}, which may hold tensors"
        )
    return _Plain(value)


@contextmanager
def _no_checkpoint() -> Iterator[None]:
    """Refuses what would run parts of a net again in the backward pass, when its weights are gone.
    Hooks around the call stay in force."""
    if torch.compiler.is_compiling():
        yield
        return
    autograd = torch._C._autograd
    before = autograd._saved_tensors_hooks_get_disabled_error_message()
    autograd._saved_tensors_hooks_disable(
        "net must not use torch.utils.checkpoint or saved-tensor hooks itself, as its weights are "
        "there during the call alone: checkpoint the call of the whole model",
        False,
    )
    try:
        yield
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        raise RuntimeError(
            "net must not call an autograd.Function that vmap does not know where weights are "
            "batched, as torch.utils.checkpoint with use_reentrant=True does: checkpoint the call "
            "of the whole model"
        ) from error
    finally:
        if before is None:
            autograd._saved_tensors_hooks_enable()
        else:
            autograd._saved_tensors_hooks_disable(before, False)


class _Replaced(TorchFunctionMode):
    """Runs what stands in for the ops of ``REPLACED``.

    While any such mode is on, attention and transformer layers avoid their fused kernels too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def select(net: nn.Module, params: Params) -> tuple[str, ...]:
    """The names of the parameters that ``params`` chooses, in the order of the net.

    Args:
        params: ``None`` for all; a name, a glob pattern or a sequence of them; or a predicate
            ``(name, parameter) -> bool``. Any name of a tied parameter chooses it.

    Raises:
        TypeError: ``net`` is not a module, ``params`` of another type, or a parameter that is not
            floating-point.
        ValueError: a net without parameters; a pattern, or the predicate, that matches nothing;
            lazy parameters.
    """
    known = parameter_names(net)
    available = [name for aliases in known for name in aliases]
    if not available:
        raise ValueError(f"net must have parameters, got {net}")
    if params is None or callable(params):
        predicate = params or (lambda name, parameter: True)
        chosen = {n for n in available if predicate(n, net.get_parameter(n))}
    else:
        patterns = [params] if isinstance(params, str) else params
        if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
            raise TypeError(f"params must be names, or a predicate of them, got {params!r}")
        matches = {p: {n for n in available if fnmatchcase(n, p)} for p in patterns}
        useless = [p for p, found in matches.items() if not found]
        if useless:
            raise ValueError(
                f"params must match some of the parameters {available}, "
                f"got {useless}, which match none"
            )
        chosen = set().union(*matches.values())
    if not chosen:
        raise ValueError(f"params must match some of the parameters {available}, got none")
    names = tuple(aliases[0] for aliases in known if not chosen.isdisjoint(aliases))
    for name in names:
        if not net.get_parameter(name).is_floating_point():
            raise TypeError(
                f"params must choose floating-point parameters, got {name!r} of dtype "
                f"{net.get_parameter(name).dtype}"
            )
    return names


def parameter_names(net: nn.Module) -> list[tuple[str, ...]]:
    """For each parameter all its names, less those that lead to the same module again.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: it has parameters whose shapes are not known yet.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in net.named_modules():
        for name, p in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if is_lazy(p):
                raise ValueError(
                    f"net must have parameters of known shapes, but {name} is lazy: "
                    "run the net on an example first"
                )
            names.setdefault(p, []).append(name)
    return [tuple(aliases) for aliases in names.values()]


def as_mlp(net: nn.Module) -> tuple[MLPSpec, TargetNet] | None:
    """Layout and target of a plain stack of linear layers, and elementwise activations after them;
    ``None`` for a net that may be anything else."""
    linears: list[nn.Linear] = []
    activations: list[list[nn.Module]] = []
    for module in _flat(net):
        if checks.is_hooked(module):
            return None
        if type(module) is nn.Linear and module._parameters.keys() <= {"weight", "bias"}:
            linears.append(module)
            activations.append([])
        elif type(module) in ELEMENTWISE and not module._parameters and linears:
            activations[-1].append(copy.deepcopy(module))
        elif type(module) is not nn.Sequential:
            return None
    sizes = [m.in_features for m in linears[:1]] + [m.out_features for m in linears]
    tensors = [p for m in linears for p in (m.weight, m.bias) if p is not None]
    chained = [m.in_features for m in linears] == sizes[:-1]
    if not linears or not chained or len(set(tensors)) < len(tensors):
        return None
    for module in (m for after in activations for m in after if hasattr(m, "inplace")):
        # its input may be a view that an op returned, which cannot be changed in place
        module.inplace = False  # type: ignore[assignment]
    per_layer = [
        nn.Identity() if not after else after[0] if len(after) == 1 else nn.Sequential(*after)
        for after in activations
    ]
    return MLPSpec(sizes, [m.bias is not None for m in linears]), TargetNet(per_layer)


def _flat(module: nn.Module) -> list[nn.Module]:
    """The module and, in the order in which they run, those inside; shared ones each time."""
    return [
        module,
        *(m for child in module._modules.values() if child is not None for m in _flat(child)),
    ]


def _tensors(x: Any) -> list[Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, Tensor)]


def _one_more(t: Tensor) -> Tensor:
    return torch.cat((t, t.new_zeros(1, *t.shape[1:])))
