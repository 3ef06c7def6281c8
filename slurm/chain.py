"""A chain of attempts: how each one ended, and whether and where the next one may go on. Read from the run's
ledger and from what Slurm said."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import takewhile
from typing import Any

from configs.errors import ExitCode
from configs.lease import holder
from configs.rundir import RunDir
from configs.schema import Slurm, node_range

GUILT_LIMIT = 2
"""Faults after which a node is left out."""
BACK_OFF, GROWTH, LONGEST_BACK_OFF = 60.0, 5, 600.0
"""Seconds that are waited after the second failure in a row without progress, how much longer after each
further one, and the most."""
MISFORTUNES_WITHOUT_PROGRESS = 10


class Cause(Enum):
    """Why an attempt ended."""

    FINISHED = "finished"
    STOPPED = "stopped by `launch stop`"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    NODE_LOST = "node lost"
    UNFIT_NODE = "unfit node"
    OUT_OF_MEMORY = "out of memory"
    HANG = "hang"
    CRASH = "crash"
    POISONED_SAMPLE = "poisoned sample"
    ERROR = "error"
    BAD_INPUT = "bad config or data"
    SUPERSEDED = "superseded"
    SAVED = "asked to save"
    UNKNOWN = "unknown"

    @classmethod
    def told(cls, name: str) -> Cause:
        """As the ledger has it."""
        return cls[name.upper()]


FINAL = {Cause.FINISHED, Cause.STOPPED, Cause.CANCELLED, Cause.BAD_INPUT, Cause.SUPERSEDED}
"""After these nothing follows."""
FAILURES = {Cause.OUT_OF_MEMORY, Cause.HANG, Cause.CRASH, Cause.ERROR, Cause.TIME_LIMIT, Cause.UNKNOWN}
"""These may not come again and again without progress (slurm.max_attempts_without_progress)."""
MISFORTUNES = {Cause.NODE_LOST, Cause.UNFIT_NODE, Cause.POISONED_SAMPLE}
"""These are no fault of the run; but MISFORTUNES_WITHOUT_PROGRESS of them are enough."""
FAULTS_OF_NODES = {Cause.NODE_LOST, Cause.UNFIT_NODE, Cause.HANG, Cause.CRASH}
JOB_STATES = {
    "CANCELLED": Cause.CANCELLED,
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "DEADLINE": Cause.TIME_LIMIT,
    "NODE_FAIL": Cause.NODE_LOST,
    "BOOT_FAIL": Cause.NODE_LOST,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
}


@dataclass(frozen=True)
class End:
    """How an attempt ended. at: when, in seconds since the epoch, or when it was last heard of; node: the one
    at fault, if one is; saved: step of the newest checkpoint then."""

    attempt: int
    cause: Cause
    words: str
    at: float
    node: str = ""
    saved: int = 0

    @property
    def line(self) -> dict[str, Any]:
        """For the ledger."""
        return {**asdict(self), "cause": self.cause.name.lower()}


@dataclass(frozen=True)
class Verdict:
    """Whether the chain goes on; why not; nodes to leave out; seconds to wait first."""

    go: bool
    why: str = ""
    exclude: tuple[str, ...] = ()
    delay: float = 0.0


def settle(run: RunDir, chain: str = "-") -> None:
    """Write into the ledger how attempts ended of which it is not known yet; but one that is not of this
    chain may be at work still."""
    now = holder(run)
    for line in unsettled(run.ledger()):
        if not (now and now.alive and now.attempt == line["attempt"] and line.get("chain", "") != chain):
            record_end(run, line["attempt"])


def unsettled(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `attempt` lines of those that have not ended, or nobody has told."""
    told = {line["attempt"] for line in lines if line["event"] == "ended"}
    return [line for line in lines if line["event"] == "attempt" and line["attempt"] not in told]


def record_end(run: RunDir, attempt: int, code: int | None = None, failure: Failure | None = None) -> End:
    """Find out how an attempt ended, and write it into the ledger. code: of the ranks' step, if it has just
    ended; failure: the first, if it is known."""
    found = find_end(run, attempt, code, failure)
    run.record("ended", **found.line)
    return found


def find_end(run: RunDir, attempt: int, code: int | None = None, failure: Failure | None = None) -> End:
    """How an attempt ended, by what there is to read; nothing is written."""
    lines = run.ledger()
    mine = {
        event: [line for line in lines if line["event"] == event and line.get("attempt") == attempt]
        for event in ("attempt", "stop", "error", "hang")
    }
    job = mine["attempt"][0].get("job", "")
    saved = run.saved_step()
    state = job_state(run, job)
    at = round(time.time(), 3) if code is not None else _last_sign(lines, attempt)

    def end(cause: Cause, words: str = "", node: str = "") -> End:
        return End(attempt, cause, f"{cause.value}{f': {words}' if words else ''}", at, node, saved)

    if any(line["outcome"] == "finished" for line in mine["stop"]):
        return end(Cause.FINISHED)
    if mine["stop"]:
        if job and stop_requested(run):
            return end(Cause.STOPPED)
        by = {"SIGUSR2": Cause.TIME_LIMIT}.get(mine["stop"][0].get("signal", ""), Cause.SAVED)
        return end(JOB_STATES.get(state, by), f"saved at step {mine['stop'][0]['step']}")
    errors = sorted(
        mine["error"], key=lambda line: (bool(LOST_PEER.search(_first_line(line["message"]))), line["time"])
    )  # clocks differ
    trained = any(line["event"] == "progress" and line["attempt"] == attempt for line in lines)
    if errors and errors[0].get("exit_code") in (
        ExitCode.USAGE,
        *(() if trained else (ExitCode.DATA,)),
    ):  # credentials may have expired: read them anew
        return end(Cause.BAD_INPUT, _first_line(errors[0]["message"]))
    if mine["hang"]:
        return end(Cause.HANG, mine["hang"][0]["words"], mine["hang"][0].get("node", ""))
    if errors and errors[0]["kind"] == "Superseded":
        return end(Cause.SUPERSEDED, _first_line(errors[0]["message"]))
    if errors and errors[0]["kind"] == "UnfitNode":
        return end(Cause.UNFIT_NODE, _first_line(errors[0]["message"]), errors[0].get("node", ""))
    failure = failure or first_failure(run, job, attempt)
    if state in JOB_STATES:
        node = failure.node if failure and failure.cause is Cause.NODE_LOST else ""
        return end(
            JOB_STATES[state],
            node
            or "before it could save; "
            + (f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"),
            node,
        )
    if errors and not (failure and failure.by_signal and LOST_PEER.search(_first_line(errors[0]["message"]))):
        what = Cause.OUT_OF_MEMORY if "too little memory" in errors[0]["message"] else Cause.ERROR
        return end(
            what, f"rank {errors[0]['rank']}: {_first_line(errors[0]['message'])}", errors[0].get("node", "")
        )
    if failure:
        last = "" if failure.by_signal else _last_line(run, attempt, failure.rank)
        return end(
            failure.cause, failure.words + (f"; its log ends with: {last}" if last else ""), failure.node
        )
    known = f"job {job}, state {state or 'not known'}" if job else "no word of it, as after a kill"
    return end(Cause.UNKNOWN, known + (f", exit code {code}" if code else ""))


def _last_sign(lines: Sequence[dict[str, Any]], attempt: int) -> float:
    """When an attempt was last heard of: what comes between its beginning and the next one's is its own."""
    begun = next(
        number
        for number, line in enumerate(lines)
        if line["event"] == "attempt" and line["attempt"] == attempt
    )
    own = takewhile(
        lambda line: line["event"] not in ("attempt", "ended", "submitted", "chain_ended"), lines[begun + 1 :]
    )
    return max(line["time"] for line in (lines[begun], *own))


def decide(
    settings: Slurm, ends: Sequence[dict[str, Any]], partition_nodes: int, now: float | None = None
) -> Verdict:
    """Whether a chain goes on after these `ended` lines of the ledger, oldest first.

    partition_nodes: how many nodes there are; never so many are left out that too few remain.
    """
    now = now or time.time()
    if not ends:
        return Verdict(True)
    last = ends[-1]
    if Cause.told(last["cause"]) in FINAL:
        return Verdict(False, last["words"])
    without_progress = [
        Cause.told(end["cause"])
        for end in takewhile(lambda end: end["saved"] == last["saved"], reversed(ends))
    ]
    failures, misfortunes = (
        sum(cause in kind for cause in without_progress) for kind in (FAILURES, MISFORTUNES)
    )
    if failures >= settings.max_attempts_without_progress or misfortunes >= MISFORTUNES_WITHOUT_PROGRESS:
        why = (
            f"{failures + misfortunes} attempts failed in a row without a checkpoint after step"
            f" {last['saved']}; the last one: {last['words']}"
        )
        return Verdict(False, f"{why} (slurm.max_attempts_without_progress)")
    many = failures + misfortunes - 2
    delay = min(LONGEST_BACK_OFF, BACK_OFF * GROWTH**many) if many >= 0 else 0.0
    return Verdict(True, "", _exclude(settings, ends, partition_nodes, now), delay)


def _exclude(
    settings: Slurm, ends: Sequence[dict[str, Any]], partition_nodes: int, now: float
) -> tuple[str, ...]:
    recent = [
        end
        for end in ends
        if end["node"]
        and now - end["time"] < 60 * settings.exclude_minutes
        and Cause.told(end["cause"]) in FAULTS_OF_NODES
    ]
    guilt = Counter[str]()
    for end in recent:
        guilt[end["node"]] += GUILT_LIMIT if Cause.told(end["cause"]) is Cause.UNFIT_NODE else 1
    spare = max(0, partition_nodes - node_range(settings.nodes)[0])
    newest = dict.fromkeys(end["node"] for end in reversed(recent) if guilt[end["node"]] >= GUILT_LIMIT)
    return tuple(sorted(list(newest)[:spare]))


def chain_jobs(run: RunDir) -> set[str]:
    """All jobs that were ever submitted for a run."""
    following = {path.read_text(encoding="utf-8").strip() for path in (run.slurm / "jobs").glob("*.next")}
    known = {
        str(line["job"])
        for line in run.ledger()
        if line["event"] in ("submitted", "attempt") and line.get("job")
    }
    return {job for job in following | known if job}


def stop_requested(run: RunDir) -> bool:
    """Whether `launch stop` has been asked for."""
    return (run.slurm / "stop").exists()


def job_state(run: RunDir, job: str) -> str:
    """State of a job, as it was noted last; empty if it was not."""
    record = run.slurm / "jobs" / job
    text = record.read_text(encoding="utf-8") if job and record.is_file() else ""
    found = re.search(r"JobState=([A-Z_]+)", text)
    if found and found[1] in ("RUNNING", "FAILED") and re.search(r"PreemptTime=\d", text):
        return "PREEMPTED"  # and has left within its grace
    return found[1] if found else ""


SRUN_TASK = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)$", re.MULTILINE)
LOST_PEER = re.compile(r"Connection (closed|reset)|DistBackendError|NCCL|Gloo|gloo")
"""In the error of a rank that has only lost another one."""
SRUN_NODE = re.compile(r"^srun: error: Node failure on (?P<node>\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """What srun said first of a task or a node that failed; the others were ended because of it."""

    cause: Cause
    words: str
    node: str
    by_signal: bool = False
    rank: int = 0


def first_failure(run: RunDir, job: str, attempt: int) -> Failure | None:
    """The first failure of an attempt's ranks, by what srun said."""
    said = _srun_output(run, job, attempt)
    if lost := SRUN_NODE.search(said):
        return Failure(Cause.NODE_LOST, lost["node"], lost["node"])
    found = []
    for line in SRUN_TASK.finditer(said):
        node, tasks, what = line["node"], line["tasks"], line["what"].removesuffix(" (core dumped)")
        if what != f"Exited with exit code {ExitCode.SAVED.value}":
            cause = Cause.OUT_OF_MEMORY if "Out Of Memory" in what else Cause.CRASH
            found.append(
                Failure(
                    cause,
                    f"rank {tasks} on {node}: {what}",
                    node,
                    not what.startswith(("Exited", "Terminated")),
                    int(re.split("[,-]", tasks)[0]),
                )
            )
    return next(
        (failure for failure in found if failure.by_signal), found[0] if found else None
    )  # the others may be told of first


def _srun_output(run: RunDir, job: str, attempt: int) -> str:
    """What srun said in an attempt; a job that was requeued goes on in the same file."""
    log = run.slurm / f"{job}.log"
    if not job or not log.is_file():
        return ""
    _, _, after = log.read_text(errors="replace", encoding="utf-8").partition(f"attempt {attempt} begins\n")
    return re.split(r"attempt \d+ begins\n", after)[0]


def _last_line(run: RunDir, attempt: int, rank: int) -> str:
    """The last that a rank wrote, before it could tell of an error in another way."""
    log = run.attempt_logs(attempt) / f"rank-{rank:05d}.log"
    return (
        next(
            (
                line
                for line in reversed(log.read_text(errors="replace", encoding="utf-8").splitlines())
                if line.strip()
            ),
            "",
        )
        if log.is_file()
        else ""
    )


def _first_line(text: str) -> str:
    """What an error said: its first line, or the last one of a traceback."""
    lines = text.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
