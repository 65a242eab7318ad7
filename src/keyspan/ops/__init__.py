"""The names of `xformers.ops`: `import keyspan.ops as xops`. They run on every device and have every gradient."""

from __future__ import annotations

from keyspan.ops import fmha, parallel, tree_attention
from keyspan.ops.fmha import (
    AttentionBias,
    AttentionOp,
    AttentionOpBase,
    LowerTriangularMask,
    MemoryEfficientAttentionCkOp,
    MemoryEfficientAttentionCutlassFwdFlashBwOp,
    MemoryEfficientAttentionCutlassOp,
    MemoryEfficientAttentionFlashAttentionOp,
    MemoryEfficientAttentionSplitKCkOp,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from keyspan.ops.indexing import index_select_cat, scaled_index_add
from keyspan.ops.left_out import refuse
from keyspan.ops.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    fused_allgather_and_anything,
    fused_allgather_and_linear,
    fused_anything_and_reducescatter,
    fused_linear_and_reducescatter,
    sequence_parallel_leading_matmul,
    sequence_parallel_trailing_matmul,
)
from keyspan.ops.rmsnorm import RMSNorm
from keyspan.ops.rope_padded import rope_padded
from keyspan.ops.swiglu_op import SwiGLU, SwiGLUEagerOp, SwiGLUOp, SwiGLUOpDispatch, swiglu, swiglu_packed
from keyspan.ops.tiled_matmul import masked_matmul, tiled_matmul
from keyspan.ops.unbind import get_stack_strides, stack_or_none, unbind

AttentionMask = AttentionBias

__getattr__ = refuse(__name__)

__all__ = [
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_backward",
    "AttentionBias",
    "AttentionMask",
    "AttentionOp",
    "AttentionOpBase",
    "LowerTriangularMask",
    "MemoryEfficientAttentionCutlassFwdFlashBwOp",
    "MemoryEfficientAttentionCutlassOp",
    "MemoryEfficientAttentionFlashAttentionOp",
    "MemoryEfficientAttentionCkOp",
    "MemoryEfficientAttentionSplitKCkOp",
    "SwiGLU",
    "swiglu",
    "swiglu_packed",
    "SwiGLUOp",
    "SwiGLUEagerOp",
    "SwiGLUOpDispatch",
    "RMSNorm",
    "rope_padded",
    "index_select_cat",
    "scaled_index_add",
    "unbind",
    "stack_or_none",
    "get_stack_strides",
    "tiled_matmul",
    "masked_matmul",
    "tree_attention",
    "parallel",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "sequence_parallel_leading_matmul",
    "sequence_parallel_trailing_matmul",
    "fused_allgather_and_linear",
    "fused_allgather_and_anything",
    "fused_linear_and_reducescatter",
    "fused_anything_and_reducescatter",
]
