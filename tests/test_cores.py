"""Decoding gets the cores that there are, jobs ask for their GPUs' share, and too few are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.cores import cores_of_rank, decoding_threads, remark_on_cores
from configs.load import validate
from configs.run.folder import RunDir
from configs.schema import Data, RunConfig, Slurm
from launch.remarks import on_cores
from slurm.submit import cores_per_task, script_text
from tests.making import config_values

DATA = Data(sources=[{"name": "a", "shards": ["a.tar"]}])


@pytest.mark.parametrize(
    ("bound_to", "of_node", "of_job", "ranks", "cores"),
    [
        (96, 96, None, 8, 12),  # not bound: the ranks share the node
        (96, 96, 48, 4, 12),  # or what the job has of it
        (12, 96, 96, 8, 12),  # bound by Slurm
        (2, 96, 96, 8, 2),
        (2, 2, 16, 2, 1),  # a node that says that it has more than there are
        (2, 2, None, 8, 1),
        (16, 16, None, 1, 16),
        (4, 4, None, 8, 1),
    ],
)
def test_a_rank_has_what_it_is_bound_to_or_its_share(
    monkeypatch: pytest.MonkeyPatch, bound_to: int, of_node: int, of_job: int | None, ranks: int, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound_to)))
    monkeypatch.setattr(os, "cpu_count", lambda: of_node)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if of_job is not None:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(of_job))
    assert cores_of_rank() == cores


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3), (9, 8), (64, 8)])
def test_decoding_takes_all_cores_but_one_up_to_eight(cores: int, threads: int) -> None:
    assert decoding_threads(DATA, cores) == threads
    assert decoding_threads(DATA.model_copy(update={"threads": 5}), cores) == 5


@pytest.mark.parametrize(("cores", "clips"), [(1, 22), (2, 22), (3, 44), (4, None), (12, None)])
def test_too_few_cores_are_told_with_the_figure_and_the_setting(cores: int, clips: int | None) -> None:
    remark = remark_on_cores(DATA, cores)
    if clips is None:
        assert remark == ""
    else:
        assert f"feed about {clips} clips" in remark and "slurm.cpus_per_task" in remark


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the cluster's sinfo prints is what this file holds; without it sinfo fails."""
    folder = tmp_path / "slurm-commands"
    folder.mkdir()
    for name, body in {"sinfo": f"cat {folder}/nodes", "sbatch": "exit 0", "squeue": "exit 0"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "nodes"


CLUSTER = """\
cpu*|64|(null)
gpu|96|gpu:a100:8(S:0-1)
gpu|128|gpu:h100:8,nvme:1
small|32|gpu:4
small|8|(null)
"""


@pytest.mark.parametrize(
    ("settings", "cores"),
    [
        ({"partition": "gpu"}, 12),  # of the nodes that have fewer
        ({"partition": "gpu", "gpus_per_node": 2}, 12),
        ({"partition": "gpu", "gpus_per_node": 8, "tasks_per_node": 4}, 24),
        ({"partition": "gpu", "cpus_per_task": 3}, 3),
        ({"partition": "small", "gpus_per_node": 4}, 8),
        ({"partition": "small,gpu", "gpus_per_node": 4}, 8),
        ({"partition": "small"}, None),  # no node there has eight
        ({"gpus_per_node": 8}, None),  # the default partition has none
        ({"partition": "gpu", "gpus_per_node": 0}, None),
        ({"partition": "gpu", "gpus_per_node": 0, "cpus_per_task": 2}, 2),
    ],
)
def test_each_process_asks_for_its_gpus_share_of_the_cores(
    sinfo: Path, settings: dict[str, object], cores: int | None
) -> None:
    sinfo.write_text(CLUSTER, encoding="utf-8")
    assert cores_per_task(Slurm(**settings)) == cores


def config_of(folder: Path, **slurm: object) -> RunConfig:
    values = config_values("run", folder, folder, "a.tar", data={"threads": None}, slurm=slurm)
    return validate(values, "test")


def test_the_script_asks_for_them_and_where_slurm_does_not_tell_for_none(sinfo: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, partition="gpu")
    script = script_text(config, RunDir(tmp_path), tmp_path)
    assert "#SBATCH --cpus-per-task" not in script
    sinfo.write_text(CLUSTER, encoding="utf-8")
    assert "#SBATCH --cpus-per-task=12\n" in script_text(config, RunDir(tmp_path), tmp_path)


def test_submit_says_how_many_and_whether_they_are_too_few(sinfo: Path, tmp_path: Path) -> None:
    (not_known,) = on_cores(config_of(tmp_path, partition="gpu"))
    assert not_known.startswith("note: ") and "set slurm.cpus_per_task" in not_known
    sinfo.write_text(CLUSTER, encoding="utf-8")
    (enough,) = on_cores(config_of(tmp_path, partition="gpu"))
    assert enough == "cores for each process: 12 (slurm.cpus_per_task)"
    _, too_few = on_cores(config_of(tmp_path, partition="gpu", cpus_per_task=2))
    assert too_few.startswith("note: decoding threads: 1, on 2 cores")
    assert list(on_cores(config_of(tmp_path, gpus_per_node=0))) == []
