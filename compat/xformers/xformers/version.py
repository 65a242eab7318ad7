"""The version of xFormers whose API this is; the build reads it here."""

__version__ = "0.0.35+keyspan"
