"""The package `flash_attn.cute` of flash-attn-4: two functions, with arguments in the order of version 4."""

from keyspan.interop.flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
