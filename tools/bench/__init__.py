"""A benchmark of checkpoints and exports: `python -m tools.bench`."""
