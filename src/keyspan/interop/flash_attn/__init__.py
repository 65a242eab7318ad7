"""The functions of flash-attn, computed by `keyspan.attention` on any device: same names, arguments and results.

Letters of flash-attn 2.8; in brackets those of its versions 3 and 4 where a keyword is theirs. Depends on torch alone.
Layout `[B, M, H, K]`, packed `[T, H, K]`. `causal=True` and windows are aligned **bottom-right**: the last query stands
beside the last key.
"""

from keyspan.interop.flash_attn.cache import flash_attn_with_kvcache
from keyspan.interop.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
