"""Variables that shells are found with, which are the business of something else: another job, a launcher."""

from __future__ import annotations

OF_LAUNCHERS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMPI_COMM_WORLD_SIZE": "1",
    "PMI_RANK": "0",
    "PMIX_RANK": "0",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "EARWITNESS_DIE_WITH": "1",
    "FLUX_JOB_SIZE": "1",
    "DS_ACCELERATOR": "cuda",
}
OF_A_JOB = {
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_CPU_BIND": "verbose",
    "SLURM_MPI_TYPE": "pmi2",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_COUNT": "9",
    "SLURM_PROCID": "0",
    "SRUN_CPUS_PER_TASK": "3",
    "CUDA_VISIBLE_DEVICES": "5",
}
OPTIONS = {
    "SBATCH_ARRAY_INX": "0-1",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_TIMELIMIT": "1",
    "SQUEUE_STATES": "SUSPENDED",
    "SCANCEL_STATE": "SUSPENDED",
}
NO_EXPORT = {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"}
"""With these a job would not see the others."""
LEFTOVERS = OF_LAUNCHERS | OF_A_JOB | OPTIONS | NO_EXPORT
