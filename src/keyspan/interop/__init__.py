"""Keyspan under the names of other libraries. Knows how they call attention, not how attention is computed."""
