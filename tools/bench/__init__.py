"""Benchmarks of checkpoints, exports, data and the start of a run: `python -m tools.bench`."""
