"""Benchmarks: ratios measured in one run on one machine, recorded with versions."""
