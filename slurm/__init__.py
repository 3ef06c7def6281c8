"""Slurm: the jobs of a run, the chain of attempts, the watchdog of each rank."""
