"""What Slurm and srun said of a job that has ended: the one place where their words are read."""

from __future__ import annotations

import re

from configs.errors import ExitCode
from configs.run.causes import Cause
from configs.run.ends import Failure
from configs.run.folder import RunDir

JOB_STATES = {
    "CANCELLED": Cause.CANCELLED,
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "DEADLINE": Cause.TIME_LIMIT,
    "NODE_FAIL": Cause.NODE_LOST,
    "BOOT_FAIL": Cause.NODE_LOST,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
}
"""States of jobs that say why they ended."""
NODE_FAILED = re.compile(r"^srun: error: Node failure on (?P<node>\S+)$", re.MULTILINE | re.IGNORECASE)
LAUNCH_FAILED = re.compile(
    r"^srun: error: Task launch for .+ failed on node (?P<node>[^\s:]+): (?P<what>.+)$",
    re.MULTILINE | re.IGNORECASE,
)
TASK_FAILED = re.compile(
    r"^srun: error: (?P<nodes>\S+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)$", re.MULTILINE
)
BY_ITSELF = ("Exited", "Terminated")
"""How srun begins to tell of a task that was not struck by a signal, or by that which ends all."""


def job_state(run: RunDir, job: str) -> str:
    """State of a job, as it was noted last (RUN/slurm/jobs/JOB); empty if it was not."""
    record = run.slurm / "jobs" / job
    if not job or not record.is_file():
        return ""
    text = record.read_text(encoding="utf-8")
    state = re.search(r"JobState=([A-Z_]+)", text)
    if state is None:
        return ""
    if state[1] in ("RUNNING", "FAILED") and re.search(r"PreemptTime=\d", text):
        return "PREEMPTED"  # and has left within its grace
    return state[1]


def refused_successor(run: RunDir, job: str) -> str:
    """What Slurm said when a job could not queue the next one, in one line; empty if it could."""
    note = run.slurm / "jobs" / f"{job}.refused"
    if not job or not note.is_file():
        return ""
    return " ".join(note.read_text(encoding="utf-8", errors="replace").split())


def first_failure(run: RunDir, job: str, attempt: int) -> Failure | None:
    """The node or task of an attempt that failed first, by what srun said; None if it said nothing."""
    output = _srun_output(run, job, attempt)
    if lost := NODE_FAILED.search(output):
        return Failure(Cause.NODE_LOST, lost["node"], lost["node"])
    if refused := LAUNCH_FAILED.search(output):
        words = f"no task could be launched on {refused['node']}: {refused['what']}"
        return Failure(Cause.UNFIT_NODE, words, refused["node"])
    failures = []
    for failed in TASK_FAILED.finditer(output):
        what = failed["what"].removesuffix(" (core dumped)")
        if what != f"Exited with exit code {ExitCode.SAVED.value}":
            failures.append(_task_failure(failed["nodes"], failed["tasks"], what))
    # Tasks that were ended because of another one may be told of first.
    by_signal = [failure for failure in failures if failure.by_signal]
    return next(iter(by_signal + failures), None)


def _task_failure(nodes: str, tasks: str, what: str) -> Failure:
    """nodes: as n1 or n[1-2],n4, of which none is at fault more than the others; tasks: as 3 or 4-7,9."""
    is_one = not set("[,") & set(nodes)
    return Failure(
        cause=Cause.OUT_OF_MEMORY if "Out Of Memory" in what else Cause.CRASH,
        words=f"rank {tasks} on {nodes}: {what}",
        node=nodes if is_one else "",
        by_signal=not what.startswith(BY_ITSELF),
        rank=int(re.split("[,-]", tasks)[0]),
    )


def _srun_output(run: RunDir, job: str, attempt: int) -> str:
    """What srun said in an attempt; a job that was requeued goes on in the same file."""
    log = run.slurm / f"{job}.log"
    if not job or not log.is_file():
        return ""
    text = log.read_text(errors="replace", encoding="utf-8")
    _, _, after = text.partition(f"attempt {attempt} begins\n")
    return re.split(r"attempt \d+ begins\n", after)[0]
