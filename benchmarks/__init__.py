"""Measurements of speed and memory, side by side in one run; results are ratios. Start with `python -m benchmarks`."""
