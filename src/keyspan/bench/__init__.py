"""Benchmarks: what Keyspan takes, in time and memory, beside what a user would pick instead."""
