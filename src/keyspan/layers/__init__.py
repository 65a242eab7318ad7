"""Memory-lean functions and modules for transformers. They depend on no model."""

from keyspan.layers.cross_entropy import linear_cross_entropy, log_softmax
from keyspan.layers.gated import GeGLU, SwiGLU, geglu, swiglu
from keyspan.layers.gemm import Linear, linear
from keyspan.layers.multihead_attention import MultiheadAttention
from keyspan.layers.normed import norm_linear
from keyspan.layers.rmsnorm import RMSNorm, add_rms_norm, rms_norm
from keyspan.layers.rope import rotary, rotary_table, rotate, rotate_qkv

__all__ = [
    "Linear",
    "linear",
    "MultiheadAttention",
    "SwiGLU",
    "swiglu",
    "GeGLU",
    "geglu",
    "RMSNorm",
    "rms_norm",
    "add_rms_norm",
    "norm_linear",
    "rotary",
    "rotary_table",
    "rotate",
    "rotate_qkv",
    "linear_cross_entropy",
    "log_softmax",
]
