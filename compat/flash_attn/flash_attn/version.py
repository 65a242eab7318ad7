"""The version of flash-attn with this API; the build reads it here."""

__version__ = "2.8.3+keyspan"
