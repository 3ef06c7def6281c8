"""What a disk refuses is told in words: what, where, and what to type; and what only shows the training does
not end it."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.disk import naming, words_of_disk
from configs.errors import EarwitnessError, run_command
from configs.load import validate
from configs.run.events import AttemptBegan, LeftOut, RankFailed
from configs.run.files import write_atomic
from configs.run.folder import RunDir
from configs.run.lease import claim, holder
from launch import worker
from launch.last_words import LastWords
from launch.status import status
from tests.making import config_values
from tools.output import new_folder
from trainer.curves import Curves


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device: make room there (`df -h {folder}`"),
        (errno.EDQUOT, "Disk quota exceeded: the quota there is used up"),
        (errno.EROFS, "Read-only file system: that file system may only be read"),
        (errno.ESTALE, "Stale file handle: the network file system does not know it any more"),
        (errno.EMFILE, "Too many open files: this process may open no more files: `ulimit -n 65536`"),
        (errno.EIO, "Input/output error: the disk or the way to it fails (`dmesg | tail`)"),
        (errno.EISDIR, "Is a directory: a folder has the name of a file: move it away (`mv {folder}/a"),
        (errno.ENOTDIR, "Not a directory: a file stands where a folder should be"),
    ],
)
def test_what_a_disk_refuses_is_told_with_the_file_and_what_to_type(
    tmp_path: Path, number: int, said: str
) -> None:
    with pytest.raises(OSError) as refused, naming(tmp_path / "a"):
        raise OSError(number, "in some words")
    assert words_of_disk(refused.value).startswith(f"{tmp_path}/a: {said.format(folder=tmp_path)}")


def test_errors_of_libraries_in_rust_and_of_connections_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(OSError) as refused, naming(tmp_path / "a"):
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")
    assert words_of_disk(refused.value).startswith(f"{tmp_path}/a: No space left on device: make room")
    with pytest.raises(ConnectionRefusedError) as no_file, naming(tmp_path / "a"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert not words_of_disk(no_file.value) and no_file.value.filename is None
    assert not words_of_disk(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
    assert not words_of_disk(ValueError("a bug"))


def test_who_owns_a_file_is_told_with_what_the_owner_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o750)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    words = words_of_disk(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a")))
    owner = tmp_path.owner()
    assert words.startswith(f"{tmp_path}/a: Permission denied: {tmp_path} belongs to {owner} (drwxr-x---")
    assert f"you are user 12345. If you are in that group, {owner} types `chmod -R g+rwX {tmp_path}`" in words


def test_a_command_that_a_disk_stops_says_so_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        run_command(lambda: (tmp_path / "absent").read_bytes())
    assert done.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/absent: No such file or directory")


def test_a_ledger_that_takes_a_part_of_a_line_says_so(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.ledger.record(LeftOut(attempt=0, what="before"))
    with room_for(100), pytest.raises(OSError) as refused:
        run.ledger.record(LeftOut(attempt=0, what="a" * 200))
    assert words_of_disk(refused.value).startswith(f"{tmp_path}/events/")
    run.ledger.record(LeftOut(attempt=0, what="after"))
    assert [event.what for event in run.ledger.read().of(LeftOut)] == ["before", "after"]


def test_a_lease_that_could_not_be_written_does_not_hold_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with room_for(0), pytest.raises(OSError) as refused:
        claim(run)
    assert words_of_disk(refused.value).startswith(f"{tmp_path}/leases/attempt-000000.json: ")
    assert holder(run) is None and claim(run).attempt == 0


def test_the_next_user_of_a_shared_folder_can_take_over_a_lease(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        claim(RunDir(tmp_path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "leases/attempt-000000.json").stat().st_mode) == 0o664


def test_curves_wait_for_a_disk_that_has_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = Curves(tmp_path, 0)
    for step in range(9):
        (file,) = tmp_path.iterdir()
        with room_for(file.stat().st_size + 10 if 3 <= step < 6 else 1 << 30):
            curves.scalars({"loss": step}, step)
            curves.flush()
    curves.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "no curves for now, training goes on",
        "the curves go on",
    ]
    assert str(file) in said[0]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(9))


def test_a_folder_that_takes_no_curves_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tensorboard"
    folder.touch()
    curves = Curves(folder, 0)
    for step in range(4):
        if step == 2:
            folder.unlink()
        curves.scalars({"loss": step}, step)
        curves.flush()
    curves.close()
    assert "tensorboard: File exists: something else has that name" in capsys.readouterr().out
    events = EventAccumulator(str(folder)).Reload()
    assert [point.step for point in events.Scalars("loss")] == [3]


def test_a_rank_that_can_write_its_error_nowhere_tells_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "events").touch()
    last_words = LastWords.listen()
    for name, value in last_words.environment.items():
        monkeypatch.setenv(name, value)
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "audit/a.jsonl"))
    assert worker._report(run, 3, 1, error) == 1
    (said,) = last_words.read()
    assert isinstance(said, RankFailed) and (said.attempt, said.rank) == (3, 1)
    assert said.message.startswith(f"{tmp_path}/audit/a.jsonl: No space left on device: make room there")


def test_a_run_whose_folder_was_there_and_cannot_be_written_is_no_mistake_of_the_config(
    tmp_path: Path, model: Path
) -> None:
    config = validate(config_values("run", tmp_path, model, "x.tar"), "test")
    run = RunDir.create(config)
    run.checkpoints.rmdir()
    run.checkpoints.touch()
    with pytest.raises(EarwitnessError, match=r"checkpoints: File exists: .*set run.dir") as refused:
        RunDir.create(config)
    assert refused.value.exit_code == 1


def test_an_output_that_a_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as refused, new_folder(str(tmp_path / "out")) as output, room_for(10):
        (output.folder / "model.safetensors").write_bytes(bytes(100))
    assert words_of_disk(refused.value).startswith(f"{tmp_path}/out: File too large: ")
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_a_folder_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError) as refused:
        write_atomic(tmp_path / "config.yaml", "a: 1")
    assert words_of_disk(refused.value).startswith(
        f"{tmp_path}/config.yaml: Is a directory: a folder has the name of a file: move it away (`mv"
    )


def test_a_ledger_that_may_not_be_seen_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it hide the runs beside it."""
    for name in ("mine", "theirs"):
        run = RunDir(tmp_path / "runs" / name)
        run.ledger.record(AttemptBegan(attempt=0, ranks=1, nodes=["n1"]))

    def closed(folder: Path) -> Iterator[Path]:
        if folder.parent.name == "theirs":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", closed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermissionError):
        run.ledger.read()
    status(None, as_json=False)
    printed = capsys.readouterr()
    assert "mine" in printed.out and "runs/theirs/events: Permission denied: " in printed.err
