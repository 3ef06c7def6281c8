"""Options of srun that a config may hand on (`slurm.srun_args`), and those that the chain decides itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from configs.options import NotAnOption, Options
from configs.sbatch import CORES, TASKS, asks_for_gpus, why_not_distributed

TABLE = """
account/A= acctg-freq= async/a bb= bbf= bcast bcast-exclude= begin/b= cluster-constraint= clusters/M=
comment= compress constraint/C= container= contiguous core-spec/S= cores-per-socket= cpu-bind= cpu-freq=
cpus-per-gpu= cpus-per-task/c= chdir/D= deadline= delay-boot= dependency/d= disable-status/X distribution/m=
epilog= error/e= exact exclude/x= exclusive export= external-launcher extra= extra-node-info/B= gpu-bind=
gpu-freq= gpus/G= gpus-per-node= gpus-per-socket= gpus-per-task= gres= gres-flags= help/h het-group= hint=
hold/H immediate/I input/i= interactive jobid= job-name/J= kill-on-bad-exit/K label/l licenses/L= mail-type=
mail-user= mcs-label= mem= mem-bind= mem-per-cpu= mem-per-gpu= mincpus= mpi= msg-timeout= multi-prog
network= nice no-allocate/Z no-kill/k nodefile/F= nodelist/w= nodes/N= ntasks/n= ntasks-per-core=
ntasks-per-gpu= ntasks-per-node= ntasks-per-socket= open-mode= output/o= overcommit/O overlap
oversubscribe/s partition/p= power= prefer= preserve-env/E priority= profile= prolog= propagate pty qos/q=
quiet/Q quit-on-interrupt reboot relative/r= reservation= resv-ports send-libs signal= slurmd-debug=
sockets-per-node= spread-job stepmgr switches= task-epilog= task-prolog= tasks-per-node= test-only
thread-spec= threads/T= threads-per-core= time/t= time-min= tmp= treewidth= tres-bind= tres-per-task=
unbuffered/u usage use-min-nodes verbose/v version/V wait/W= wckey=
"""
"""The options of srun, as those of sbatch."""

UNHEEDED = """
account begin clusters cluster-constraint contiguous deadline dependency hold immediate licenses
mail-type mail-user mincpus nice partition prefer priority qos reboot reservation spread-job switches time-min
tmp use-min-nodes wckey
"""
"""Of these srun takes no notice within a job."""
LOG = "what a rank prints goes to RUN/logs/ATTEMPT/rank-R.log, and what else srun prints is read by the chain"
ENDS = "an attempt ends when one of its ranks does, as the others would wait for it"
NODES = "an attempt runs on all nodes of its job: slurm.nodes, or slurm.sbatch for which ones"
OF_JOB = (
    "it is of a job, and srun does not heed it within one: a setting of the section slurm, or slurm.sbatch"
)
NO_STEP = "with it srun starts no ranks"
DECIDED = {
    "bcast": "Python is not copied without its packages; slurm.python names the one on the nodes",
    "chdir": "ranks run in the folder that `launch submit` is called in",
    "constraint": NODES,
    "cpus-per-task": CORES,
    "error": LOG,
    "exclude": NODES,
    "exclusive": "it excludes --overlap, which the chain needs to judge an attempt; --exact says the same",
    "export": "ranks have the variables of their job, and what slurm.setup exports: [export NAME=VALUE]",
    "help": NO_STEP,
    "het-group": "a chain is of jobs of one part",
    "jobid": "ranks are started in their own job",
    "kill-on-bad-exit": ENDS,
    "label": LOG,
    "multi-prog": "srun would take Python for a list of programs",
    "no-allocate": "ranks are started in their own job",
    "no-kill": ENDS,
    "nodefile": NODES,
    "nodelist": NODES,
    "nodes": NODES,
    "ntasks": TASKS,
    "ntasks-per-gpu": TASKS,
    "ntasks-per-node": TASKS,
    "output": LOG,
    "preserve-env": TASKS,
    "pty": "ranks have no terminal",
    "quiet": "the chain reads why a rank or a node failed in what srun says",
    "relative": NODES,
    "signal": "slurm.signal_seconds says how long before the time limit Slurm asks to save",
    "tasks-per-node": TASKS,
    "test-only": NO_STEP,
    "time": "slurm.time_minutes is the time limit of an attempt",
    "usage": NO_STEP,
    "version": NO_STEP,
    "wait": ENDS,
}
"""What a config cannot hand on, and what does it instead."""
DECIDED |= dict.fromkeys(UNHEEDED.split(), OF_JOB)
OPTIONS = Options("srun", TABLE, DECIDED)


def check(words: Sequence[str]) -> None:
    """Raise ValueError for words that the chain cannot live with."""
    for word in words:
        if re.match(r"-[^=\s]*\s", word):
            apart = ", ".join(repr(part) for part in _split(word))
            raise ValueError(f"{word!r}: srun gets it as one word; write [{apart}]")
    try:
        for option in OPTIONS.read(words):
            if why := _why_not(option.name, option.value):
                raise ValueError(f"{option.written}: {why}")
    except NotAnOption as error:
        raise ValueError(
            f"{error}, which would run it in place of Python; to start Python by something else (numactl,"
            " nsys), let slurm.python be a script that does"
        ) from None


def without_gpus(words: Sequence[str]) -> list[str]:
    """Those words that suit a job without GPUs, too."""
    return [word for option in OPTIONS.read(words) if not asks_for_gpus(option.name) for word in option.words]


def _why_not(name: str, value: str) -> str:
    """Why an option is not handed on; empty if it may be."""
    return why_not_distributed(value) if name == "distribution" else DECIDED.get(name, "")


def _split(word: str) -> list[str]:
    try:
        return shlex.split(word)
    except ValueError:
        return word.split()
