"""The version of xFormers with this API; the build reads it here."""

__version__ = "0.0.35+keyspan"
