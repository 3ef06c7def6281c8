"""The script of a run's jobs, and its submission, through submitit."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from configs import sbatch
from configs.errors import ConfigError, EarwitnessError
from configs.run.folder import RunDir
from configs.schema import RunConfig, Slurm, node_range
from slurm import cluster, shell
from slurm.sayings import NO_ANSWER, NO_CLUSTER, advice

BODY = Path(__file__).with_name("job.sh")

JOB_ID = re.compile(r"(?:^|Submitted batch job )(\d+)(?:;.*| on cluster .*)?\s*$", re.MULTILINE)
"""In what sbatch prints; sites that wrap it print more."""


def write_script(config: RunConfig, run: RunDir, code: Path) -> Path:
    """Write RUN/slurm/job.sh, which sbatch takes as it is; returns its path."""
    script = run.slurm.absolute() / "job.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(script_text(config, run, code), encoding="utf-8")
    script.chmod(0o755 & ~_umask())
    return script


def script_text(config: RunConfig, run: RunDir, code: Path) -> str:
    """What a job of this run does: options for sbatch, lines of the user's, and job.sh."""
    settings = config.slurm
    is_webhook = settings.notify is not None and "://" in settings.notify
    mail_address = "" if is_webhook else settings.notify
    variables = {
        "run": str(run.path.absolute()),
        "code": str(code.absolute()),
        "python": settings.python or sys.executable,
        "tasks": str(settings.tasks),
        "min_nodes": str(node_range(settings.nodes)[0]),
        "resubmit": settings.resubmit,
        "mail": mail_address or "",
        "no_answer": NO_ANSWER.pattern,
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f"srun_args=({shlex.join(settings.srun_args)})"]
    body = BODY.read_text(encoding="utf-8").replace("@SETUP@", "\n".join(settings.setup))
    return _with_header(config, run, "%j.log", [*lines, body])


def index_script(config: RunConfig, run: RunDir, code: Path) -> str:
    """A job that indexes the shards that a run asks for."""
    python = config.slurm.python or sys.executable
    command = [python, "-m", "tools.index", str(run.proposal.path.absolute()), "--quick"]
    lines = [
        *config.slurm.setup,
        f"export PYTHONPATH={shlex.quote(str(code.absolute()))} PYTHONSAFEPATH=1",
        f"srun --export=ALL --ntasks=1 {shlex.join(config.slurm.srun_args)} {shlex.join(command)}",
    ]
    return _with_header(config, run, "index-%j.log", lines)


def _with_header(config: RunConfig, run: RunDir, log: str, commands: list[str]) -> str:
    """A script as submitit writes it. log: the name of the job's output, with %j for its number."""
    executor = SlurmExecutor(run.slurm)
    executor.parameters = _parameters(config, run, log)
    names = [name.replace("_", "-") for name in executor.parameters["additional_parameters"]]
    names += [
        name
        for line in config.slurm.sbatch
        for _, name, _ in sbatch.read(line)
        if name in sbatch.OPTIONS.long
    ]
    return executor._make_submission_file_text("\n".join([shell.unset_in_job(names), *commands]), "")


def submit(script: Path, *options: str) -> str:
    """Hand a script to sbatch; returns the job's id. What the site says meanwhile is printed. Raises
    ConfigError with all that Slurm said, EarwitnessError if it did not answer."""
    try:
        printed, said = cluster.answer("sbatch", "--parsable", *options, str(script))
    except cluster.SlurmRefused as error:
        if NO_ANSWER.search(error.said):
            raise EarwitnessError(
                f"{error.said}\nSlurm may have taken it: submit again if `squeue --me` does not show it"
            ) from None
        raise ConfigError(
            f"Slurm does not take the job:\n{_with_advice(error.said)}\nThe script is {script}"
        ) from None
    print(said, end="", file=sys.stderr, flush=True)
    jobs = JOB_ID.findall(printed)
    if not jobs:
        raise EarwitnessError(f"{script}: handed to sbatch, which names no job: {printed.strip()!r}")
    return str(jobs[-1])


def _with_advice(said: str) -> str:
    return "\n".join(filter(None, [said, advice(said)]))


def _parameters(config: RunConfig, run: RunDir, log: str) -> dict[str, Any]:
    """What submitit writes at the head of a script. Raises ConfigError for characters that Slurm cannot be
    told."""
    options = _options(config, run, log)
    unprintable = [
        name for name, value in options.items() if isinstance(value, str) and not value.isprintable()
    ]
    if unprintable:
        raise ConfigError(
            f"{', '.join(unprintable)}: line breaks and other control characters cannot be told to Slurm"
        )
    return {
        "use_srun": False,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": [f"#SBATCH {option}" for option in config.slurm.sbatch],
        "additional_parameters": {
            name: _escaped(value) for name, value in options.items() if value is not None
        },
    }


def _options(config: RunConfig, run: RunDir, log: str) -> dict[str, Any]:
    """Options of sbatch by name; those that are None are left out. Raises ConfigError for a folder that Slurm
    cannot write its output into."""
    settings, folder = config.slurm, str(run.slurm.absolute())
    if "\\" in folder:
        raise ConfigError(
            f"run.dir: {folder}: Slurm cannot write its output into a folder with a backslash in its name"
        )
    return {
        "job_name": config.run.name,
        "output": f"{folder.replace('%', '%%')}/{log}",
        "chdir": str(Path.cwd()),
        "open-mode": "append",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "nodes": settings.nodes,
        **_tasks(settings),
        **_gpus(settings),
        "mem": f"{settings.memory_gb}G" if settings.memory_gb else None,
        "time": settings.time_minutes,
        "signal": f"USR2@{settings.signal_seconds}",
        "no_requeue" if settings.resubmit == "none" else "requeue": True,
    }


def _tasks(settings: Slurm) -> dict[str, int | None]:
    """Room for the processes of a node. Of a range, --ntasks-per-node would take no more nodes than the
    fewest nodes have tasks."""
    cores = cores_per_task(settings)
    fewest, most = node_range(settings.nodes)
    if fewest == most:
        return {"ntasks_per_node": settings.tasks, "cpus_per_task": cores}
    return {"mincpus": settings.tasks * (cores or 1), "cpus_per_task": cores}


def cores_per_task(settings: Slurm) -> int | None:
    """Cores that each process is to have: `slurm.cpus_per_task`, or its share of a node's, by the GPUs that
    are asked for; None: the cluster's default, as there are no GPUs to share by, or Slurm does not tell."""
    gpus = settings.gpus_per_node
    if settings.cpus_per_task or not gpus:
        return settings.cpus_per_task
    try:
        types = cluster.node_types(settings.partition)
    except EarwitnessError:
        return None
    shares = [node.cores * gpus // node.gpus // settings.tasks for node in types if node.gpus >= gpus]
    return max(1, min(shares)) if shares else None  # so that any of the nodes will do


def _gpus(settings: Slurm) -> dict[str, Any]:
    """GPUs of a node, asked for as is the custom of the site."""
    if not settings.gpus_per_node:
        return {}
    if settings.gpu_request == "gres":
        return {"gres": f"gpu:{settings.gpus_per_node}"}
    return {"gpus_per_node": settings.gpus_per_node}


def _escaped(value: object) -> object:
    """As sbatch takes it: submitit quotes for a shell, where a backslash within single quotes is one; to
    sbatch it is an escape."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def look_ahead(script: Path, *options: str) -> str | None:
    """What Slurm would say against a script now, with advice; empty if nothing, None if it does not
    answer."""
    try:
        cluster.run("sbatch", "--test-only", *options, str(script), seconds=cluster.LOOK_SECONDS)
    except cluster.SlurmRefused as error:
        is_silent = NO_CLUSTER in error.said or NO_ANSWER.search(error.said)
        return None if is_silent else _with_advice(error.said)
    except EarwitnessError:
        return None
    return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
