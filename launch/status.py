"""`launch status`: what became of a run, attempt by attempt, and where its time went. It reads only, and
works where there is no Slurm, too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.disk import words_of_disk
from configs.errors import ConfigError, EarwitnessError
from configs.run.causes import FINAL, Cause
from configs.run.events import (
    AttemptBegan,
    ChainEnded,
    CheckpointSaved,
    Damaged,
    Evaluated,
    Event,
    MirrorFailed,
    Preflight,
    Progress,
    Skipped,
    SlowSave,
    Spike,
    Submitted,
    TrainingBegan,
)
from configs.run.folder import RunDir
from configs.run.goodput import AttemptSummary, begin, goodput, summarize
from configs.run.lease import holder
from configs.run.ledger import History, warning
from configs.run.quarantine import Quarantined
from launch.samples import SamplesReport
from slurm import cluster
from slurm.chain import chain_jobs, seen_end
from slurm.cluster import QueuedJob
from slurm.said import refused_successor
from slurm.sayings import advice

WIDE = 180
"""Columns, where no terminal says how many it has."""
ANSWER_SECONDS = 10.0
"""Seconds that Slurm may take to answer."""
NODES_SHOWN = 3
MINUTE, HOUR, DAY = 60, 3600, 86_400
"""In seconds."""


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
    """Seconds and share by what they went into (see configs/run/goodput.py)."""
    samples: SamplesReport
    notices: list[str]
    """What went on all the same, but should be looked at: the last of each kind, and how many there were."""
    attempts: list[AttemptSummary]


def status(run: RunDir | None, *, as_json: bool) -> None:
    """Print one run, or all below `runs/`. Raises ConfigError if there is none."""
    runs = [run] if run else list(_runs_below(Path("runs")))
    if not runs:
        raise ConfigError(
            "there are no runs below runs/ here; name the folder of one: python -m launch status RUN"
        )
    queued, now = queued_jobs(runs), time.time()
    reports = [look(each, queued, now) for each in runs]
    if as_json:
        values = [asdict(report) for report in reports]
        print(json.dumps(values[0] if run else values, indent=1, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False)
    if run:
        _print_run(console, reports[0])
    else:
        _print_runs(console, reports)


def _runs_below(root: Path) -> Iterator[RunDir]:
    """The runs in a folder; those that are closed are told on stderr."""
    for folder in sorted(root.glob("*")):
        run = RunDir(folder)
        try:
            next(run.ledger.folder.iterdir(), None)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            print(words_of_disk(error), file=sys.stderr)
            continue
        yield run


def queued_jobs(runs: Iterable[RunDir]) -> list[QueuedJob] | None:
    """Jobs of these runs that Slurm has in hand; None where its commands are not there, or do not answer."""
    try:
        return cluster.queued((job for run in runs for job in chain_jobs(run)), seconds=ANSWER_SECONDS)
    except EarwitnessError:
        return None


def print_events(run: RunDir) -> None:
    """Print the whole ledger as JSON lines, by attempt and time; what cannot be read is told on stderr."""
    history = run.ledger.read()
    for event in history.events:
        print(json.dumps(event.as_json(), ensure_ascii=False))
    unreadable = warning(history)
    if unreadable:
        print(unreadable, file=sys.stderr)


def look(run: RunDir, queued: list[QueuedJob] | None, now: float) -> Report:
    """What is known of a run; nothing is written."""
    history, known_jobs = run.ledger.read(), chain_jobs(run)
    jobs: list[QueuedJob] | None = None
    if queued is not None or not known_jobs:
        jobs = [job for job in queued or [] if job.job in known_jobs]
    for began in history.unsettled:
        if not _at_work(run, began, jobs):
            history.events.append(seen_end(run, history, began.attempt))
    rows, since = summarize(history, now), begin(history)
    state, words = _state(run, history, rows, jobs)
    is_going_on = state in ("running", "starting", "waiting")
    ends = [now] if is_going_on else [row.end for row in rows if row.end]
    spent = {} if since is None else goodput(rows, since, max(ends, default=since))
    total = sum(spent.values()) or 1.0
    started = history.last(TrainingBegan)
    step = next((row.last for row in reversed(rows) if row.last is not None), 0)
    speed = next((row.samples_per_second for row in reversed(rows) if row.samples_per_second), None)
    steps_told = [e for e in history.events if isinstance(e, TrainingBegan | Progress | CheckpointSaved)]
    eta = None
    if started and speed and state == "running":
        eta = (started.total_steps - step) * started.global_size / speed
    quarantined = run.quarantine.read()
    notices = _notices(history, quarantined)
    if is_going_on and rows and (refusal := refused_successor(run, rows[-1].job)):
        notices.append(_no_successor(rows[-1].job, refusal))
    losses = [event.metrics.get("validation/loss") for event in history.of(Evaluated)]
    return Report(
        run=str(run.path),
        state=state,
        words=words,
        next=_next(run, state, on_slurm=bool(known_jobs)),
        step=step,
        steps=started.total_steps if started else None,
        step_at=steps_told[-1].time if steps_told else None,
        eta_seconds=eta,
        validation_loss=losses[-1] if losses else None,
        since=since,
        goodput={
            name: {"seconds": round(seconds, 3), "share": round(seconds / total, 5)}
            for name, seconds in spent.items()
        },
        samples=SamplesReport.of(history, quarantined),
        notices=notices,
        attempts=rows,
    )


def _at_work(run: RunDir, attempt: AttemptBegan, jobs: list[QueuedJob] | None) -> bool:
    """By what Slurm says of its job; by its signs of life where there is none, or Slurm is not there."""
    if attempt.job and jobs is not None:
        return any(job.job == attempt.job and job.state != "PENDING" for job in jobs)
    now = holder(run)
    return now is not None and now.alive and now.attempt == attempt.attempt


def _state(
    run: RunDir, history: History, rows: list[AttemptSummary], jobs: list[QueuedJob] | None
) -> tuple[str, str]:
    """The state of a run in one word, and what there is to say of it."""
    last = rows[-1] if rows else None
    if last and last.end is None:
        words = last.place
        if len(last.nodes) <= NODES_SHOWN:
            words += f", on {', '.join(last.nodes)}"
        if last.first is None:
            words += ", starting up"
        return "running", words
    for job in jobs or []:
        if job.state != "PENDING":
            return "starting", f"job {job.job} on {job.nodes} ({job.state.lower()})"
    if jobs:
        return "waiting", ", ".join(f"job {job.job}: {_reason(job)}" for job in jobs)
    if last and last.cause == Cause.FINISHED:
        return "finished", last.words
    chain_end = history.last(ChainEnded)
    if chain_end and chain_end.attempt >= (last.attempt if last else -1):
        return "ended", chain_end.why
    if jobs is None and not (last and last.cause in FINAL):
        known = f"the last attempt ended: {last.words}" if last else "it has been submitted"
        return "unknown", f"Slurm does not answer here; {known}"
    if last:
        return "ended", last.words
    words = "no job of it is in the queue, and none has begun"
    submitted = history.last(Submitted)
    if submitted and submitted.index_log:
        words += f"; was it the indexing? Its log: {submitted.index_log}"
    elif submitted and not (run.slurm / f"{submitted.job}.log").exists():
        words += (
            f"; job {submitted.job} has not even written its log: do all compute nodes see {run.slurm}, under"
            f" this path? `scontrol show job {submitted.job}` may say more"
        )
    return "ended", words


def _reason(job: QueuedJob) -> str:
    if what := advice(job.reason):
        return f"{job.reason}: {what}"
    return "Slurm has not looked at it yet" if job.reason == "None" else job.reason


def _next(run: RunDir, state: str, *, on_slurm: bool) -> str:
    if state == "finished":
        return f"python -m tools.export {run.path} captioner"
    if state != "ended":
        return ""
    command = "submit" if on_slurm else "train"
    config = str(run.config) if run.config.is_file() else "CONFIG"
    return f"python -m launch {command} {config}"


def _slow_save(event: SlowSave) -> str:
    return (
        f"step {event.step}: the save took {event.seconds:.0f} s, and slurm.signal_seconds is"
        f" {event.grace_seconds:.0f}: {event.advice}"
    )


def _spike(event: Spike) -> str:
    return f"step {event.step}: its loss, {event.loss:.4g}, stands out; the ledger names the samples"


def _skip(event: Skipped) -> str:
    return f"step {event.step}: its gradient was not finite, and is left out"


def _no_successor(job: str, refusal: str) -> str:
    what = advice(refusal) or "where compute nodes may not submit: slurm.resubmit: requeue"
    return f"job {job} could not queue the next attempt, and requeues itself instead: {refusal}: {what}"


def _message(event: Damaged | MirrorFailed) -> str:
    return event.message


NOTICES: dict[type[Event], Callable[[Any], str]] = {
    SlowSave: _slow_save,
    Skipped: _skip,
    Spike: _spike,
    Damaged: _message,
    MirrorFailed: _message,
}


def _notices(history: History, quarantined: Quarantined) -> list[str]:
    """What should be looked at: the last event of each kind, notes of the last pre-flight, torn lines."""
    notices = []
    for kind, in_words in NOTICES.items():
        events = history.of(kind)
        if events:
            count = f" (the last of {len(events)})" if len(events) > 1 else ""
            notices.append(in_words(events[-1]) + count)
    preflight = history.last(Preflight)
    if preflight is not None:
        notices += preflight.notes
    torn = quarantined.unreadable
    if torn:
        notices.append(f"{len(torn)} lines of the quarantine cannot be read, e.g. {torn[0]}")
    unreadable = warning(history)
    if unreadable:
        notices.append(unreadable)
    return notices


def _print_runs(console: Console, reports: list[Report]) -> None:
    table = Table("run", "state", "step", "validation loss", "left", "", box=None)
    for report in reports:
        loss = "" if report.validation_loss is None else f"{report.validation_loss:.4f}"
        words = "" if report.words == report.state else report.words
        left = _duration(report.eta_seconds)
        table.add_row(report.run, report.state, _steps(report), loss, left, words)
    console.print(table)


def _print_run(console: Console, report: Report) -> None:
    state = report.state if report.words == report.state else f"{report.state}: {report.words}"
    console.print(f"{report.run}: {state}\n{_progress(report)}")
    table = Table("attempt", "job", "nodes", "start", "end", "cause", "steps", "samples/s", box=None)
    for row in report.attempts:
        speed = "" if row.samples_per_second is None else f"{row.samples_per_second:.1f}"
        table.add_row(
            str(row.attempt),
            row.job,
            f"{len(row.nodes)} x {row.ranks // len(row.nodes)}",
            _clock(row.begin),
            _clock(row.end),
            row.words,
            _steps_of(row),
            speed,
        )
    console.print(table)
    total = sum(part["seconds"] for part in report.goodput.values())
    if total:
        share = report.goodput["training"]["share"]
        console.print(f"goodput: {share:.1%} of {_duration(total)} went into training that was kept")
        table = Table("", "time", "share", box=None, show_header=False)
        for name, part in report.goodput.items():
            table.add_row(name.replace("_", " "), _duration(part["seconds"]), f"{part['share']:.1%}")
        console.print(table)
    if report.samples.sources:
        console.print(report.samples.table())
    for line in report.samples.lines():
        console.print(line)
    for notice in report.notices:
        console.print(f"notice: {notice}")
    if report.next:
        console.print(f"next: {report.next}")


def _progress(report: Report) -> str:
    """As `step 40 of 100 (5.0 s ago), validation loss 3.5276, 12 min 3 s left`."""
    words = f"step {_steps(report)}"
    if report.step_at and report.state == "running":
        words += f" ({_duration(time.time() - report.step_at)} ago)"
    if report.validation_loss is not None:
        words += f", validation loss {report.validation_loss:.4f}"
    if report.eta_seconds is not None:
        words += f", {_duration(report.eta_seconds)} left"
    return words


def _steps(report: Report) -> str:
    return f"{report.step} of {report.steps}" if report.steps else "-"


def _steps_of(row: AttemptSummary) -> str:
    """As `0-18 (8 lost)`."""
    if row.first is None:
        return ""
    lost = f" ({row.repeated} lost)" if row.repeated else ""
    return f"{row.first}-{row.last}{lost}"


def _clock(when: float | None) -> str:
    return "" if when is None else time.strftime("%m-%d %H:%M:%S", time.localtime(when))


def _duration(seconds: float | None) -> str:
    """As `3 d 4 h`, `4 h 5 min`, `12 min 30 s`, `8.1 s`."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole >= DAY:
        return f"{whole // DAY} d {whole % DAY // HOUR} h"
    if whole >= HOUR:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    if whole >= MINUTE:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    return f"{seconds:.1f} s"
