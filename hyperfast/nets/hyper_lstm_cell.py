"""One layer of a HyperLSTM: its parameters, how they start, and one step."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter, init

from hyperfast import checks
from hyperfast.layout import boolean, positive
from hyperfast.nets.hyper_lstm_steps import Norm, State, Weights
from hyperfast.nets.hyper_lstm_unroll import unroll


class HyperLSTMCell(nn.Module):
    """An LSTM whose weights a smaller LSTM rescales at every step (Ha, Dai, Le 2016,
    "HyperNetworks", appendix A.2.2); used like ``nn.LSTMCell``.

    The hyper LSTM, of E units, reads ``(h, x)`` (equation 10). Its output makes twelve embeddings
    of ``n_z`` numbers, ``z_h``, ``z_x`` and ``z_b`` of each gate y (11), and these make what scales
    the rows of the main LSTM's matrices, and its biases (12): ``y = LN(d_h * W_h h + d_x * W_x x +
    b)`` with ``d_h = W_hz z_h``, ``d_x = W_xz z_x``, ``b = W_bz z_b + b_0``. Then ``c = sigmoid(f)
    c + sigmoid(i) dropout(tanh(g))`` and ``h = sigmoid(o) tanh(LN(c))`` (13). Equation 11 is
    printed with the hyper LSTM's output of the step before; the authors' code, and this class, take
    the new one.

    Args:
        input_size: features of the input, I.
        hidden_size: units of the main LSTM, H.
        hyper_size: units of the hyper LSTM, E; by default a quarter of ``hidden_size``.
        n_z: size of an embedding. From the paper's start the numbers of a ``z_h`` or ``z_x`` stay
            alike (see :meth:`reset_parameters`).
        layer_norm: whether gates and cells of both LSTMs are normalised, ``LN`` above.
        recurrent_dropout: share of the candidates ``tanh(g)`` of the main LSTM that are dropped in
            training (Semeniuta et al. 2016).
        device, dtype: of the parameters.

    Parameters, the gates of each in nn.LSTM's order i, f, g, o: ``weight_ih (4H + 4E, I)`` and
    ``weight_hh (4H + 4E, H)``, of the main LSTM and then of the hyper LSTM; ``hyper_weight_hh (4E,
    E)``, ``hyper_bias (4E,)``; ``weight_z (12 n_z, E)``, ``bias_z (8 n_z,)``, ``weight_d (12, H,
    n_z)``, ordered h, x, b; ``bias (4H,)``, which is ``b_0``; ``norm_weight``, ``norm_bias (5, H)``
    and ``hyper_norm_weight``, ``hyper_norm_bias (5, E)``, whose last rows are those of the cells.

    Raises:
        ValueError: a size below one, a dropout outside [0, 1).
        TypeError: a size that is not an int, a dropout that is not a number, a ``layer_norm`` that
            is not a bool.

    Example:
        >>> cell = hyperfast.nets.HyperLSTMCell(10, 32, hyper_size=8, n_z=4)
        >>> h, c, hyper_h, hyper_c = cell(torch.randn(5, 10))
        >>> h.shape, hyper_h.shape
        (torch.Size([5, 32]), torch.Size([5, 8]))
    """

    norm_weight: Parameter | None
    norm_bias: Parameter | None
    hyper_norm_weight: Parameter | None
    hyper_norm_bias: Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hyper_size: int | None = None,
        n_z: int = 16,
        layer_norm: bool = True,
        recurrent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.input_size = ins = positive("input_size", input_size)
        self.hidden_size = H = positive("hidden_size", hidden_size)
        default = max(H // 4, 1)
        self.hyper_size = E = positive("hyper_size", default if hyper_size is None else hyper_size)
        self.n_z = positive("n_z", n_z)
        self.layer_norm = boolean("layer_norm", layer_norm)
        self.recurrent_dropout = share("recurrent_dropout", recurrent_dropout)

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih = parameter(4 * H + 4 * E, ins)
        self.weight_hh = parameter(4 * H + 4 * E, H)
        self.hyper_weight_hh, self.hyper_bias = parameter(4 * E, E), parameter(4 * E)
        self.weight_z, self.bias_z = parameter(12 * n_z, E), parameter(8 * n_z)
        self.weight_d, self.bias = parameter(12, H, n_z), parameter(4 * H)
        self.norm_weight, self.norm_bias, self.hyper_norm_weight, self.hyper_norm_bias = (
            parameter(5, width) if layer_norm else None for width in (H, H, E, E)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As appendix A.2.3 has it: orthogonal matrices of every gate, and ``W_bz`` and all biases
        zero; embeddings ``z_h`` and ``z_x`` start at one, their weights at zero, those of ``z_b``
        normal with deviation 0.01; ``W_hz`` and ``W_xz`` at 0.1 / n_z, so that all ``d`` are 0.1.

        The numbers of an embedding ``z_h`` or ``z_x`` then start alike, and so do their gradients:
        to tell them apart, draw ``weight_d`` or ``weight_z`` otherwise.
        """
        H, E, blocks = self.hidden_size, self.hyper_size, 4 * self.n_z
        for w in (self.weight_ih[: 4 * H], self.weight_hh[: 4 * H], self.hyper_weight_hh):
            for gate in w.chunk(4):
                gate.copy_(_orthogonal(gate))
        hyper = self.weight_hh[4 * H :].chunk(4), self.weight_ih[4 * H :].chunk(4)
        for of_h, of_x in zip(*hyper, strict=True):  # one matrix, of (h, x)
            both = _orthogonal(of_h.new_empty(E, H + self.input_size))
            of_h.copy_(both[:, :H])
            of_x.copy_(both[:, H:])
        for bias in (self.bias, self.hyper_bias, self.norm_bias, self.hyper_norm_bias):
            if bias is not None:
                init.zeros_(bias)
        for gain in (self.bias_z, self.norm_weight, self.hyper_norm_weight):
            if gain is not None:
                init.ones_(gain)
        init.zeros_(self.weight_z[: 2 * blocks])
        init.normal_(self.weight_z[2 * blocks :], std=0.01)
        init.constant_(self.weight_d[:8], 0.1 / self.n_z)
        init.zeros_(self.weight_d[8:])

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}, hyper_size={self.hyper_size}"
        dropout = f", recurrent_dropout={self.recurrent_dropout}" if self.recurrent_dropout else ""
        return f"{sizes}, n_z={self.n_z}, layer_norm={self.layer_norm}{dropout}"

    def forward(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The next state ``(h, c, hyper_h, hyper_c)``, of shapes ``(N, H)`` twice and ``(N, E)``.

        Args:
            input: ``(N, I)``, or ``(I,)`` without a batch, as are then all states.
            hx: the state before, by default zeros.

        Raises:
            ValueError: shapes or devices that disagree.
            TypeError: dtypes that disagree, or are not floating-point.
        """
        checks.check_dense(input=checks.check_tensor("input", input))
        single = input.ndim == 1
        if input.ndim not in (1, 2):
            wanted = f"(N, {self.input_size}) or ({self.input_size},)"
            raise ValueError(f"input must have shape {wanted}, got {checks.shape(input)}")
        rows = input.unsqueeze(0) if single else input
        state = None if hx is None else self.check_state(hx, checks.shape(input)[:-1])
        if state is not None and single:
            state = State(*(t.unsqueeze(0) for t in state))
        _, end = self.unroll(rows, state, [rows.shape[0]])
        # A plain tuple: programs that return a class of their own cannot be saved.
        return tuple(t.squeeze(0) if single else t for t in end)

    def check_state(self, hx: Sequence[Tensor], lead: tuple[int, ...]) -> State:
        """``hx`` as a state, of these leading dimensions."""
        if isinstance(hx, Tensor):
            raise TypeError(f"hx must be (h, c, hyper_h, hyper_c), got a tensor {checks.shape(hx)}")
        hx = checks.check_tensors("hx", hx)
        if len(hx) != 4:
            raise ValueError(f"hx must be (h, c, hyper_h, hyper_c), got {len(hx)} tensors")
        checks.check_operands(**{"the cell's weight": self.weight_ih}, **State(*hx)._asdict())
        widths = [self.hidden_size] * 2 + [self.hyper_size] * 2
        for name, t, n in zip(State._fields, hx, widths, strict=True):
            if t.shape != (*lead, n):
                raise ValueError(f"{name} must have shape {(*lead, n)}, got {checks.shape(t)}")
        return State(*hx)

    def unroll(
        self, rows: Tensor, start: State | None, sizes: Sequence[int]
    ) -> tuple[Tensor, State]:
        """``h`` of all steps, of ``rows (R, I)`` as in a PackedSequence, and every sequence's last
        state."""
        given = {"the cell's weight": self.weight_ih, "input": rows}
        wanted = checks.check_operands(**given)
        if rows.shape[1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} features, got {rows.shape[1]}")
        H, E, b = self.hidden_size, self.hyper_size, sizes[0]
        if start is None:
            start = State(*(rows.new_zeros(b, n) for n in (H, H, E, E)))
        (x,) = checks.cast(wanted, rows)
        w = Weights.of(checks.cast(wanted, *self._weights().tensors()))
        keep = None
        if self.training and self.recurrent_dropout:
            keep = F.dropout(x.new_ones(rows.shape[0], H), self.recurrent_dropout)
        return unroll(x, keep, State(*checks.cast(wanted, *start)), sizes, w)

    def is_plain(self) -> bool:
        """Whether calls of it, step after step, are :meth:`unroll` and no more."""
        cls = type(self)  # one of its own where weights are parametrised
        return (cls.__call__, cls.forward, cls.unroll) == _PLAIN and not checks.is_hooked(self)

    def _weights(self) -> Weights:
        z_bias, bias = F.pad(self.bias_z, (0, 4 * self.n_z)), self.bias.view(4, 1, -1)
        given = self.weight_ih, self.weight_hh, self.hyper_weight_hh, self.hyper_bias
        scaling = self.weight_z, z_bias, self.weight_d, bias
        norm = _norm(self.norm_weight, self.norm_bias)
        return Weights(*given, *scaling, norm, _norm(self.hyper_norm_weight, self.hyper_norm_bias))


# As they are now: a class that is patched later does something else.
_PLAIN = nn.Module.__call__, HyperLSTMCell.forward, HyperLSTMCell.unroll


def _norm(weight: Tensor | None, bias: Tensor | None) -> Norm | None:
    if weight is None or bias is None:
        return None
    return Norm(weight[:4].unsqueeze(1), bias[:4].unsqueeze(1), weight[4], bias[4])


def _orthogonal(like: Tensor) -> Tensor:
    """An orthogonal matrix of this shape; PyTorch makes none in half precision."""
    return init.orthogonal_(
        like.new_empty(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
    )


def share(name: str, value: float) -> float:
    """A share that dropout may drop; raises naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return float(value)
