"""A network whose kernels one small network makes of learned embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hyperfast.layout import positive
from hyperfast.nn import parts
from hyperfast.nn.any_module import Params, select
from hyperfast.nn.chunks import Chunks
from hyperfast.nn.hypernet import HyperNet


def kernels(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a convolution: ``(out, in, ...)``."""
    return parameter.ndim > 2


class StaticHyperNet(nn.Module):
    """A static hypernetwork (Ha, Dai, Le 2016, section 3.1): the kernels of a deep convolutional
    network share one generator of two layers, and each has of its own only an embedding ``z`` for
    every block of output and input channels.

    ``a_i = W_i z + b_i`` for every input channel ``i`` of a block, and ``K_i = W_out a_i + b_out``,
    its kernels of all output channels of the block; ``a_i`` is as wide as ``z``. A kernel has a
    learned scale besides, so that it starts with the variance that its fan asks for. Kernels of
    another size have layers of their own.

    ``forward`` takes one input of ``net``, or a tuple or dict of its arguments unless ``net`` is a
    plain stack of linear layers, and returns what ``net`` returns.

    Args:
        net: the network. It is left as it is; what is not generated starts as a copy.
        z_dim: size of an embedding.
        chunks: rows and columns of a block. What does not fit at the ends is made and left out.
        params: which parameters are generated, as of :meth:`hyperfast.HyperNet.for_module`; by
            default all kernels of convolutions, those with more than two dimensions.

    Attributes:
        hyper: the :class:`hyperfast.HyperNet`; ``hyper.generator.embeddings (blocks, z_dim)``.
        target: applies what it makes, and owns the other parameters.

    Raises:
        TypeError, ValueError: as of :meth:`hyperfast.HyperNet.for_module`.

    Example:
        >>> conv = [torch.nn.Conv2d(64, 64, 3) for _ in range(4)]
        >>> net = hyperfast.nets.StaticHyperNet(torch.nn.Sequential(*conv), z_dim=32)
        >>> net(torch.rand(5, 64, 12, 12)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([5, 64, 4, 4]), 23956)
        >>> sum(p.numel() for layer in conv for p in layer.parameters())
        147712
    """

    def __init__(
        self,
        net: nn.Module,
        z_dim: int = 64,
        *,
        chunks: Chunks = (16, 16),
        params: Params = kernels,
    ):
        super().__init__()
        if chunks is None:
            raise ValueError("chunks must be a size, or a pair (rows, cols), got None")
        given = net.parameters() if isinstance(net, nn.Module) else ()
        if given and params is kernels and not any(p.ndim > 2 for p in given):
            raise ValueError(
                "net must have kernels, parameters of more than two dimensions, or params must say "
                f"what is generated; got {net}"
            )
        self.names = select(net, params)
        z_dim = positive("z_dim", z_dim)
        self.hyper, self.target = HyperNet.for_module(
            net, 0, params=params, hidden=(), chunks=chunks, chunk_dim=z_dim
        )

    def weights(self) -> dict[str, Tensor]:
        """What is generated, by its name in ``net``."""
        return dict(zip(self.names, self.hyper(self._latent()), strict=True))

    def forward(self, x: Any) -> Any:
        return parts.run(self.hyper, self.target, x, self._latent())

    def _latent(self) -> Tensor:
        return self.hyper.generator.embeddings.new_empty(0)  # it has no numbers
