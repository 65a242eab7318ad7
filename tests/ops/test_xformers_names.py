"""Every name of xFormers exists or raises the reason; the table in the docs is current."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from xformers_definitions import KINDS

from keyspan import ops
from keyspan.interop.xformers.support import table
from keyspan.ops import fmha, indexing
from keyspan.ops.left_out import LEFT_OUT

NAMES = {
    "keyspan.ops": """AttentionBias AttentionMask AttentionOp AttentionOpBase LowerTriangularMask
        MemoryEfficientAttentionCutlassFwdFlashBwOp MemoryEfficientAttentionCutlassOp
        MemoryEfficientAttentionFlashAttentionOp MemoryEfficientAttentionCkOp MemoryEfficientAttentionSplitKCkOp
        memory_efficient_attention memory_efficient_attention_forward memory_efficient_attention_forward_requires_grad
        memory_efficient_attention_backward index_select_cat scaled_index_add ColumnParallelLinear RowParallelLinear
        RMSNorm rope_padded sequence_parallel_leading_matmul sequence_parallel_trailing_matmul
        fused_allgather_and_anything fused_allgather_and_linear fused_anything_and_reducescatter
        fused_linear_and_reducescatter SwiGLU swiglu swiglu_packed SwiGLUEagerOp SwiGLUOp SwiGLUOpDispatch tiled_matmul
        get_stack_strides stack_or_none unbind masked_matmul fmha tree_attention""",
    "keyspan.ops.fmha": """memory_efficient_attention memory_efficient_attention_forward
        memory_efficient_attention_forward_requires_grad memory_efficient_attention_backward
        memory_efficient_attention_partial merge_attentions BlockDiagonalMask LowerTriangularMask AttentionBias
        VARLEN_BIASES Inputs Context Gradients AttentionOp AttentionOpBase AttentionFwOpBase AttentionBwOpBase
        ALL_FW_OPS ALL_BW_OPS _get_use_fa3 _set_use_fa3 _OPS_LOOKUP _fMHA _dispatch_fw _dispatch_bw
        _memory_efficient_attention _memory_efficient_attention_forward
        _memory_efficient_attention_forward_requires_grad _memory_efficient_attention_backward
        MemoryEfficientAttentionCutlassBlackwellOp attn_bias common dispatch cutlass cutlass_blackwell flash
        flash3 triton_splitk ck ck_splitk merge_training torch_attention_compat""",
    "keyspan.ops.fmha.attn_bias": """AttentionBias LowerTriangularMask LowerTriangularMaskWithTensorBias
        LowerTriangularFromBottomRightMask LowerTriangularFromBottomRightLocalAttentionMask
        LocalAttentionFromBottomRightMask BlockDiagonalMask BlockDiagonalCausalMask
        BlockDiagonalCausalFromBottomRightMask BlockDiagonalCausalLocalAttentionMask
        BlockDiagonalCausalLocalAttentionFromBottomRightMask BlockDiagonalPaddedKeysMask
        BlockDiagonalCausalWithOffsetPaddedKeysMask BlockDiagonalLocalAttentionPaddedKeysMask
        BlockDiagonalCausalLocalAttentionPaddedKeysMask BlockDiagonalGappyKeysMask
        BlockDiagonalCausalWithOffsetGappyKeysMask PagedBlockDiagonalPaddedKeysMask
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask PagedBlockDiagonalGappyKeysMask
        PagedBlockDiagonalCausalWithOffsetGappyKeysMask PagedBlockDiagonalCausalLocalPaddedKeysMask
        BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask _SeqLenInfo _PaddedSeqLenInfo _GappySeqInfo""",
    "keyspan.ops.fmha.common": """Inputs Context Gradients AttentionOpBase AttentionFwOpBase AttentionBwOpBase
        _is_bias_type_supported_in_BMK bmk2bmhk pack_fp8_tensorwise_per_head""",
    "keyspan.ops.fmha.dispatch": "_dispatch_fw _dispatch_bw _dispatch_fw_priority_list fa3_available",
    "keyspan.ops.common": "BaseOperator OPERATORS_REGISTRY get_operator get_xformers_operator register_operator",
    "keyspan.ops.indexing": "index_select_cat scaled_index_add ScaledIndexAddFw ScaledIndexAddBw IndexSelect",
    "keyspan.ops.swiglu_op": "swiglu swiglu_packed SwiGLU SwiGLUOp SwiGLUEagerOp SwiGLUOpDispatch unbind",
    "keyspan.ops.fmha.merge_training": """Partial memory_efficient_attention_partial_autograd
        merge_attentions_autograd""",
    "keyspan.ops.tree_attention": """TreeAttnMetadata tree_attention construct_full_tree_choices construct_tree_choices
        get_full_tree_size select_prefix_op use_triton_splitk_for_prefix SplitKAutotune
        _get_depth_counts _prepare_tree_attn_bias""",
    "keyspan.interop.xformers": "__version__ _is_triton_available _has_cpp_library",
    "keyspan.interop.xformers._cpp_lib": "_register_extensions",
    "keyspan.interop.xformers.attn_bias_utils": "create_attn_bias ref_attention ref_attention_bmhk pack_kv_cache",
    "keyspan.interop.xformers.checkpoint": """checkpoint list_operators selective_checkpoint_wrapper
        get_optimal_checkpoint_policy selective_checkpoint_context_fn""",
    "keyspan.interop.xformers.info": "get_info print_info",
    "keyspan.interop.xformers.utils": "do_bench_cudagraph",
    **{f"keyspan.ops.fmha.{op}": "FwOp BwOp" for op in ("flash", "cutlass", "cutlass_blackwell", "ck")},
    "keyspan.ops.fmha.flash3": "FwOp BwOp FwOp_KVSplit mask_non_zeros",
    "keyspan.ops.fmha.triton_splitk": """FwOp FwOp_Map FwOp_S1 FwOp_S2 FwOp_S4 FwOp_S8 FwOp_S16 FwOp_S32 FwOp_S64
        FwOp_S128 InputsFp8""",
    "keyspan.ops.fmha.ck_splitk": "FwOp FwOp_S1 FwOp_S2 FwOp_S4",
}

ATTRIBUTES = """OPERATOR NAME OPERATOR_CATEGORY SUPPORTED_DEVICES SUPPORTED_DTYPES SUPPORTED_MAX_K SUPPORTED_MIN_K
    SUPPORTED_ATTN_BIAS_TYPES SUPPORTS_DROPOUT SUPPORTS_CUSTOM_SCALE SUPPORTS_DIFFERENT_VALUE_EMBED SUPPORTS_BMGHK
    SUPPORTS_PARTIAL SUPPORTS_OUTPUT_DTYPE SUPPORTS_ATTN_BIAS_GRAD IS_DETERMINISTIC VARLEN_LSE_PACKED
    CUDA_MINIMUM_COMPUTE_CAPABILITY CUDA_MAXIMUM_COMPUTE_CAPABILITY ERROR_ATOL ERROR_RTOL _TEST_BATCH_SIZES _TEST_K
    is_available supports not_supported_reasons shape_not_supported_reasons apply"""


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_pairs_of_operators():
    assert fmha.MemoryEfficientAttentionCutlassFwdFlashBwOp == (fmha.cutlass.FwOp, fmha.flash.BwOp)
    assert fmha.MemoryEfficientAttentionSplitKCkOp == (fmha.ck_splitk.FwOp, fmha.ck.BwOp)
    for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS):
        assert [name for name in ATTRIBUTES.split() if not hasattr(op, name)] == []


def test_supported_bias_types_are_the_mask_classes():
    for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS):
        assert set(KINDS) < set(op.SUPPORTED_ATTN_BIAS_TYPES)
        assert isinstance(fmha.LowerTriangularMask(), op.SUPPORTED_ATTN_BIAS_TYPES)
        assert fmha.AttentionBias not in op.SUPPORTED_ATTN_BIAS_TYPES


def test_tolerances_of_backward_operators_are_those_of_xformers():
    assert fmha.flash.FwOp.ERROR_ATOL[torch.bfloat16] == 2e-2
    assert fmha.flash.BwOp.ERROR_ATOL[torch.bfloat16] == 0.9
    assert fmha.cutlass.BwOp.ERROR_RTOL[torch.float32] == 1e-4


@pytest.mark.parametrize("op", [*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS, indexing.ScaledIndexAddFw], ids=lambda op: op.NAME)
def test_operator_is_not_xformers_operator(op):
    assert op.is_available()
    with pytest.raises(RuntimeError, match="is an operator of xFormers, which keyspan does not have"):
        op.OPERATOR(torch.zeros(1))


def test_split_k_operators_are_hints():
    x = torch.randn(1, 3, 2, 4)
    want = fmha.memory_efficient_attention(x, x, x)
    splits = [fmha.triton_splitk.FwOp_S4, fmha.triton_splitk.FwOp.get_operator(3, block_n=16), fmha.ck_splitk.FwOp_S2]
    for op in (*splits, *fmha.triton_splitk.FwOp_Map.values(), fmha.flash3.FwOp_KVSplit):
        assert torch.equal(fmha.memory_efficient_attention_forward(x, x, x, op=op), want)
    assert (splits[1].NAME, splits[1].SPLIT_K, splits[1].BLOCK_N) == ("triton_splitK3", 3, 16)
    assert fmha.flash3.mask_non_zeros(13, 17, -1, 0) == 143
    assert fmha.flash3.mask_non_zeros(8, 8, 4, 3) == 48


def test_packed_fp8_is_refused_in_words():
    x = torch.randn(1, 3, 2, 4)
    inputs = fmha.triton_splitk.InputsFp8(x, x.int(), x.int(), k_fp8_scale_shift=x)
    for call in (
        lambda: fmha._memory_efficient_attention_forward(inputs),
        lambda: inputs.validate_inputs(),
    ):
        with pytest.raises(ValueError, match="got InputsFp8, want Inputs: keys packed as int4 or fp8"):
            call()
    assert not fmha.triton_splitk.FwOp.supports(inputs)
    with pytest.raises(NotImplementedError, match="is left out of keyspan: pass the fp8 tensors"):
        fmha.common.pack_fp8_tensorwise_per_head(x, 1.0, torch.float32)


def test_private_functions_are_the_public_ones():
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    inputs = fmha.Inputs(q, k, v, fmha.LowerTriangularMask())
    out, context = fmha._memory_efficient_attention_forward_requires_grad(inputs, fmha.flash.FwOp)
    grads = fmha._memory_efficient_attention_backward(context, inputs, torch.ones_like(out), fmha.flash.BwOp)
    public = [x.clone().requires_grad_() for x in (q, k, v)]
    want = fmha.memory_efficient_attention(*public, inputs.attn_bias)
    assert torch.equal(out, fmha._memory_efficient_attention_forward(inputs))
    torch.testing.assert_close(out, want.detach())
    for got, wanted in zip((grads.dq, grads.dk, grads.dv), torch.autograd.grad(want.sum(), public), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("module", ["keyspan.ops", "keyspan.ops.fmha"])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_names_raise_the_reason(module, name):
    found = importlib.import_module(module)
    assert not hasattr(found, name)
    with pytest.raises(AttributeError, match=rf"{module}\.{name} is left out of keyspan: ."):
        getattr(found, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = found.nonsense
    # An import statement drops the message of an AttributeError.
    with pytest.raises(ImportError, match=rf"{module}\.{name} is left out of keyspan: ."):
        exec(f"from {module} import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec(f"from {module} import nonsense")


DOCS = (Path(__file__).parents[2] / "docs" / "coming_from" / "xformers.md").read_text(encoding="utf-8")


def test_the_table_in_the_docs_is_current():
    assert table() in DOCS, "paste what `python -m keyspan.interop.xformers.support` prints"


def test_the_docs_go_name_by_name():
    names = {name for found in NAMES.values() for name in found.split()} | set(ops.__all__) | set(fmha.__all__)
    own = {"parallel"}  # a module of keyspan's own, whose names are there
    assert sorted(name for name in names - own if f"`{name}`" not in DOCS) == []


def test_the_code_in_the_docs_runs():
    found = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert len(found) >= 2
    for number, block in enumerate(found):
        exec(compile(block, f"coming_from/xformers.md, block {number + 1}", "exec"), {})
