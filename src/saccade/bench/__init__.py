"""Benchmarks: what Saccade takes, in time and memory, beside what a user would pick instead."""
