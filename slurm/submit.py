"""The script of a run's jobs, and its submission, through submitit."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import CommandFunction

from configs.errors import ConfigError
from configs.rundir import RunDir
from configs.schema import RunConfig

BODY = Path(__file__).with_name("job.sh")
FROZEN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
"""Never handed on to a job: by the time it starts they may have changed."""


def write_script(config: RunConfig, run: RunDir, code: Path) -> Path:
    """Write RUN/slurm/job.sh, which sbatch takes as it is; returns its path."""
    script = run.slurm.absolute() / "job.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(script_text(config, run, code))
    script.chmod(0o755 & ~_umask())
    return script


def script_text(config: RunConfig, run: RunDir, code: Path) -> str:
    """What a job of this run does: options for sbatch, lines of the user's, and job.sh."""
    settings = config.slurm
    variables = {
        "run": str(run.path.absolute()), "code": str(code.absolute()), "python": settings.python or sys.executable,
        "resubmit": settings.resubmit, "mail": settings.notify if settings.notify and "://" not in settings.notify else "",
    }  # fmt: skip
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return _with_header(config, run, "%j.log", [*lines, f"srun_args=({shlex.join(settings.srun_args)})", BODY.read_text()])


def index_script(config: RunConfig, run: RunDir, code: Path) -> str:
    """A job that indexes the shards that a run asks for."""
    command = [config.slurm.python or sys.executable, "-m", "tools.index", str(run.next_config.absolute()), "--quick"]
    lines = [f"export PYTHONPATH={shlex.quote(str(code.absolute()))} PYTHONSAFEPATH=1", f"srun {shlex.join(config.slurm.srun_args)} {shlex.join(command)}"]
    return _with_header(config, run, "index-%j.log", lines)


def _with_header(config: RunConfig, run: RunDir, log: str, commands: list[str]) -> str:
    executor = SlurmExecutor(run.slurm)
    executor.parameters = _parameters(config, run, log)
    return executor._make_submission_file_text("\n".join([f"unset {' '.join(FROZEN)}  # read anew by each attempt", *config.slurm.setup, *commands]), "")


def submit(script: Path, *options: str) -> str:
    """Hand a script to sbatch; returns the job's id. Raises ConfigError with what Slurm said."""
    with _clean_environment():
        try:
            return SlurmExecutor._get_job_id_from_submission_command(CommandFunction(["sbatch", *options, str(script)], verbose=False)())
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            said = [line for line in str(error).splitlines() if "sbatch: error" in line] or [str(error)]
            raise ConfigError("\n".join(["Slurm does not take the job:", *said, f"The script is {script}"])) from None


def _parameters(config: RunConfig, run: RunDir, log: str) -> dict[str, Any]:
    settings = config.slurm
    gpus: dict[str, Any] = {} if not settings.gpus_per_node else {"gres": f"gpu:{settings.gpus_per_node}"}
    if gpus and settings.gpu_request == "gpus_per_node":
        gpus = {"gpus_per_node": settings.gpus_per_node}
    optional = {
        "partition": settings.partition, "account": settings.account, "qos": settings.qos, "constraint": settings.constraint,
        "cpus_per_task": settings.cpus_per_task, "mem": f"{settings.memory_gb}G" if settings.memory_gb else None,
    }  # fmt: skip
    more = {
        "output": f"{_no_patterns(run.slurm.absolute())}/{log}", "chdir": str(Path.cwd()),
        "no-requeue" if settings.resubmit == "none" else "requeue": True,
    }  # fmt: skip
    if settings.reservation:
        more["reservation"] = settings.reservation
    return {
        "job_name": config.run.name, "nodes": settings.nodes, "ntasks_per_node": settings.tasks, "time": settings.time_minutes,
        "signal_delay_s": settings.signal_seconds, "use_srun": False, "wckey": None, "stderr_to_stdout": True, "additional_parameters": more,
        "setup": [f"#SBATCH {option}" for option in settings.sbatch], **optional, **gpus,
    }  # fmt: skip


def _no_patterns(path: Path) -> str:
    """A path for --output, where % begins a pattern."""
    return str(path).replace("%", "%%")


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Without what would become options of the job, as the variables of another job, and without secrets."""
    dropped = {name: os.environ.pop(name) for name in list(os.environ) if name in FROZEN or (name.startswith("SLURM_") and name != "SLURM_CONF")}
    try:
        yield
    finally:
        os.environ.update(dropped)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
