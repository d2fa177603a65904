"""Published networks that are made of generated layers; those with published weights load them."""

from hyperfast.nets.graph import NNConv
from hyperfast.nets.hyper_lstm import HyperLSTM
from hyperfast.nets.hyper_lstm_cell import HyperLSTMCell
from hyperfast.nets.mixers import QMixer
from hyperfast.nets.static import StaticHyperNet

__all__ = ["HyperLSTM", "HyperLSTMCell", "NNConv", "QMixer", "StaticHyperNet"]
