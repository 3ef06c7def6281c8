"""`launch train` inside a batch script, an allocation or under a launcher; which code a rank runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import launch.__main__
from configs.errors import ConfigError
from configs.run.events import AttemptBegan
from configs.run.folder import PACKAGES, RunDir
from launch import local, snapshot, worker
from launch.last_words import LastWords
from launch.launchers import refuse_launchers
from slurm import job
from tests.leftovers import LEFTOVERS

IN_STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (IN_STEP | {"SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"WORLD_SIZE": "4", "CROSS_SIZE": "1"}, "deepspeed"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"PMI_SIZE": "4"}, "mpirun"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"HOROVOD_SIZE": "4"}, "horovodrun"),
        ({"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "0"}, "flux"),
    ],
)
def test_one_of_several_tasks_is_told_that_training_starts_its_own(
    variables: dict[str, str], launcher: str
) -> None:
    with pytest.raises(ConfigError, match=f"call it once, with --procs 4, and not under {launcher},"):
        refuse_launchers(variables)


@pytest.mark.parametrize(
    "variables",
    [
        LEFTOVERS,
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # salloc
        IN_STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n1
        IN_STEP | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "5"},  # srun -n8 --pty bash
        {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500"},  # exported by hand
    ],
)
def test_the_only_task_or_none_trains_as_on_any_machine(variables: dict[str, str]) -> None:
    refuse_launchers(variables)


def test_a_launcher_is_told_of_before_its_own_option_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepspeed and torch.distributed.launch hand on --local_rank. A run may be called `train`."""
    asked: list[list[str]] = []
    monkeypatch.setattr(launch.__main__, "app", lambda: asked.append(sys.argv))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setattr(sys, "argv", ["launch", "--local_rank=0", "train", "x.yaml"])
    with pytest.raises(ConfigError, match="starts its own ranks"):
        launch.__main__.main()
    monkeypatch.setattr(sys, "argv", ["launch", "status", "train"])
    launch.__main__.main()
    assert asked == [["launch", "status", "train"]]


def test_ranks_of_this_machine_are_no_tasks_of_the_job_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of another launcher, nor do they take code from where they are started."""
    for name, value in (LEFTOVERS | {"SLURM_CPUS_ON_NODE": "2", "SLURM_CONF": "/etc/slurm.conf"}).items():
        monkeypatch.setenv(name, value)
    started: list[dict[str, str]] = []
    monkeypatch.setattr(
        local.subprocess, "Popen", lambda *arguments, env, **options: started.append(env) or None
    )
    run = RunDir(tmp_path)
    run.attempt_logs(0).mkdir(parents=True)
    local._start(run, 0, 1, 2, 4000, LastWords.listen())
    (env,) = started
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == ("1", "2", "4000")
    assert env["EARWITNESS_DIE_WITH"] == str(os.getpid())
    assert env["CUDA_VISIBLE_DEVICES"] == "5", "a wish of the person's"
    assert (env["SLURM_CPUS_ON_NODE"], env["SLURM_CONF"]) == ("2", "/etc/slurm.conf")
    kept = {"EARWITNESS_DIE_WITH", "CUDA_VISIBLE_DEVICES", *local.rank_environment(0, 1, 1)}
    assert not (set(LEFTOVERS) - kept) & set(env)
    assert env["PYTHONSAFEPATH"] == "1" and env["PYTHONPATH"].startswith(str(snapshot.ROOT))


def test_a_task_of_a_job_is_who_srun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was in the shell that submitted it."""
    told = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    for name, value in (LEFTOVERS | told).items():
        monkeypatch.setenv(name, value)
    job.join_job()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["3", "1", "4", "2", "10.0.0.1"]
    assert os.environ["MASTER_PORT"] != "29500"


def test_a_rank_that_was_told_of_other_ranks_than_the_attempt_has_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would train alone, save when srun ends it, and count as asked to save."""
    run = RunDir(tmp_path)
    run.ledger.record(AttemptBegan(attempt=0, ranks=4, nodes=["n1", "n2"], job="7", chain="7"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert worker._node_of_each_rank(run, 0) == ["n1", "n1", "n2", "n2"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="told that there are 1, but attempt 0 has 4"):
        worker._node_of_each_rank(run, 0)


def test_a_rank_that_gets_other_code_than_the_runs_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.check(snapshot.ROOT)
    code, others = tmp_path / "code", tmp_path / "others"
    for folder in (*(code / package for package in PACKAGES), others / "trainer"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    for package in PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(code)
    snapshot.check(code)
    monkeypatch.syspath_prepend(others)
    with pytest.raises(ConfigError, match=f"^trainer: this process gets {others}/trainer, not the run's own"):
        snapshot.check(code)


def test_a_cache_of_torch_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker._set_up_cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    worker._set_up_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert capsys.readouterr().err.startswith(f"TORCHINDUCTOR_CACHE_DIR: goes on without it: {tmp_path}/file")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    worker._set_up_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache")
