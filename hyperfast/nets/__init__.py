"""Published networks that are made of generated layers; mixers and convolutions load published
weights."""

from hyperfast.nets.graph import NNConv
from hyperfast.nets.hyper_lstm import HyperLSTM
from hyperfast.nets.hyper_lstm_cell import HyperLSTMCell
from hyperfast.nets.mixers import QMixer

__all__ = ["HyperLSTM", "HyperLSTMCell", "NNConv", "QMixer"]
