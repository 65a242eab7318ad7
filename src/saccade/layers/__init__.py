"""Memory-lean functions and modules for transformers. They know nothing about attention or models."""

from saccade.layers.cross_entropy import linear_cross_entropy
from saccade.layers.gated import SwiGLU, swiglu
from saccade.layers.gemm import Linear, linear
from saccade.layers.rmsnorm import RMSNorm, rms_norm
from saccade.layers.rope import rotary, rotary_table, rotate

__all__ = [
    "Linear",
    "linear",
    "SwiGLU",
    "swiglu",
    "RMSNorm",
    "rms_norm",
    "rotary",
    "rotary_table",
    "rotate",
    "linear_cross_entropy",
]
