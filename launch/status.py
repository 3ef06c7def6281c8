"""`launch status`: what became of a run, attempt by attempt, and where its time went. It reads only, and
works where there is no Slurm, too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, EarwitnessError
from configs.lease import holder
from configs.rundir import RunDir
from slurm import cluster
from slurm.chain import FINAL, Cause, chain_jobs, find_end, unsettled
from slurm.cluster import QueuedJob
from trainer.goodput import Attempt, attempts, begin, goodput

WIDE = 180
"""Columns, where no terminal says how many it has."""
PATIENCE = 10.0
"""Seconds that Slurm may take to answer."""
NEVER = ("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints")
"""Reasons of jobs that no node, free or busy, can take."""


@dataclass
class Report:
    """A run, as `--json` prints it. Times in seconds since the epoch."""

    run: str
    """Its folder."""
    state: str
    """running, starting, waiting, finished, ended; unknown: only the cluster knows whether it goes on."""
    words: str
    """Where it runs, what it waits for, or why it ended."""
    next: str
    """The command to type next; empty while it goes on by itself."""
    step: int
    steps: int | None
    """Of how many."""
    step_at: float | None
    """When the ledger told of `step`, which it does at saves and with the points of the curves."""
    eta_seconds: float | None
    """Until the last step at the speed of now, evaluations left out; only while it is running."""
    validation_loss: float | None
    """The last one."""
    since: float | None
    """When it was first submitted or started; `goodput` is of the time from there until now or its end."""
    goodput: dict[str, dict[str, float]]
    """Seconds and share by what they went into (see trainer/goodput.py)."""
    notices: list[str]
    """What went on all the same, but should be looked at: the last of each kind, and how many there were."""
    attempts: list[Attempt]


def status(run: RunDir | None, *, as_json: bool) -> None:
    """Print one run, or all below `runs/`. Raises ConfigError if there is none."""
    runs = [run] if run else [RunDir(file.parent) for file in sorted(Path("runs").glob("*/events.jsonl"))]
    if not runs:
        raise ConfigError(
            "there are no runs below runs/ here; name the folder of one: python -m launch status RUN"
        )
    queued, now = queued_jobs(runs), time.time()
    reports = [look(one, queued, now) for one in runs]
    if as_json:
        print(
            json.dumps(
                asdict(reports[0]) if run else [asdict(report) for report in reports],
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False)
    if run:
        _print_run(console, reports[0])
    else:
        _print_runs(console, reports)


def queued_jobs(runs: Iterable[RunDir]) -> list[QueuedJob] | None:
    """Jobs of these runs that Slurm has in hand; None where its commands are not there, or do not answer."""
    try:
        return cluster.queued((job for run in runs for job in chain_jobs(run)), seconds=PATIENCE)
    except EarwitnessError:
        return None


def look(run: RunDir, queued: list[QueuedJob] | None, now: float) -> Report:
    """What is known of a run; nothing is written."""
    lines, mine = run.ledger(), chain_jobs(run)
    jobs = None if queued is None and mine else [job for job in queued or [] if job.job in mine]
    for line in unsettled(lines):
        if not _at_work(run, line, jobs):
            lines.append({"event": "ended", "time": now, **find_end(run, line["attempt"]).line})
    rows, since = attempts(lines, now), begin(lines)
    state, words = _state(lines, rows, jobs)
    going_on = state in ("running", "starting", "waiting")
    ends = [now] if going_on else [row.end for row in rows if row.end]
    spent = {} if since is None else goodput(rows, since, max(ends, default=since))
    start: dict[str, Any] = next((line for line in reversed(lines) if line["event"] == "start"), {})
    step = next((row.last for row in reversed(rows) if row.last is not None), 0)
    speed = next((row.samples_per_second for row in reversed(rows) if row.samples_per_second), None)
    told = next(
        (line["time"] for line in reversed(lines) if line["event"] in ("progress", "checkpoint", "start")),
        None,
    )
    left = (
        (start["of"] - step) * start["global_size"] if state == "running" and "global_size" in start else None
    )
    losses = [
        line["validation/loss"]
        for line in lines
        if line["event"] == "evaluation" and "validation/loss" in line
    ]
    return Report(
        str(run.path),
        state,
        words,
        _next(run, state, on_slurm=bool(mine)),
        step,
        start.get("of"),
        told,
        left / speed if left is not None and speed else None,
        losses[-1] if losses else None,
        since,
        {
            name: {"seconds": round(seconds, 3), "share": round(seconds / (sum(spent.values()) or 1), 5)}
            for name, seconds in spent.items()
        },
        _notices(lines),
        rows,
    )


def _at_work(run: RunDir, attempt: dict[str, Any], jobs: list[QueuedJob] | None) -> bool:
    """By what Slurm says of its job; by its signs of life where there is none, or Slurm is not there."""
    if attempt.get("job") and jobs is not None:
        return any(job.job == attempt["job"] and job.state != "PENDING" for job in jobs)
    now = holder(run)
    return now is not None and now.alive and now.attempt == attempt["attempt"]


def _state(lines: list[dict[str, Any]], rows: list[Attempt], jobs: list[QueuedJob] | None) -> tuple[str, str]:
    last = rows[-1] if rows else None
    if last and last.end is None:
        return "running", last.place + (f", on {', '.join(last.nodes)}" if len(last.nodes) < 4 else "") + (
            "" if last.first is not None else ", starting up"
        )
    for job in jobs or []:
        if job.state != "PENDING":
            return "starting", f"job {job.job} on {job.nodes} ({job.state.lower()})"
    if jobs:
        return "waiting", ", ".join(f"job {job.job}: {_reason(job)}" for job in jobs)
    if last and last.cause == Cause.FINISHED.name.lower():
        return "finished", last.words
    told = [
        line["why"]
        for line in lines
        if line["event"] == "chain_ended" and line["time"] >= (last.begin if last else 0)
    ]
    if told:
        return "ended", told[-1]
    if jobs is None and not (last and Cause.told(last.cause) in FINAL):
        return "unknown", "Slurm does not answer here; " + (
            f"the last attempt ended: {last.words}" if last else "it has been submitted"
        )
    if last:
        return "ended", last.words
    index = [line["index_log"] for line in lines if line.get("index_log")]
    return "ended", "no job of it is in the queue, and none has begun" + (
        f"; was it the indexing? Its log: {index[-1]}" if index else ""
    )


def _reason(job: QueuedJob) -> str:
    if job.reason in NEVER:
        return (
            f"{job.reason}: it will not start on this cluster as it is; `launch stop`, and ask for less in"
            " the slurm section"
        )
    return "Slurm has not looked at it yet" if job.reason == "None" else job.reason


def _next(run: RunDir, state: str, *, on_slurm: bool) -> str:
    if state == "finished":
        return f"python -m tools.export {run.path} captioner"
    if state != "ended":
        return ""
    return (
        f"python -m launch {'submit' if on_slurm else 'train'}"
        f" {run.config if run.config.is_file() else 'CONFIG'}"
    )


NOTICES: dict[str, Callable[[dict[str, Any]], str]] = {
    "slow_save": lambda line: (
        f"step {line['step']}: the save took {line['seconds']:.0f} s, and slurm.signal_seconds is"
        f" {line['grace']:.0f}: {line['advice']}"
    ),
    "skip": lambda line: f"step {line['step']}: its gradient was not finite, and is left out",
    "spike": lambda line: (
        f"step {line['step']}: its loss, {line['loss']:.4g}, stands out; the ledger names the samples"
    ),
    "damaged": lambda line: line["message"],
    "mirror_failed": lambda line: line["message"],
}


def _notices(lines: list[dict[str, Any]]) -> list[str]:
    found = []
    for event, words in NOTICES.items():
        if of_kind := [line for line in lines if line["event"] == event]:
            found.append(words(of_kind[-1]) + (f" (the last of {len(of_kind)})" if len(of_kind) > 1 else ""))
    return found


def _print_runs(console: Console, reports: list[Report]) -> None:
    table = Table("run", "state", "step", "validation loss", "left", "", box=None)
    for report in reports:
        loss = "" if report.validation_loss is None else f"{report.validation_loss:.4f}"
        table.add_row(
            report.run,
            report.state,
            _steps(report),
            loss,
            _duration(report.eta_seconds),
            "" if report.words == report.state else report.words,
        )
    console.print(table)


def _print_run(console: Console, report: Report) -> None:
    loss = "" if report.validation_loss is None else f", validation loss {report.validation_loss:.4f}"
    left = "" if report.eta_seconds is None else f", {_duration(report.eta_seconds)} left"
    words = "" if report.words == report.state else f": {report.words}"
    age = (
        f" ({_duration(time.time() - report.step_at)} ago)"
        if report.step_at and report.state == "running"
        else ""
    )
    console.print(f"{report.run}: {report.state}{words}\nstep {_steps(report)}{age}{loss}{left}")
    table = Table("attempt", "job", "nodes", "start", "end", "cause", "steps", "samples/s", box=None)
    for row in report.attempts:
        steps = (
            ""
            if row.first is None
            else f"{row.first}-{row.last}" + (f" ({row.repeated} lost)" if row.repeated else "")
        )
        speed = "" if row.samples_per_second is None else f"{row.samples_per_second:.1f}"
        nodes = f"{len(row.nodes)} x {row.ranks // len(row.nodes)}"
        table.add_row(
            str(row.attempt), row.job, nodes, _clock(row.begin), _clock(row.end), row.words, steps, speed
        )
    console.print(table)
    if any(part["seconds"] for part in report.goodput.values()):
        total = sum(part["seconds"] for part in report.goodput.values())
        console.print(
            f"goodput: {report.goodput['training']['share']:.1%} of {_duration(total)} went into training"
            " that was kept"
        )
        table = Table("", "time", "share", box=None, show_header=False)
        for name, part in report.goodput.items():
            table.add_row(name.replace("_", " "), _duration(part["seconds"]), f"{part['share']:.1%}")
        console.print(table)
    for notice in report.notices:
        console.print(f"notice: {notice}")
    if report.next:
        console.print(f"next: {report.next}")


def _steps(report: Report) -> str:
    return f"{report.step} of {report.steps}" if report.steps else "-"


def _clock(when: float | None) -> str:
    return "" if when is None else time.strftime("%m-%d %H:%M:%S", time.localtime(when))


def _duration(seconds: float | None) -> str:
    """As `3 d 4 h`, `4 h 5 min`, `12 min 30 s`, `8.1 s`."""
    for size, name, smaller, smaller_name in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds is not None and seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // smaller:.0f} {smaller_name}"
    return "" if seconds is None else f"{seconds:.1f} s"
