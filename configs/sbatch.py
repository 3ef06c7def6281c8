"""Options of sbatch that a config may hand on (`slurm.sbatch`), and those that the chain decides itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.options import Option, Options

TABLE = """
array/a= account/A= acctg-freq= batch= bb= bbf= begin/b= chdir/D= cluster-constraint= clusters/M= comment=
constraint/C= container= contiguous core-spec/S= cores-per-socket= cpu-freq= cpus-per-gpu= cpus-per-task/c=
deadline= delay-boot= dependency/d= distribution/m= error/e= exclude/x= exclusive export export-file= extra=
extra-node-info/B= get-user-env gid= gpu-bind= gpu-freq= gpus/G= gpus-per-node= gpus-per-socket=
gpus-per-task= gres= gres-flags= help/h hint= hold/H ignore-pbs input/i= job-name/J= kill-on-invalid-dep=
licenses/L= mail-type= mail-user= mcs-label= mem= mem-bind= mem-per-cpu= mem-per-gpu= mincpus= network= nice
no-kill/k no-requeue nodefile/F= nodelist/w= nodes/N= ntasks/n= ntasks-per-core= ntasks-per-gpu=
ntasks-per-node= ntasks-per-socket= open-mode= output/o= overcommit/O oversubscribe/s parsable partition/p=
power= prefer= priority= profile= propagate qos/q= quiet/Q reboot requeue reservation= signal=
sockets-per-node= spread-job switches= tasks-per-node= test-only thread-spec= threads-per-core= time/t=
time-min= tmp= tres-per-task= uid= usage use-min-nodes verbose/v version/V wait/W wait-all-nodes= wckey=
wrap=
"""
"""The options of sbatch: long name, short one, and `=` where it takes the word after it."""

LOG = "the job's output goes to RUN/slurm/JOB.log, where `launch status` reads why attempts ended"
FIRST_JOB = (
    "each job of the chain would wait for it. To let the first one wait: `launch submit --dry-run`, then"
    " `sbatch {option} RUN/slurm/job.sh`"
)
CHAIN = "the jobs of a chain depend on each other: every one queues the next"
GPUS = "slurm.gpus_per_node says how many GPUs a node is asked for (and slurm.gpu_request how)"
TASKS = "slurm.tasks_per_node (default: one per GPU) and slurm.nodes say how many processes there are"
CORES = "slurm.cpus_per_task says how many cores each process gets"
RESUBMIT = "slurm.resubmit says whether a job is requeued (chain, requeue, none)"
ANSWER = "`launch submit` reads what sbatch answers"
NO_JOB = "with it sbatch submits no job; `launch submit --dry-run` shows what would be submitted"
DECIDED = {
    "array": "a chain is one job at a time; other runs need another run.name each",
    "begin": FIRST_JOB,
    "chdir": "jobs run in the folder that `launch submit` is called in",
    "clusters": "a chain is of one cluster: call `launch submit` where its sbatch is the default",
    "cpus-per-gpu": CORES,
    "cpus-per-task": CORES,
    "dependency": f"{CHAIN}, and {FIRST_JOB}",
    "error": LOG,
    "export": "a job has the variables of the shell that submits, and those that slurm.setup exports:"
    " [export NAME=VALUE]",
    "gpus": GPUS,
    "gpus-per-socket": GPUS,
    "gpus-per-task": GPUS,
    "help": NO_JOB,
    "hold": FIRST_JOB,
    "job-name": "the job's name is run.name",
    "kill-on-invalid-dep": CHAIN,
    "mincpus": f"{TASKS}, and {CORES}",
    "nodes": "slurm.nodes says how many nodes an attempt takes",
    "no-requeue": RESUBMIT,
    "ntasks": TASKS,
    "ntasks-per-gpu": TASKS,
    "ntasks-per-node": TASKS,
    "open-mode": LOG,
    "output": LOG,
    "parsable": ANSWER,
    "partition": "slurm.partition says it, as the cores of its nodes count, too",
    "quiet": ANSWER,
    "requeue": RESUBMIT,
    "signal": "slurm.signal_seconds says how long before the time limit Slurm asks to save",
    "tasks-per-node": TASKS,
    "test-only": NO_JOB,
    "time": "slurm.time_minutes is the time limit of an attempt",
    "tres-per-task": f"{GPUS}, and {CORES}",
    "usage": NO_JOB,
    "version": NO_JOB,
    "wait": "every job queues the next one, and would wait for its end",
    "wrap": "what a job runs is RUN/slurm/job.sh; lines before the start: slurm.setup",
}
"""What a config cannot hand on, and what does it instead."""
DECIDED["export-file"] = DECIDED["export"]
OPTIONS = Options("sbatch", TABLE, DECIDED)
SETTINGS = {
    "account": "account",
    "constraint": "constraint",
    "mem": "memory_gb",
    "mem-per-cpu": "memory_gb",
    "mem-per-gpu": "memory_gb",
    "qos": "qos",
    "reservation": "reservation",
}
"""What may be handed on as long as its own setting does not say something else."""


def check(lines: Sequence[str], slurm: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the chain cannot live with. lines: as of `slurm.sbatch`; slurm: the
    other settings of that section."""
    for line in lines:
        for option in read(line):
            if why := _why_not(option.name, option.value, slurm):
                raise ValueError(f"{option.written}: {why.format(option=option.written)}")


def for_one_node(lines: Sequence[str]) -> list[str]:
    """Those lines that suit a job of one node without GPUs, too."""
    return [
        line
        for line in lines
        if not any(asks_for_gpus(name) or name == "nodelist" for _, name, _ in read(line))
    ]


def asks_for_gpus(name: str) -> bool:
    """Whether an option of this name asks for GPUs, or for something of each."""
    return name.startswith(("gres", "gpu")) or name.endswith(("-per-gpu", "tres-per-task"))


def read(line: str) -> Iterator[Option]:
    """The options of a line of `#SBATCH`. Raises ValueError if the line is something else."""
    if not line.isprintable():
        raise ValueError(f"{line!r}: line breaks and other control characters cannot be told to Slurm")
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ValueError(f"{line}: {str(error).lower()}") from None
    if not words:
        raise ValueError(f"{line!r}: not an option of sbatch, as --exclusive or --comment=captions")
    yield from OPTIONS.read(words)


def _why_not(name: str, value: str, slurm: Mapping[str, Any]) -> str:
    """Why an option is not handed on; empty if it may be."""
    if name in ("gres", "gpus-per-node"):
        return _why_not_gpus(name, value, slurm)
    if name == "distribution":
        return why_not_distributed(value)
    setting = SETTINGS.get(name)
    if setting and slurm.get(setting) is not None:
        return f"slurm.{setting} says it already: leave one of them out"
    return DECIDED.get(name, "")


def why_not_distributed(value: str) -> str:
    """Why ranks are not spread over the nodes like this; empty if they may be."""
    if re.match(r"(\*|block)?([:,]|$)", value.lower()):
        return ""
    return "ranks stand node by node, by which it is told whose node fails: block first, as in block:cyclic"


def _why_not_gpus(name: str, value: str, slurm: Mapping[str, Any]) -> str:
    """GPUs of a certain type may be asked for, as many as the setting says, and other things beside them."""
    wanted, request = slurm.get("gpus_per_node", 0), slurm.get("gpu_request")
    asks_alike = request == name.replace("-", "_")
    kinds = value.split(",") if name == "gres" else [f"gpu:{kind}" for kind in value.split(",")]
    of_gpus = [kind.split(":") for kind in kinds if re.match(r"(gres/)?gpu(:|$)", kind)]
    is_typed = all(len(parts) == 3 or (len(parts) == 2 and not parts[1].isdigit()) for parts in of_gpus)
    counts = [int(parts[-1]) if parts[-1].isdigit() else 1 for parts in of_gpus]
    typed = f"--gres=gpu:TYPE:{wanted}" if request == "gres" else f"--gpus-per-node=TYPE:{wanted}"
    if not of_gpus:
        other_way = "slurm.gpu_request=gpus_per_node"
        lost = (
            f"it would take the place of the GPUs' own --gres: name both, {typed},{value}, or set {other_way}"
        )
        return lost if wanted and asks_alike else ""
    if is_typed and asks_alike and sum(counts) == wanted:
        return ""
    return f"{GPUS}; it is {wanted}" + (f". GPUs of one type: {typed}" if wanted else "")
