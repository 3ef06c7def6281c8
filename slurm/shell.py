"""Variables of the shell that starts something: some are its own business, or of the job that it is in, and
would mislead a job or a rank of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from configs import sbatch
from configs.schema import Slurm

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
"""Never handed on to a job: by the time it starts they may have changed."""
OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "CROSS_RANK", "ROLE_*"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*", "ACCELERATE_*", "FSDP_*", "HOROVOD_*", "DLTS_*"),
    *("FLUX_JOB_*", "FLUX_TASK_*", "JSM_*", "PET_*", "DS_ACCELERATOR"),
    *("OMPI_*", "PMI_*", "PMIX_*", "PRTE_*", "PALS_*", "MV2_COMM_*", "MPI_LOCAL*", "EARWITNESS_DIE_WITH"),
)
"""By which launchers (torchrun, accelerate, mpirun, ...) tell a process which one it is, and how to load."""
OF_SLURM = (
    *("SLURM_*", "SBATCH_*", "SALLOC_*", "SRUN_*"),
    *("SQUEUE_*", "SINFO_*", "SCANCEL_*", "SCONTROL_*", "SACCT_*"),
)
"""Of a job, or options of Slurm's commands, which they take over those of a script."""
OF_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""By which Slurm's commands find the cluster, and say who asks."""
WISHES = ("account", "constraint", "partition", "qos", "reservation")
"""Settings that people, or their site, also make once for all jobs: SBATCH_ACCOUNT, ..."""
OF_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Slurm sets them anew for each step that has GPUs."""
OF_JOB = (
    *("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_*", "SLURM_RESTART_COUNT"),
    *("SLURM_JOB_*", "SLURM_JOBID", "SLURM_ARRAY_JOB_ID", "SLURM_NODELIST", "SLURM_NNODES", "SLURM_NODEID"),
    *("SLURM_TASKS_PER_NODE", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE", "SLURM_PROCID", "SLURM_LOCALID"),
)
"""Slurm sets them anew for every job."""


def heed(settings: Slurm, variables: Mapping[str, str]) -> tuple[Slurm, list[str]]:
    """Settings with the wishes in place of those that the config leaves out, and what to say of all variables
    that are options of sbatch."""
    given = {name for line in settings.sbatch for _, name, _ in sbatch.read(line)}
    options = {name: value for name, value in variables.items() if name.startswith("SBATCH_")}
    wishes, said = {}, []
    for setting in WISHES:
        name = f"SBATCH_{setting.upper()}"
        if options.get(name) and getattr(settings, setting) is None and setting not in given:
            wishes[setting] = options.pop(name)
            said.append(f"slurm.{setting}={wishes[setting]}, by {name} of this shell (the config has none)")
    if options:
        said.append(
            f"not heeded: {', '.join(sorted(options))} of this shell; jobs ask for what the config says"
        )
    return settings.model_copy(update=wishes), said


def for_commands(variables: Mapping[str, str]) -> dict[str, str]:
    """What Slurm's commands see: nothing that makes them do something else than is asked for."""
    return without(variables, [*SECRETS, *OF_LAUNCHERS, *OF_SLURM, *OF_GPUS], keep=OF_CLUSTER)


def for_rank(variables: Mapping[str, str]) -> dict[str, str]:
    """What a rank that this machine's launcher starts sees: it is no task of a job around it, but has no more
    cores than that has."""
    return without(variables, [*OF_LAUNCHERS, *OF_SLURM], keep=[*OF_CLUSTER, "SLURM_CPUS_ON_NODE"])


def unset_in_job(options: Sequence[str]) -> str:
    """Lines of shell that leave a job nothing of the shell that submitted it. options: long names of those
    that the script hands to sbatch, which sets a variable for each that srun heeds, too."""
    keep = [*OF_JOB, *(f"SLURM_{option.replace('-', '_').upper()}" for option in options)]
    unset = [*SECRETS, *OF_LAUNCHERS, *OF_SLURM, *OF_GPUS]
    return f"""\
# Of the shell that submitted: secrets, which each attempt reads anew, and what would mislead this job.
for name in $(compgen -e); do
  case $name in
    {"|".join(keep)}) ;;
    {"|".join(unset)}) unset "$name" ;;
  esac
done"""


def without(
    variables: Mapping[str, str], patterns: Sequence[str], keep: Sequence[str] = ()
) -> dict[str, str]:
    """Variables but those with names like these."""
    return {
        name: value
        for name, value in variables.items()
        if _is_like(name, keep) or not _is_like(name, patterns)
    }


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
