"""Linear layers of many tasks, used like ``nn.Linear`` inside any module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.functional import (
    Destinations,
    check_reduction,
    destinations,
    hyper_linear,
    low_rank_linear,
    task_linear,
)
from hyperfast.layout import Transform, boolean, positive
from hyperfast.nn.gate import is_plain_linear
from hyperfast.nn.heads import Bias, LayerHead, cut
from hyperfast.nn.init import HeadRows, start_layer


class HyperLinear(nn.Module):
    """A linear layer whose weights are made of features ``h``, one of every task: ``y = W(h) x +
    c(h)`` (Ha, Dai, Le 2016). ``h`` is whatever makes it: a trunk, an embedding, a row of data.

    Args:
        in_features, out_features: of the layer.
        hyper_features: size ``K`` of ``h``.
        bias: ``"generated"`` or ``True``; ``"shared"``, one parameter for all tasks; ``None`` or
            ``False``.
        transform: of the generated matrix before it is used: ``"abs"``, ``"softplus"``, ``"exp"``,
            ``"square"``, or a function.
        rank: ``W(h) = B(h) A(h)``, with this many columns of ``B``.
        base: ``True``, a new one without bias, or an ``nn.Linear``: ``W = base + generated``, and
            the layer starts as the base. It is applied once to all rows, and may be frozen.
        head_bias: whether the head has a bias.
        layout: how the head's rows of a matrix are ordered: ``"oi"``, output by output; ``"io"``,
            as code that multiplies ``x @ W`` saves them.
        device, dtype: of the parameters.

    Attributes:
        head: ``nn.Linear(hyper_features, P)``; its rows are the matrix in the layer's layout, then
            the generated bias. Of a rank they are ``A (rank, in)`` and ``B (out, rank)``, in layout
            ``"io"`` ``A (in, rank)`` and ``B (rank, out)``.
        bias: the shared bias ``(out,)``, or ``None``.
        base: an ``nn.Linear``, or ``None``.

    Raises:
        TypeError: a size that is not an int, a base that is not an ``nn.Linear``.
        ValueError: a size or rank below one, an unknown bias, transform or layout, a base of
            another shape, a transform with a rank, or one that is nowhere zero with a base.

    Example:
        >>> layer = hyperfast.HyperLinear(73, 32, 128, layout="io")
        >>> layer(torch.randn(1000, 73), torch.randn(1000, 128)).shape  # one row a task
        torch.Size([1000, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hyper_features: int,
        *,
        bias: Bias = "generated",
        transform: Transform | None = None,
        rank: int | None = None,
        base: bool | nn.Linear | None = None,
        head_bias: bool = True,
        layout: str = "oi",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        made = LayerHead(in_features, out_features, bias, transform, rank, layout)
        features = positive("hyper_features", hyper_features)
        super().__init__()
        self.layer = made
        has_bias = boolean("head_bias", head_bias)
        self.head = nn.Linear(features, made.spec.numel, has_bias, device=device, dtype=dtype)
        shared = torch.empty(made.out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(shared) if made.bias == "shared" else None
        self.base = as_base(base, made.in_features, made.out_features, device, dtype)
        self.own_base = base is True
        if self.base is not None:
            made.check_base()
        self._fill()

    in_features = property(lambda self: self.layer.in_features)
    out_features = property(lambda self: self.layer.out_features)

    @property
    def hyper_features(self) -> int:
        return self.head.in_features

    def reset_parameters(self) -> None:
        """Initialises the layer anew, and a base that it made itself. For features of unit second
        moment the generated matrix has entries of second moment ``1 / in_features``, whatever the
        options (hyperfan-in, Chang, Flokas, Lipson 2020), and biases are zero; with a base it is
        zero."""
        if self.base is not None and self.own_base:
            self.base.reset_parameters()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        rows = HeadRows(self.head.weight, self.head.bias).split(self.layer.spec)
        start_layer(self.layer, rows, zero=self.base is not None)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def weights(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Matrix ``(..., out, in)`` and bias ``(..., out)`` of features ``h (..., K)``, the base
        included; a bias that is not generated is ``(out,)``, or ``None``.

        Raises:
            ValueError: ``h`` has another shape, or lies elsewhere.
            TypeError: it is of another dtype.
        """
        checks.check_like_weight(self.head.weight, "the head", h=h)
        self._check_features(h)
        w, b = self.layer.weights(self.head(h))
        for shared in (self.bias, None if self.base is None else self.base.bias):
            if shared is not None:
                b = shared if b is None else b + shared
        return w if self.base is None else w + self.base.weight, b

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        task_ids: Tensor | None = None,
        *,
        index: Tensor | None = None,
        dim_size: int | None = None,
        reduce: str = "sum",
    ) -> Tensor:
        """Generates a layer from every ``h`` and applies it to the rows of its task.

        Args:
            x: rows: ``(B, N, in)``, ``(B, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N, in)``,
                the same for all tasks. Where ``h`` has several leading dimensions, ``B`` stands for
                all of them: ``h (B, M, K)`` with ``x (B, M, in)`` is ``B * M`` tasks of one row.
            h: ``(B, K)``, or ``(..., K)``.
            task_ids: ``(R,)`` int64, the task of every row.
            index: int64, of the shape of the rows: the destination of each, by which they are
                added up; of rows that all tasks share, for all tasks.
            dim_size: how many destinations there are, by default ``index.max() + 1``.
            reduce: ``"sum"`` or ``"mean"``, which is 0 for a destination without rows.

        Returns:
            ``x`` with its last dimension replaced by ``out``, or ``(dim_size, out)``.

        Raises:
            ValueError: shapes or devices that disagree, an unknown reduction.
            TypeError: dtypes that disagree, ids that are not int64.
            IndexError: a task or a destination out of range.
        """
        checks.check_like_weight(self.head.weight, "the head", x=x, h=h)
        checks.check_dense(x=x)
        self._check_features(h)
        lead, ins = h.shape[:-1], self.in_features
        flat = h.reshape(math.prod(lead), self.hyper_features)
        rows = rows_of_tasks(x, lead, ins, task_ids)
        by = None
        check_reduction(index, dim_size, reduce)
        if index is not None:
            by = destinations(index, dim_size, reduce, x).of_tasks(flat.shape[0], rows, task_ids)
        y = self._generated(rows, flat, task_ids, by)
        if self.base is not None:
            shared = self.base(rows)
            if by is not None:
                each = shared if shared.ndim == 2 else shared.expand(flat.shape[0], -1, -1)
                shared = by.reduce(each)
            y = y + shared
        if by is not None or task_ids is not None:
            return y
        return y.reshape(*lead, *y.shape[1:])

    def _check_features(self, h: Tensor) -> None:
        checks.check_dense(h=h)
        if h.ndim == 0 or h.shape[-1] != self.hyper_features:
            raise ValueError(
                f"h must have shape (..., {self.hyper_features}), got {checks.shape(h)}"
            )

    def _generated(
        self, x: Tensor, h: Tensor, task_ids: Tensor | None, by: Destinations | None
    ) -> Tensor:
        """The layer without its base, of features ``(B, K)``."""
        made, head = self.layer, self.head
        if not is_plain_linear(head):
            w, b = made.weights(head(h))
            b = self.bias.expand(w.shape[0], -1) if self.bias is not None else b
            y = task_linear(x, w, b, task_ids)
            return y if by is None else by.reduce(y)
        given = x, h, head.weight, head.bias
        if made.network is not None and by is None:
            has_bias = made.bias is not None
            return hyper_linear(*given, task_ids, target_bias=has_bias, transform=made.transform)
        x, h, weight, bias = checks.cast(checks.autocast_dtype(x.device.type), *given)
        shared = None if self.bias is None else self.bias.to(h.dtype)
        return made.apply(x, cut(h, weight, bias, made.spec), shared, task_ids, by)

    def extra_repr(self) -> str:
        made = self.layer
        options = f"bias={made.bias!r}, transform={made.transform!r}, rank={made.rank}"
        return f"{made.in_features}, {made.out_features}, {options}, layout={made.layout!r}"


class TaskLinear(nn.Module):
    """A linear layer of every task that owns its weights and trains them: ``y[r] = W[b(r)] x[r] +
    c[b(r)]``.

    Args:
        tasks: how many layers.
        in_features, out_features: of each.
        bias: whether they have biases.
        rank: ``W_b = B_b A_b``, with this many columns of ``B``.
        base: ``True``, a new one without bias, or an ``nn.Linear``, added to every task's layer and
            applied once: with a rank, adapters of many tasks in one batch (LoRA, Hu et al. 2021).
            Then all tasks start as the base.
        device, dtype: of the parameters.

    Attributes:
        weight: ``(tasks, out, in)``; with a rank ``weight_a (tasks, rank, in)`` and ``weight_b
            (tasks, out, rank)`` instead.
        bias: ``(tasks, out)``, or ``None``.
        base: an ``nn.Linear``, or ``None``.

    Raises:
        TypeError: a size that is not an int, a base that is not an ``nn.Linear``.
        ValueError: a size or rank below one, a base of another shape.

    Example:
        >>> layer = hyperfast.TaskLinear(64, 512, 512, rank=8, base=torch.nn.Linear(512, 512))
        >>> layer(torch.randn(30, 512), task_ids=torch.randint(64, (30,))).shape
        torch.Size([30, 512])
    """

    def __init__(
        self,
        tasks: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rank: int | None = None,
        base: bool | nn.Linear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"tasks": tasks, "in_features": in_features, "out_features": out_features}
        sizes = {name: positive(name, value) for name, value in sizes.items()}
        self_rank = None if rank is None else positive("rank", rank)
        super().__init__()
        self.tasks, self.in_features, self.out_features = sizes.values()
        self.rank = self_rank
        self.base = as_base(base, self.in_features, self.out_features, device, dtype)
        self.own_base = base is True

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.tasks, *shape, device=device, dtype=dtype))

        if self.rank is None:
            self.weight = new(self.out_features, self.in_features)
        else:
            self.weight_a = new(self.rank, self.in_features)
            self.weight_b = new(self.out_features, self.rank)
        self.bias = new(self.out_features) if boolean("bias", bias) else None
        self._fill()

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The weight, or its two factors, the first to be applied first."""
        return [self.weight] if self.rank is None else [self.weight_a, self.weight_b]

    def reset_parameters(self) -> None:
        """Initialises every task as ``nn.Linear`` is, and a base that the layer made itself; with a
        base, the tasks' own weights start at zero, of a rank those of ``B``."""
        if self.base is not None and self.own_base:
            self.base.reset_parameters()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        *first, last = self.matrices
        for matrix in (*first, last):
            bound = matrix.shape[2] ** -0.5
            nn.init.uniform_(matrix, -bound, bound)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)
        if self.base is not None:
            nn.init.zeros_(last)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Applies the layer of every task to its rows.

        Args:
            x: ``(tasks, N, in)``, ``(tasks, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N,
                in)``, the same rows for all tasks.
            task_ids: ``(R,)`` int64, the task of every row.

        Returns:
            ``x`` with its last dimension replaced by ``out``; ``(tasks, N, out)`` of shared rows.

        Raises:
            ValueError: shapes or devices that disagree.
            TypeError: dtypes that disagree, ids that are not int64.
            IndexError: a task out of range.
        """
        if self.rank is not None:
            a, b = self.weight_a, self.weight_b
            checks.check_like_weight(b, "the layer", x=x)
            plain = is_plain_linear(self.base)
            return low_rank_linear(x, a, b, self.bias, task_ids, self.base, plain)
        checks.check_like_weight(self.weight, "the layer", x=x)
        y = task_linear(x, self.weight, self.bias, task_ids)
        return y if self.base is None else y + self.base(x)

    def extra_repr(self) -> str:
        options = f"bias={self.bias is not None}, rank={self.rank}"
        return f"tasks={self.tasks}, {self.in_features}, {self.out_features}, {options}"


def as_base(
    base: bool | nn.Linear | None,
    in_features: int,
    out_features: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear | None:
    """The layer that all tasks share, a new one for ``True``.

    Raises:
        TypeError: it is no ``nn.Linear``, or of another dtype than the layer.
        ValueError: it has another shape.
    """
    if base is None or base is False:
        return None
    if base is True:
        return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
    if not isinstance(base, nn.Linear):
        raise TypeError(f"base must be True or an nn.Linear, got {type(base).__name__}")
    if (base.in_features, base.out_features) != (in_features, out_features):
        raise ValueError(
            f"base must map {in_features} to {out_features} features, "
            f"got {base.in_features} to {base.out_features}"
        )
    wanted = torch.get_default_dtype() if dtype is None else dtype
    if base.weight.dtype != wanted:
        raise TypeError(f"base must have dtype {wanted}, got {base.weight.dtype}")
    return base


def rows_of_tasks(x: Tensor, lead: torch.Size, ins: int, task_ids: Tensor | None) -> Tensor:
    """Rows of tasks that have the leading dimensions ``lead``, as rows of ``B`` tasks: ``(B, N,
    in)``, ``(B, in)``, ``(1, N, in)``; those with ``task_ids`` as they are.

    Raises:
        ValueError: they are not.
    """
    if task_ids is not None:
        return x
    n, own = len(lead), x.shape[:-1]
    if x.ndim and x.shape[-1] == ins:
        if own == lead:
            return x.reshape(math.prod(lead), ins)
        if len(own) == n + 1 and own[:n] == lead:
            return x.reshape(math.prod(lead), own[n], ins)
        if len(own) == n + 1 and math.prod(own[:n]) == 1:
            return x.reshape(1, own[n], ins)
    tasks = ", ".join(map(str, lead))
    tasks = f"{tasks}, " if tasks else ""
    raise ValueError(
        f"x must have shape ({tasks}N, {ins}), ({tasks}{ins}) or ({'1, ' * n}N, {ins}), as h has "
        f"tasks of shape {tuple(lead)}, got {checks.shape(x)}"
    )
