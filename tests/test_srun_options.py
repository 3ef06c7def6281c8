"""Options of srun that a config hands on, and those that the chain decides itself."""

from __future__ import annotations

import pytest

from configs import sbatch, srun
from configs.errors import ConfigError
from configs.load import validate
from tests.making import config_values


def refusal(*words: str) -> str:
    """What is said of some words; empty if they are handed on."""
    try:
        srun.check(words)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--label", "rank-R.log"),
        ("-ul", "rank-R.log"),
        ("--output=x.log", "rank-R.log"),
        ("-e x.log", "rank-R.log"),
        ("--ntasks=4", "slurm.tasks_per_node"),
        ("-n 4", "slurm.tasks_per_node"),
        ("--ntasks-per-n=4", "slurm.tasks_per_node"),
        ("-N1", "slurm.nodes"),
        ("--nodelist=n1", "slurm.sbatch"),
        ("-r 1", "slurm.nodes"),
        ("-c8", "slurm.cpus_per_task"),
        ("--export=NONE", "slurm.setup"),
        ("--multi-prog", "a list of programs"),
        ("--pty", "no terminal"),
        ("--exclusive", "--exact"),
        ("-K0", "ends when one of its ranks does"),
        ("--wait=60", "ends when one of its ranks does"),
        ("--chdir=/", "the folder that `launch submit` is called in"),
        ("--time=10", "slurm.time_minutes"),
        ("--partition=gpu", "srun does not heed it within one"),
        ("--dependency=afterok:7", "srun does not heed it within one"),
        ("--quiet", "what srun says"),
        ("--exact numactl --localalloc", "'numactl': not an option of srun"),
        ("--", "not an option of srun"),
        ("-m cyclic", "block first"),
    ],
)
def test_what_the_chain_cannot_live_with_is_refused_with_what_does_it_instead(
    words: str, reason: str
) -> None:
    assert reason in refusal(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--container-image=/a b.sqsh", "--no-container-mount-home"],
        ["--container-image", "/a.sqsh", "--container-mounts", "/a:/b"],
        ["--mpi=pmix", "--cpu-bind", "cores", "-u"],
        ["--gpus-per-task=1", "--gpu-bind=closest", "--mem=0"],
        ["--distribution=block:cyclic"],
        ["--unbuffered", "--input", "none", "--job-name=mine"],
    ],
)
def test_all_else_is_handed_on(words: list[str]) -> None:
    assert refusal(*words) == ""


def test_an_option_and_its_value_in_one_word_are_told_apart() -> None:
    """As a line of slurm.sbatch; srun would know no such option, and no attempt could begin."""
    assert "write ['--container-image', '/a.sqsh']" in refusal("--container-image /a.sqsh")


def test_the_refusal_names_the_key(tmp_path) -> None:
    values = config_values("run", tmp_path, tmp_path, "a.tar", slurm={"srun_args": ["--label"]})
    with pytest.raises(ConfigError, match=r"slurm\.srun_args: --label: "):
        validate(values, "test")


def test_the_job_that_makes_an_index_asks_for_no_gpus_and_no_certain_nodes() -> None:
    """It has one node, and Slurm refuses more of them than that."""
    assert sbatch.for_one_node(["--exclusive", "--gres=gpu:a100:8", "-w n1,n2", "--mem-per-gpu=9G"]) == [
        "--exclusive"
    ]
    assert srun.without_gpus(["--gpus-per-task", "1", "--mpi", "none", "--gpu-bind=none"]) == [
        "--mpi",
        "none",
    ]
