"""`launch stop` and `launch drill`: a running chain is asked to save, to end or to go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from configs.errors import ConfigError, EarwitnessError
from configs.rundir import RunDir
from slurm import cluster
from slurm.chain import chain_jobs

POLL = 0.5
"""Seconds between two looks."""
ASK_AGAIN = 10.0
"""Seconds after which a job is asked once more."""
DRILL_MINUTES = 30
"""After which a drill is given up."""


def stop(run: RunDir) -> None:
    """End a run's chain: the attempt at work saves first. Returns when nothing is left of it. Raises
    ConfigError if there is no chain."""
    jobs = _jobs(run)
    waiting = [job.job for job in jobs if job.state == "PENDING"]
    running = [job.job for job in jobs if job.state == "RUNNING"]
    (run.slurm / "stop").touch()  # whoever starts now leaves again
    cluster.cancel(*waiting)
    asked = 0.0
    while cluster.queued(running):
        if time.monotonic() - asked > ASK_AGAIN:  # the ranks may not have been there yet
            with contextlib.suppress(EarwitnessError):  # or are not any more
                for job in running:
                    cluster.send_signal(job, "USR2")
            print(f"job {', '.join(running)}: asked to save and to end", flush=True)
            asked = time.monotonic()
        time.sleep(POLL)
    ended = [line["words"] for line in run.ledger("ended")]
    words = f" ({ended[-1]})" if ended else ""
    saved = (
        f"the newest checkpoint is of step {step}"
        if (step := run.saved_step())
        else "there is no checkpoint yet"
    )
    print(
        f"{run.path}: the chain has ended{words}; {saved}. `python -m launch submit` with its config goes on"
    )


def drill(run: RunDir) -> None:
    """Do to the running attempt what the cluster does when it preempts, and report how long everything took.

    Raises ConfigError if no attempt is training, EarwitnessError if the chain does not go on.
    """
    running = [job.job for job in _jobs(run) if job.state == "RUNNING"]
    attempts = [line for line in run.ledger("attempt") if line.get("job") in running]
    if not attempts or not any(line["attempt"] == attempts[-1]["attempt"] for line in run.ledger("start")):
        raise ConfigError(
            f"{run.path}: no attempt is training now; `python -m launch status {run.path}` says what it"
            " waits for"
        )
    attempt, job = attempts[-1]["attempt"], attempts[-1]["job"]
    began = time.time()
    for signal in ("CONT", "TERM"):  # what Slurm sends
        cluster.send_signal(job, signal)
    print(f"job {job}: sent SIGCONT and SIGTERM, as a preemption does", flush=True)
    steps = [
        ("attempt", "next attempt starts"),
        ("start", "it has loaded the checkpoint"),
        ("progress", "its first step is taken"),
    ]
    until = began + 60 * DRILL_MINUTES
    saved = wait_for(run, "stop", "durable save", until, lambda line: bool(line["attempt"] == attempt))
    print(f"  {saved['time'] - began:7.1f} s  durable save", flush=True)
    for event, what in steps:
        found = wait_for(run, event, what, until, lambda line: bool(line["attempt"] > attempt))
        print(f"  {found['time'] - began:7.1f} s  {what}", flush=True)


def wait_for(
    run: RunDir,
    event: str,
    what: str,
    until: float,
    matches: Callable[[dict[str, Any]], bool] = lambda line: True,
) -> dict[str, Any]:
    """Wait for a line of the ledger, until a time (s since the epoch). Raises EarwitnessError if it does not
    come, or the chain ends first."""
    while True:
        jobs = cluster.queued(chain_jobs(run))  # before the ledger, so that the last words of a job are seen
        if found := next(filter(matches, run.ledger(event)), None):
            return found
        if not jobs or time.time() > until:
            queue = (
                "; ".join(f"job {job.job} is {job.state.lower()} ({job.reason})" for job in jobs)
                or "no job of this run is in the queue any more"
            )
            raise EarwitnessError(
                f"{run.path}: waited for this in vain: {what}; {queue}. `python -m launch status {run.path}`"
                " says more"
            )
        time.sleep(POLL)


def _jobs(run: RunDir) -> list[cluster.QueuedJob]:
    jobs = cluster.queued(chain_jobs(run))
    if not jobs:
        raise ConfigError(
            f"{run.path}: no job of this run is in the queue; `python -m launch status {run.path}` says how"
            " it ended"
        )
    return jobs
