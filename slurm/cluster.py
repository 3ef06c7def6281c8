"""Slurm's commands, as users have them: no accounting is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import EarwitnessError
from slurm import shell

ANSWER_SECONDS = 300.0
"""Seconds that Slurm may take to answer."""
LOOK_SECONDS = 10.0
"""The same where an answer is only of use, and not needed."""
GPUS = re.compile(r"\bgpu:(?:[^:,(]+:)?(\d+)")
"""In generic resources, as gpu:8 or gpu:a100:4(S:0-1),nvme:1."""


class SlurmRefused(EarwitnessError):
    """A command of Slurm's has failed; `said` is its whole complaint."""

    def __init__(self, command: Sequence[str], said: str) -> None:
        super().__init__(f"{' '.join(command)}: {said}")
        self.said = said


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm still has in hand. state: PENDING, RUNNING, COMPLETING, ...; nodes: as n[1-4]; reason:
    why it waits."""

    job: str
    state: str
    nodes: str
    reason: str


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike: cores (CPUs, as Slurm counts them) and GPUs of one."""

    cores: int
    gpus: int


def can_submit() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def queued(jobs: Iterable[str], *, seconds: float = ANSWER_SECONDS) -> list[QueuedJob]:
    """Those of some jobs that have not ended. seconds: how long Slurm may take to answer."""
    wanted = sorted(set(jobs))
    if not wanted:
        return []
    # One that is unknown by now must not hide the others: ask for all.
    lines = run("squeue", "--noheader", "--format=%i|%T|%N|%r", seconds=seconds).splitlines()
    all_jobs = [QueuedJob(*map(str.strip, line.split("|", 3))) for line in lines if line.count("|") >= 3]
    return [job for job in all_jobs if job.job in wanted]


def node_types(partition: str | None) -> list[NodeType]:
    """The kinds of nodes of a partition (None: of the cluster's default one). Raises EarwitnessError."""
    lines = run("sinfo", "--noheader", "--exact", "--format=%P|%c|%G", seconds=LOOK_SECONDS).splitlines()
    types = []
    for line in lines:  # the default partition's name has a star
        if line.count("|") < 2:  # CLUSTER: NAME, where SLURM_CLUSTERS is set
            continue
        name, cores, resources = map(str.strip, line.split("|", 2))
        is_asked_for = name.endswith("*") if partition is None else name.rstrip("*") in partition.split(",")
        if is_asked_for:
            gpus = sum(map(int, GPUS.findall(resources)))
            types.append(NodeType(int(cores.rstrip("+")), gpus))
    return types


def cancel(*jobs: str) -> None:
    """End jobs, waiting or running. Unknown ones are left alone."""
    if jobs:
        command = ["scancel", *jobs]
        subprocess.run(command, env=shell.for_commands(os.environ), check=False, capture_output=True)


def send_signal(job: str, signal: str) -> None:
    """Send a signal (TERM, USR2) to all tasks of a running job, as Slurm does at a preemption or before the
    time limit."""
    run("scancel", f"--signal={signal}", job)


def set_nodes(job: str, nodes: int, tasks: int) -> None:
    """Let a waiting job take another number of nodes, with so many tasks in all."""
    run("scontrol", "update", f"JobId={job}", f"NumNodes={nodes}-{nodes}", f"NumTasks={tasks}")


def run(*command: str, environment: Mapping[str, str] | None = None, seconds: float = ANSWER_SECONDS) -> str:
    """What a command of Slurm's prints within so many seconds. Raises EarwitnessError with its complaint."""
    return answer(*command, environment=environment, seconds=seconds)[0]


def answer(
    *command: str, environment: Mapping[str, str] | None = None, seconds: float = ANSWER_SECONDS
) -> tuple[str, str]:
    """What a command of Slurm's prints, and what it says on stderr. Raises as `run` does."""
    clean = shell.for_commands(os.environ if environment is None else environment)
    try:
        done = subprocess.run(
            command, env=clean, check=True, capture_output=True, encoding="utf-8", timeout=seconds
        )
    except FileNotFoundError:
        raise EarwitnessError(
            f"{command[0]}: not found; this needs Slurm's commands, as on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise EarwitnessError(
            f"{' '.join(command)}: no answer within {seconds:.0f} s; is the cluster up{_where()}?"
        ) from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or error.stdout.strip() or f"exit code {error.returncode}"
        raise SlurmRefused(command, said) from None
    return done.stdout, done.stderr


def _where() -> str:
    return f" that SLURM_CONF={os.environ['SLURM_CONF']} names" if "SLURM_CONF" in os.environ else ""
