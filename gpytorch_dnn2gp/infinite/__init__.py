"""The same network, infinitely wide: NNGP and NTK kernels of an ``nn.Module``, for GPyTorch.

    NNGPKernel(net), NTKKernel(net)          from a module
    fully_connected(...), convolutional(...) from depth and sigma
    transformer(...), attention(...)         of sequences
    batchnorm_mlp(...)                       between whole batches
    rule                                     for layers of your own
    pack, unpack                             sequences of different lengths, as rows of one matrix
    integrals                                E[phi(u) phi(v)] of any activation

Read integrals.py first, then state.py (what travels through the net), rules.py (what each layer does to it), program.py
(from a module to a matrix), kernels.py.
"""

from . import integrals
from .attention import LastState, MeanState, SelfAttention, YangAttention, YangTransformer
from .attention_kernels import AttentionKernel, TransformerKernel, attention, transformer
from .batchnorm import BatchNormKernel
from .constructors import batchnorm_mlp, convolutional, fully_connected
from .kernels import NNGPKernel, NTKKernel
from .monte_carlo import MonteCarlo, monte_carlo
from .one_hot import OneHotGP, SharedNoise
from .recurrent_kernels import RecurrentKernel, gru, recurrent, simple_rnn
from .rules import Pointwise, Weighted, rule
from .sequences import Sequences, pack, unpack
from .state import State

__all__ = [
    "AttentionKernel",
    "BatchNormKernel",
    "LastState",
    "MeanState",
    "MonteCarlo",
    "NNGPKernel",
    "NTKKernel",
    "OneHotGP",
    "Pointwise",
    "RecurrentKernel",
    "Sequences",
    "SelfAttention",
    "SharedNoise",
    "State",
    "TransformerKernel",
    "Weighted",
    "YangAttention",
    "YangTransformer",
    "attention",
    "batchnorm_mlp",
    "convolutional",
    "fully_connected",
    "gru",
    "integrals",
    "monte_carlo",
    "pack",
    "recurrent",
    "rule",
    "simple_rnn",
    "transformer",
    "unpack",
]
