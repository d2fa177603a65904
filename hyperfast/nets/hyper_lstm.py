"""The HyperLSTM of Ha, Dai, Le 2016, used like ``nn.LSTM``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hyperfast import checks
from hyperfast.layout import boolean, positive
from hyperfast.nets.hyper_lstm_cell import HyperLSTMCell, share
from hyperfast.nets.hyper_lstm_steps import State
from hyperfast.nets.hyper_lstm_unroll import each_step


class HyperLSTM(nn.Module):
    """Layers of :class:`HyperLSTMCell`, an LSTM whose weights a smaller LSTM rescales at every step
    (Ha, Dai, Le 2016, "HyperNetworks", section 3.2 and appendix A.2.2), with the interface of
    ``nn.LSTM``, in one direction.

    On the CPU, in float32 and float64, all steps are one C++ kernel, and so is their derivative.
    Elsewhere a step is some twenty operations of PyTorch, the products of all inputs are one
    product, and so are, backwards, those that make the gradients of the large matrices. Both
    derivatives are written by hand; under ``torch.compile``, ``torch.func`` transforms, forward
    mode and for derivatives of higher order the steps run in plain PyTorch. Compiled or exported,
    they are unrolled: their number is fixed, and a long loop takes minutes. A layer with hooks, as
    pruning registers them, or with a forward of its own, is called at every step.

    Args:
        input_size: features of the input, I.
        hidden_size: units of the main LSTM, H.
        num_layers: how many, L; each reads what the one before returns.
        hyper_size: units of the hyper LSTM of every layer, E; by default a quarter of
            ``hidden_size``.
        n_z: size of an embedding. From the paper's start the numbers of a ``z_h`` or ``z_x`` stay
            alike (see :meth:`HyperLSTMCell.reset_parameters`).
        layer_norm: whether gates and cells of both LSTMs are normalised.
        batch_first: whether input and output are ``(N, T, .)``, not ``(T, N, .)``.
        dropout: share of the output of every layer but the last that is dropped in training.
        recurrent_dropout: share of the candidates ``tanh(g)`` that are dropped in training.
        bidirectional: refused: there is one direction.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below one, a dropout outside [0, 1), ``bidirectional``.
        TypeError: a size that is not an int, a dropout that is not a number, an option that is not
            a bool.

    Example:
        >>> lstm = hyperfast.nets.HyperLSTM(10, 32, num_layers=2, hyper_size=8)
        >>> output, (h, c, hyper_h, hyper_c) = lstm(torch.randn(20, 5, 10))
        >>> output.shape, h.shape, hyper_h.shape
        (torch.Size([20, 5, 32]), torch.Size([2, 5, 32]), torch.Size([2, 5, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        hyper_size: int | None = None,
        n_z: int = 16,
        layer_norm: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if boolean("bidirectional", bidirectional):
            raise ValueError("bidirectional must be False: a HyperLSTM runs in one direction")
        super().__init__()
        self.num_layers = positive("num_layers", num_layers)
        self.batch_first = boolean("batch_first", batch_first)
        self.dropout = share("dropout", dropout)
        if self.dropout and num_layers == 1:
            warnings.warn("dropout acts between layers, and num_layers is 1", stacklevel=2)
        cells = [
            HyperLSTMCell(
                hidden_size if layer else input_size,
                hidden_size,
                hyper_size=hyper_size,
                n_z=n_z,
                layer_norm=layer_norm,
                recurrent_dropout=recurrent_dropout,
                device=device,
                dtype=dtype,
            )
            for layer in range(num_layers)
        ]
        self.layers: Sequence[HyperLSTMCell] = nn.ModuleList(cells)  # type: ignore[assignment]
        self.input_size, self.hidden_size = cells[0].input_size, cells[0].hidden_size
        self.hyper_size, self.n_z = cells[0].hyper_size, cells[0].n_z

    def reset_parameters(self) -> None:
        """Starts every layer anew."""
        for cell in self.layers:
            cell.reset_parameters()

    def extra_repr(self) -> str:
        return f"batch_first={self.batch_first}, dropout={self.dropout}"

    def forward(
        self, input: Tensor | PackedSequence, hx: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        """The output of the last layer at all steps, and every layer's state after the last.

        Args:
            input: ``(T, N, I)``; ``(N, T, I)`` if ``batch_first``; ``(T, I)`` without a batch; or a
                PackedSequence.
            hx: the state before the first step, by default zeros: ``(h, c, hyper_h, hyper_c)``, of
                shapes ``(L, N, H)`` twice and ``(L, N, E)`` twice, without N if there is no batch.

        Returns:
            ``output (T, N, H)``, or as ``input`` is, and the state in the form of ``hx``; sequences
            of a PackedSequence are in it in the order in which they were packed.

        Raises:
            ValueError: no steps; shapes or devices that disagree.
            TypeError: dtypes that disagree, or are not floating-point.
        """
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            sizes = batch_sizes.tolist()
            if not sizes:
                raise ValueError("input must have at least one step, got an empty PackedSequence")
            if data.ndim != 2:
                raise ValueError(f"input must pack rows (R, I), got {checks.shape(data)}")
            if sum(sizes) != len(data) or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
                raise ValueError(
                    "input.batch_sizes must be positive, never rise, and add up to the "
                    f"{len(data)} rows of input.data, got {sizes}"
                )
            start = None if hx is None else self._start(hx, (sizes[0],), order)
            rows, state = self._layers(data, start, sizes)
            if back is not None:
                state = State(*(t.index_select(1, back) for t in state))
            return PackedSequence(rows, batch_sizes, order, back), tuple(state)
        checks.check_dense(input=checks.check_tensor("input", input))
        single = input.ndim == 2
        if input.ndim not in (2, 3):
            wanted = "(N, T, I)" if self.batch_first else "(T, N, I)"
            raise ValueError(f"input must have shape {wanted} or (T, I), got {checks.shape(input)}")
        x = input.unsqueeze(1) if single else input.transpose(0, 1) if self.batch_first else input
        steps, b, _ = x.shape
        if steps == 0:
            raise ValueError(f"input must have at least one step, got shape {checks.shape(input)}")
        start = None if hx is None else self._start(hx, () if single else (b,))
        rows, state = self._layers(x.flatten(0, 1), start, [b] * steps)
        y = rows.unflatten(0, (steps, b))
        if single:
            return y.squeeze(1), tuple(t.squeeze(1) for t in state)
        return y.transpose(0, 1) if self.batch_first else y, tuple(state)

    def _start(
        self, hx: Sequence[Tensor], lead: tuple[int, ...], order: Tensor | None = None
    ) -> State:
        """``(L, N, .)``, in the order in which sequences are packed."""
        state = self.layers[0].check_state(hx, (self.num_layers, *lead))
        if not lead:
            return State(*(t.unsqueeze(1) for t in state))
        return state if order is None else State(*(t.index_select(1, order) for t in state))

    def _layers(self, rows: Tensor, start: State | None, sizes: list[int]) -> tuple[Tensor, State]:
        """Outputs ``(R, H)`` and last states ``(L, N, .)`` of ``rows (R, I)``."""
        ends = []
        for n, cell in enumerate(self.layers):
            if n:
                rows = F.dropout(rows, self.dropout, self.training)
            own = start and State(*(t[n] for t in start))
            if cell.is_plain():
                rows, end = cell.unroll(rows, own, sizes)
            else:
                rows, end = each_step(cell, rows, own, sizes)
            ends.append(end)
        return rows, State(*map(torch.stack, zip(*ends, strict=True)))
