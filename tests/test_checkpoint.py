"""Only whole and sound checkpoints are used, and none is lost to a failed write."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from configs.errors import CheckpointError
from trainer import checkpoint
from trainer.checkpoint import Manifest, Reader
from trainer.distributed import World
from trainer.engines import KINDS, Fragment, Update


class OneRank(World):
    """A world of one, without a process group."""

    def sum(self, values):
        return [float(value) for value in values]

    def barrier(self) -> None:
        return


class PlainEngine:
    """An engine whose state is a dict of flat tensors."""

    def __init__(self, step: int) -> None:
        random = torch.Generator().manual_seed(step)
        self.state = {name: {kind: torch.randn(count, generator=random) for kind in KINDS} for name, count in {"a.weight": 6_000_000, "b": 5}.items()}

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, len(tensors["master"]), tensors) for name, tensors in self.state.items()]

    def step(self, lr: float) -> Update:
        raise AssertionError


SHAPES = {"a.weight": [2000, 3000], "b": [5]}


def save(root: Path, step: int, **metrics: float) -> PlainEngine:
    engine = PlainEngine(step)
    checkpoint.save(root, engine, OneRank(0, 1, torch.device("cpu")), Manifest(step, step, {}, metrics), SHAPES, attempt=0)
    return engine


def test_what_was_saved_is_read_back_in_any_slice(tmp_path: Path) -> None:
    engine = save(tmp_path, 3)
    reader = Reader(tmp_path / "step-00000003")
    assert torch.equal(reader("a.weight", "exp_avg", 17, 5_000_001), engine.state["a.weight"]["exp_avg"][17:5_000_001])
    assert reader.tensor("a.weight").shape == (2000, 3000)


def test_files_follow_the_umask_and_hold_no_pickle(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    files = list((tmp_path / "step-00000001").iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert all(file.stat().st_mode & 0o777 == 0o640 for file in files)


@pytest.mark.parametrize("block", [0, 2], ids=["header's block", "later block"])
def test_a_flipped_bit_is_found_in_the_slices_that_are_read(tmp_path: Path, block: int) -> None:
    save(tmp_path, 1)
    file = tmp_path / "step-00000001/rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[block * checkpoint.DIGEST_BLOCK + 12345] ^= 1
    file.write_bytes(content)
    reader = Reader(file.parent)
    with pytest.raises(CheckpointError, match="damaged between bytes"):
        for kind in KINDS:
            reader("a.weight", kind, 0, 6_000_000)


def test_a_truncated_file_or_missing_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    os.truncate(newest / "rank-00000-of-00001.safetensors", 1000)
    with pytest.raises(CheckpointError, match="has 1000 bytes, should have"):
        Reader(newest)
    (newest / "manifest.json").unlink()
    assert [folder.name for folder in checkpoint.find(tmp_path)] == ["step-00000001"]


def test_a_failed_write_leaves_the_earlier_checkpoints_and_says_why(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.a0.tmp").write_text("in the way: a folder cannot be made here")
    with pytest.raises(CheckpointError, match=r"step 2: .*File exists.*Earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert [folder.name for folder in checkpoint.find(tmp_path)] == ["step-00000001"]


def test_the_last_the_best_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([0.9, 0.3, 0.5, 0.6, 0.7, 0.8], 1):
        save(tmp_path, step, **{"validation/loss": loss})
    (tmp_path / "step-00000099.a0.tmp").mkdir()
    checkpoint.retain(tmp_path, keep_last=2, keep_every=3, metric="validation/loss")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 3, 5, 6)]
    assert checkpoint.best_of(tmp_path, "validation/loss") == (0.3, tmp_path / "step-00000002")


def test_a_loss_that_is_no_number_is_not_the_best_and_damage_does_not_end_the_run(tmp_path: Path) -> None:
    for step, loss in enumerate([0.5, float("nan"), 0.1], 1):
        save(tmp_path, step, **{"validation/loss": loss})
    os.truncate(tmp_path / "step-00000003/rank-00000-of-00001.safetensors", 1000)
    assert checkpoint.best_of(tmp_path, "validation/loss") == (0.5, tmp_path / "step-00000001")


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step 2.*make room"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
