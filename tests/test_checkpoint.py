"""Only whole and sound checkpoints are used, none is lost to a failed write, and training waits for no
disk."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import CheckpointError, EarwitnessError, PeerFailed
from configs.run.lease import Superseded
from configs.schema import Checkpoint
from trainer import checkpoint, writer
from trainer.checkpoint import Manifest, Reader
from trainer.distributed import World
from trainer.engines import KINDS, Fragment
from trainer.writer import Commit, Snapshot, Writer

SHAPES = {"a.weight": [2000, 3000], "b": [5], "c": [7, 3]}


@dataclass
class Meeting:
    """Where ranks that are threads of this process meet."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = [self.values[rank] for rank in range(self.size)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads: what they agree on is the real thing, without process groups."""

    meeting: Meeting

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def barrier(self) -> None:
        self.meeting.exchange(self.rank, None)


class PlainEngine:
    """An engine whose state is random tensors of a seed, divided at random."""

    def __init__(self, step: int, rank: int = 0, size: int = 1) -> None:
        numbers, cuts = torch.Generator().manual_seed(step), random.Random(f"{step} {size}")
        self.state, self.mine = {}, []
        for name, shape in SHAPES.items():
            count = torch.Size(shape).numel()
            self.state[name] = {kind: torch.randn(count, generator=numbers) for kind in KINDS}
            bounds = [0, *sorted(cuts.randint(0, count) for _ in range(size - 1)), count]
            if bounds[rank] < bounds[rank + 1]:
                self.mine.append((name, bounds[rank], bounds[rank + 1]))

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, start, end, {kind: self.state[name][kind][start:end] for kind in KINDS})
            for name, start, end in self.mine
        ]


def on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns or raises on each of `size` ranks."""

    def outcome(world: World) -> Any:
        try:
            return work(world)
        except EarwitnessError as error:
            return error

    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(outcome, [Threads(rank, size, torch.device("cpu"), meeting) for rank in range(size)])
        )


def save(
    root: Path, step: int, size: int = 1, metrics: dict[str, float] | None = None, **hooks: Any
) -> list[Any]:
    """Save a checkpoint and wait for it; the outcome on each rank."""

    def work(world: World) -> None:
        one = Writer(root, 0, PlainEngine(step, world.rank, size), world, SHAPES, **hooks)
        one.save(Manifest(step=step, updates=step, identity={}, metrics=metrics or {}))
        one.finish()

    return on_ranks(size, work)


def only(outcomes: list[Any]) -> None:
    """Raise what the one rank has raised."""
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_what_ranks_have_saved_is_read_back_in_any_slice(tmp_path: Path, size: int) -> None:
    """However it was divided: by rank, by random slice, at the borders of fragments and of digested
    blocks."""
    assert save(tmp_path, 3, size) == [None] * size
    reader, state, slices = Reader(tmp_path / "step-00000003"), PlainEngine(3).state, random.Random(size)
    assert reader.verify() == []
    for name, kinds in state.items():
        for kind, whole in kinds.items():
            cuts = sorted(slices.randint(0, len(whole)) for _ in range(6))
            for start, end in [(0, len(whole)), *itertools.pairwise(cuts)]:
                assert torch.equal(reader(name, kind, start, end), whole[start:end]), (name, kind, start, end)
    assert reader.tensor("a.weight").shape == (2000, 3000)


def test_a_rank_reads_only_the_blocks_of_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    checked = []
    original = Reader._check
    monkeypatch.setattr(
        Reader, "_check", lambda self, file, block: checked.append(block) or original(self, file, block)
    )
    Reader(tmp_path / "step-00000001")("a.weight", "master", 0, 1_000_000)
    assert set(checked) <= {0, 1}  # of 5: that with its 4 MB, and the one after, which is read ahead


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the time of the save, though the weights change before the disk has
    taken a byte."""
    engine, go = PlainEngine(1), threading.Event()
    monkeypatch.setattr(
        writer._Job, "_write", lambda job, write=writer._Job._write: go.wait(30) and write(job)
    )
    one = Writer(tmp_path, 0, engine, Threads(0, 1, torch.device("cpu"), Meeting(1)), SHAPES)
    one.save(Manifest(step=1, updates=1, identity={}))
    one.hold()
    for kinds in engine.state.values():
        kinds["master"].zero_()
    assert checkpoint.find(tmp_path) == []
    go.set()
    one.finish()
    assert torch.equal(
        Reader(tmp_path / "step-00000001")("b", "master", 0, 5), PlainEngine(1).state["b"]["master"]
    )


@pytest.mark.parametrize("bytes_of_piece", [1 << 30, 5_000_004])
def test_files_are_the_same_in_whatever_pieces_the_state_lies_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_of_piece: int
) -> None:
    """72 MB of state are one piece, or 15 that begin and end within fragments."""
    monkeypatch.setattr(writer, "PIECE_BYTES", bytes_of_piece)
    save(tmp_path, 1)
    state = PlainEngine(1).state
    whole = torch.cat([state[name][kind] for kind in KINDS for name in SHAPES])
    content = (tmp_path / "step-00000001/rank-00000-of-00001.safetensors").read_bytes()
    assert content[-4 * len(whole) :] == whole.numpy().tobytes()
    assert Reader(tmp_path / "step-00000001").verify() == []


@pytest.mark.parametrize("elements", [1, 7, 30, 1000])
def test_no_piece_of_host_memory_is_larger_than_it_may_be(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Pinned memory is rounded up to powers of two: 9.7 GB in one piece would take 16."""
    monkeypatch.setattr(writer, "PIECE_BYTES", 4 * elements)
    numbers = torch.arange(60.0)
    fragments = [
        Fragment("a", 0, 15, dict(zip(KINDS, numbers[:45].split(15), strict=True))),
        Fragment("b", 2, 7, dict(zip(KINDS, numbers[45:].split(5), strict=True))),
    ]
    snapshot = Snapshot(fragments)
    snapshot.take(fragments)
    _, *pieces = snapshot.contents()
    assert [len(piece) for piece in pieces[:-1]] == [4 * elements] * (len(pieces) - 1)
    assert 0 < len(pieces[-1]) <= 4 * elements
    assert (
        b"".join(pieces)
        == torch.cat([fragment.tensors[kind] for kind in KINDS for fragment in fragments]).numpy().tobytes()
    )


def test_the_thread_that_copies_uses_the_gpu_of_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread begins with GPU 0: there, every other rank would take up memory that rank 0 needs."""
    calls: list[object] = []
    take = Snapshot.take

    def set_device(device: torch.device) -> None:
        calls.append((threading.current_thread().name, device))

    def copied(snapshot: Snapshot, fragments: Sequence[Fragment]) -> None:
        calls.append("copied")
        take(snapshot, fragments)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(Snapshot, "take", copied)
    gpu = torch.device("cuda", 5)
    one = Writer(tmp_path, 0, PlainEngine(1), Threads(0, 1, gpu, Meeting(1)), SHAPES)
    one.save(Manifest(step=1, updates=1, identity={}))
    one.finish()
    assert calls == [("checkpoint", gpu), "copied"]


def test_the_ledger_is_told_of_a_checkpoint_that_is_complete(tmp_path: Path) -> None:
    told: list[Commit] = []
    save(tmp_path, 1, 2, committed=told.append)
    (commit,) = told
    size = sum(file.stat().st_size for file in commit.folder.glob("*.safetensors"))
    assert commit.bytes == size and 0 < commit.blocking_seconds < commit.total_seconds


def test_an_urgent_save_replaces_one_that_has_far_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And waits for one that is nearly there: here, until its file is written but for the sync."""
    for far in (True, False):
        root = tmp_path / str(far)
        world = Threads(0, 1, torch.device("cpu"), Meeting(1))
        one = Writer(root, 0, PlainEngine(1), world, SHAPES)
        if far:
            monkeypatch.setattr(writer, "xxh3_128", lambda one=one: Hesitant(one))
        one.save(Manifest(step=1, updates=1, identity={}))
        if not far:
            job = one._job
            while job.progress < 0.99:
                assert not job.abandoned.wait(0.001)
        monkeypatch.undo()
        one.save(Manifest(step=2, updates=2, identity={}), urgent=True)
        one.finish()
        assert names(root) == (["step-00000002"] if far else ["step-00000001", "step-00000002"])


class Hesitant:
    """A digest that does not go on before the save is given up."""

    def __init__(self, one: Writer) -> None:
        self.one = one

    def update(self, data: memoryview) -> None:
        assert self.one._job is None or self.one._job.abandoned.wait(30)

    def hexdigest(self) -> str:
        return ""


def test_files_follow_the_umask_and_hold_no_pickle(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    files = list((tmp_path / "step-00000001").iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert all(file.stat().st_mode & 0o777 == 0o640 for file in files)


def test_files_belong_to_the_group_of_a_shared_folder(tmp_path: Path) -> None:
    """A folder with the setgid bit, as project folders have."""
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to a group that it is not in")
    os.chown(tmp_path, 0, 12345)
    tmp_path.chmod(0o2770)
    save(tmp_path, 1)
    assert {
        path.stat().st_gid for path in [tmp_path / "step-00000001", *(tmp_path / "step-00000001").iterdir()]
    } == {12345}


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
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert [folder.name for folder in checkpoint.find(tmp_path)] == ["step-00000001"]
    checkpoint.clean(tmp_path, attempt=0)
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_later_attempt_writes_is_not_cleaned_away(tmp_path: Path) -> None:
    """By one that was held up since before it was superseded."""
    for attempt in (2, 3, 4):
        (tmp_path / f"step-00000001.a{attempt}.tmp").mkdir()
    checkpoint.clean(tmp_path, attempt=3)
    assert names(tmp_path) == ["step-00000001.a4.tmp"]


def full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "step-00000002.a0.tmp").mkdir()
    (root / "step-00000002.a0.tmp/rank-00000-of-00001.safetensors").symlink_to("/dev/full")


def no_quota(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exceeded(path: Path, value: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(writer, "write_synced", exceeded)


def in_the_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "step-00000002.a0.tmp").write_text("a folder cannot be made here", encoding="utf-8")


@pytest.mark.parametrize(
    ("cause", "said"),
    [(full_disk, "No space left"), (no_quota, "quota exceeded"), (in_the_way, "File exists")],
)
def test_a_failed_write_says_why_and_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause, said: str
) -> None:
    save(tmp_path, 1)
    cause(tmp_path, monkeypatch)
    with pytest.raises(
        CheckpointError,
        match=(
            rf"(?s)cannot write the checkpoint of step 2.*{said}.*Earlier checkpoints are intact; make room"
        ),
    ):
        only(save(tmp_path, 2))
    assert [folder.name for folder in checkpoint.find(tmp_path)] == ["step-00000001"]
    assert cause is in_the_way or names(tmp_path) == ["step-00000001"]


def test_a_write_that_fails_on_one_rank_is_told_by_that_rank_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "step-00000002.a0.tmp").mkdir()
    (tmp_path / "step-00000002.a0.tmp/rank-00001-of-00003.safetensors").symlink_to("/dev/full")
    first, second, third = save(tmp_path, 2, 3)
    assert isinstance(second, CheckpointError) and "No space left" in str(second)
    assert isinstance(first, PeerFailed) and isinstance(third, PeerFailed)
    assert names(tmp_path) == []


def test_an_attempt_that_was_superseded_while_it_wrote_leaves_nothing(tmp_path: Path) -> None:
    """And says so, rather than that it could not write."""

    def fence() -> None:
        raise Superseded("attempt 7 has taken over this run")

    first, second = save(tmp_path, 2, 2, fence=fence)
    assert isinstance(first, Superseded) and isinstance(second, PeerFailed)
    assert names(tmp_path) == []


def test_the_last_the_best_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([0.9, 0.3, 0.5, 0.6, 0.7, 0.8], 1):
        save(tmp_path, step, metrics={"validation/loss": loss})
    (tmp_path / "step-00000005.damaged").mkdir()
    checkpoint.retain(tmp_path, Checkpoint(keep_last=2, keep_every=3), "validation/loss")
    assert names(tmp_path) == [
        "step-00000002",
        "step-00000003",
        "step-00000005",
        "step-00000005.damaged",
        "step-00000006",
    ]
    assert checkpoint.best_of(tmp_path, "validation/loss") == tmp_path / "step-00000002"
    assert checkpoint.lowest_cost(tmp_path, "validation/loss") == 0.3


def test_a_loss_that_is_no_number_is_not_the_best_and_damage_does_not_end_the_run(tmp_path: Path) -> None:
    for step, loss in enumerate([0.5, float("nan"), 0.1], 1):
        save(tmp_path, step, metrics={"validation/loss": loss})
    os.truncate(tmp_path / "step-00000003/rank-00000-of-00001.safetensors", 1000)
    assert checkpoint.best_of(tmp_path, "validation/loss") == tmp_path / "step-00000001"
    assert checkpoint.lowest_cost(tmp_path, "validation/loss") == 0.5


def test_half_a_deletion_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process ends in the middle of it."""
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *place, **options: None)
    checkpoint.remove(tmp_path / "step-00000001")
    assert names(tmp_path) == ["step-00000001"] and checkpoint.find(tmp_path) == []
    monkeypatch.undo()
    checkpoint.clean(tmp_path, attempt=0)
    assert names(tmp_path) == []
