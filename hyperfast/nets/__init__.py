"""Published networks that are made of generated layers; those with published weights load them."""

from hyperfast.nets.graph import NNConv
from hyperfast.nets.mixers import QMixer
from hyperfast.nets.static import StaticHyperNet

__all__ = ["NNConv", "QMixer", "StaticHyperNet"]
