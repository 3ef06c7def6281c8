"""Options of sbatch that a config hands on, and those that the chain decides itself."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.load import validate
from configs.schema import Slurm
from tests.making import config_values


def refusal(*options: str, **settings: object) -> str:
    """What is said of some options; empty if they are handed on."""
    try:
        Slurm(sbatch=list(options), **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--array=0-3", "one job at a time"),
        ("-a 0-3", "one job at a time"),
        ("-a0-3", "one job at a time"),
        ("--arr 0-3", "one job at a time"),
        ("--exclusive --array=0-3", "one job at a time"),
        ("-Oa0-3", "one job at a time"),
        ("--output=x.log", "RUN/slurm/JOB.log"),
        ("--out x.log", "RUN/slurm/JOB.log"),
        ("-ox.log", "RUN/slurm/JOB.log"),
        ("-e x.log", "RUN/slurm/JOB.log"),
        ("--open-mode=truncate", "RUN/slurm/JOB.log"),
        ("--dependency=afterok:7", "sbatch --dependency=afterok:7 RUN/slurm/job.sh"),
        ("-d afterok:7", "sbatch -d afterok:7 RUN/slurm/job.sh"),
        ("--begin=now+1hour", "sbatch --begin=now+1hour RUN/slurm/job.sh"),
        ("--hold", "sbatch --hold RUN/slurm/job.sh"),
        ("--kill-on-invalid-dep=no", "every one queues the next"),
        ("--ntasks=4", "slurm.tasks_per_node"),
        ("-n4", "slurm.tasks_per_node"),
        ("--ntasks-per-node=4", "slurm.tasks_per_node"),
        ("--tasks-per-node=4", "slurm.tasks_per_node"),
        ("--nodes=2", "slurm.nodes"),
        ("-N2", "slurm.nodes"),
        ("--cpus-per-task=4", "slurm.cpus_per_task"),
        ("-c 4", "slurm.cpus_per_task"),
        ("--export=NONE", "slurm.setup"),
        ("--exp=NONE", "slurm.setup"),
        ("--requeue", "slurm.resubmit"),
        ("--no-requeue", "slurm.resubmit"),
        ("--signal=USR1@60", "slurm.signal_seconds"),
        ("--time=60", "slurm.time_minutes"),
        ("-t10", "slurm.time_minutes"),
        ("--gres=gpu:4", "slurm.gpus_per_node"),
        ("--gres=gpu:a100:4", "--gres=gpu:TYPE:8"),
        ("--gres=nvme:1", "--gres=gpu:TYPE:8,nvme:1"),
        ("--gpus=4", "slurm.gpus_per_node"),
        ("-G4", "slurm.gpus_per_node"),
        ("--gpus-per-task=1", "slurm.gpus_per_node"),
        ("--partition=gpu", "slurm.partition"),
        ("--wrap=hostname", "slurm.setup"),
        ("--chdir=/", "the folder that `launch submit` is called in"),
        ("-J mine", "run.name"),
        ("-m cyclic:block", "node by node"),
        ("--distribution=plane=4", "node by node"),
        ("--parsable", "reads what sbatch answers"),
        ("--test-only", "launch submit --dry-run"),
        ("--wait", "would wait for its end"),
        ("-W", "would wait for its end"),
        ("hetjob", "not an option of sbatch"),
        ("#SBATCH --exclusive", "not an option of sbatch"),
        ("--exclusive\n#SBATCH --array=0-3", "control characters"),
        ("--comment='half", "no closing quotation"),
    ],
)
def test_what_the_chain_decides_is_refused_with_the_setting_that_does(option: str, setting: str) -> None:
    assert setting in refusal(option)


@pytest.mark.parametrize(
    "option",
    [
        "--exclusive",
        "--comment=captions",
        "--comment '--array'",
        "--comment -a",
        "--switches=1@10",
        "--time-min=30",
        "-x n1,n2",
        "--nodelist=n1",
        "--mem=0",
        "--account=p1",
        "--wait-all-nodes=1",
        "--mail-type=END",
        "--gres=gpu:a100:8,nvme:1",
        "--hint=nomultithread",
        "--distribution=block:cyclic,NoPack",
        "--container-image=/images/a.sqsh",
    ],
)
def test_all_else_is_handed_on(option: str) -> None:
    assert refusal(option) == ""


def test_what_a_setting_says_is_not_said_twice() -> None:
    assert "slurm.memory_gb says it already" in refusal("--mem=0", memory_gb=64)
    assert "slurm.account says it already" in refusal("-A p2", account="p1")


def test_things_that_are_no_gpus_are_asked_for_where_gpus_are_asked_for_otherwise() -> None:
    assert refusal("--gres=nvme:1", gpu_request="gpus_per_node") == ""
    assert refusal("--gres=nvme:1", gpus_per_node=0) == ""
    assert refusal("--gpus-per-node=a100:8", gpu_request="gpus_per_node") == ""


def test_the_refusal_names_the_key(tmp_path) -> None:
    values = config_values("run", tmp_path, tmp_path, "a.tar", slurm={"sbatch": ["--array=0-3"]})
    with pytest.raises(ConfigError, match=r"slurm\.sbatch: --array=0-3: a chain is one job at a time"):
        validate(values, "test")
