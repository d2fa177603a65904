"""Published networks that are made of generated layers; they load published weights."""

from hyperfast.nets.graph import NNConv
from hyperfast.nets.mixers import QMixer

__all__ = ["NNConv", "QMixer"]
