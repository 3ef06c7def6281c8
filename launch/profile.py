"""`launch profile`: a rank of a run at work writes a trace of its next steps."""

from __future__ import annotations

import time

from configs.errors import ConfigError, EarwitnessError
from configs.run.events import Ended, RankFailed, TrainingBegan, TrainingEnded
from configs.run.folder import RunDir

POLL = 0.5
"""Seconds between two looks."""


def profile(run: RunDir, rank: int, minutes: float) -> None:
    """Ask a rank for a trace, wait for it, and show what took longest.

    Raises ConfigError if no attempt is training, or has no such rank, EarwitnessError if nothing comes within
    `minutes`, or training ends first.
    """
    began = _check_training(run, rank)
    before = run.profiles.traces(rank)
    until = time.monotonic() + 60 * minutes
    run.profiles.ask(rank)
    print(
        f"{run.path}: rank {rank} of attempt {began.attempt} is asked for a trace of its next steps",
        flush=True,
    )
    try:
        while not (new := run.profiles.traces(rank) - before):
            _check_training(run, rank)
            if time.monotonic() > until:
                raise EarwitnessError(
                    f"{run.path}: no trace within {minutes:g} minutes; `python -m launch status {run.path}`"
                    " says what the run does. Steps that take longer need --minutes"
                )
            time.sleep(POLL)
    finally:
        run.profiles.withdraw(rank)
    trace = max(new)
    print(run.profiles.table(trace).read_text(encoding="utf-8"), end="")
    print(
        f"{trace}: open it at https://ui.perfetto.dev (it is read in the browser alone). On a GPU `python -m"
        f" tools.bench trace {trace}` says its idle share"
    )


def _check_training(run: RunDir, rank: int) -> TrainingBegan:
    """Raise ConfigError unless an attempt is training that has such a rank."""
    history = run.ledger.read()
    began = history.last(TrainingBegan)
    over = began and [*history.of(TrainingEnded, began.attempt), *history.of(RankFailed, began.attempt)]
    if began is None or over or history.last(Ended, began.attempt):
        raise ConfigError(
            f"{run.path}: no attempt is training now; `python -m launch status {run.path}` says more"
        )
    if rank >= began.ranks:
        raise ConfigError(f"--rank {rank}: the attempt has {began.ranks} ranks, from 0 on")
    return began
