"""`launch train` starts its own ranks; under a launcher there would be as many runs as that has tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from configs.errors import ConfigError


class Launcher(NamedTuple):
    """A program that starts tasks. tasks: the variable that says how many; besides: another one that it
    sets, where people set the first one themselves."""

    name: str
    tasks: str
    besides: str = ""


LAUNCHERS = (
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Launcher("torchrun", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    Launcher("deepspeed", "WORLD_SIZE", "CROSS_SIZE"),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE"),
    Launcher("mpirun", "PMI_SIZE"),
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE"),
    Launcher("horovodrun", "HOROVOD_SIZE"),
    Launcher("flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)


def refuse_launchers(variables: Mapping[str, str]) -> None:
    """Raise ConfigError if a launcher has started this process as one of several tasks."""
    for launcher in LAUNCHERS:
        tasks = variables.get(launcher.tasks, "")
        is_one_of_several = tasks.isdigit() and int(tasks) > 1
        if not is_one_of_several or (launcher.besides and launcher.besides not in variables):
            continue
        if launcher.name == "srun" and _is_at_a_terminal(variables):
            continue
        raise ConfigError(
            f"launch train starts its own ranks: call it once, with --procs {tasks}, and not under"
            f" {launcher.name}, which has started it as one of {tasks} tasks ({launcher.tasks}={tasks}). On"
            " several nodes: python -m launch submit. If nothing has started it, but this shell has such"
            f" variables: env -u {launcher.besides or launcher.tasks} python -m launch train ..."
        )


def _is_at_a_terminal(variables: Mapping[str, str]) -> bool:
    """Whether this is the shell of `srun --pty`: of all its tasks only the first one has the terminal."""
    return "SLURM_PTY_PORT" in variables and variables.get("SLURM_PROCID") == "0"
