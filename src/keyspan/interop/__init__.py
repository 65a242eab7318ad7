"""Keyspan under the names and calling conventions of other libraries."""
