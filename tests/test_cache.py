"""What was read once from a bucket comes from the node's disk: whole, of the same object, and never more than
was allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import cache, storage
from data.cache import BLOCK, Cache
from data.location import Location
from tests.making import ROOT

SIZE = 5 * BLOCK + 1234
CONTENT = os.urandom(SIZE)
SHARD = Location("s3://bucket/a.tar", "{}", "tag", SIZE)
Asked = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The ranges that the bucket was asked for."""
    ranges: Asked = []

    def read(location: Location, start: int, end: int) -> bytes:
        assert 0 <= start < end <= location.size
        ranges.append((start, end))
        return CONTENT[start:end]

    monkeypatch.setattr(storage, "read", read)
    return ranges


@pytest.mark.parametrize(
    ("start", "end"), [(0, 10), (BLOCK - 1, BLOCK + 1), (100, SIZE), (SIZE - 1, SIZE), (2 * BLOCK, 3 * BLOCK)]
)
def test_a_range_comes_as_it_is_and_the_second_time_from_the_disk(
    tmp_path: Path, asked: Asked, start: int, end: int
) -> None:
    assert Cache(tmp_path, 1).read(SHARD, start, end) == CONTENT[start:end]
    assert asked == [(start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, SIZE))], (
        "whole blocks, in one request"
    )
    assert Cache(tmp_path, 1).read(SHARD, start, end) == CONTENT[start:end] and len(asked) == 1


def test_only_what_is_missing_is_asked_for(tmp_path: Path, asked: Asked) -> None:
    kept = Cache(tmp_path, 1)
    kept.read(SHARD, 2 * BLOCK, 2 * BLOCK + 1)
    assert kept.read(SHARD, 0, SIZE) == CONTENT
    assert asked[1:] == [(0, 2 * BLOCK), (3 * BLOCK, SIZE)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"",
    ],
)
def test_a_damaged_block_is_read_anew(tmp_path: Path, asked: Asked, damage: Callable[[bytes], bytes]) -> None:
    kept = Cache(tmp_path, 1)
    kept.read(SHARD, 0, 10)
    (file,) = tmp_path.glob("*/*")
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read(SHARD, 0, 10) == CONTENT[:10] and len(asked) == 2
    assert kept.read(SHARD, 0, 10) == CONTENT[:10] and len(asked) == 2, "and is mended"


def test_what_replaced_an_object_is_another_object(tmp_path: Path, asked: Asked) -> None:
    kept = Cache(tmp_path, 1)
    for location in (
        SHARD,
        Location(SHARD.url, "{}", "other", SIZE),
        Location("s3://bucket/b.tar", "{}", "tag", SIZE),
    ):
        kept.read(location, 0, 10)
    assert len(asked) == 3


def test_it_holds_no_more_than_it_may_and_drops_what_was_not_used_for_longest(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ABANDONED", 0.0)
    kept = Cache(tmp_path, 3.5 * BLOCK / 1e9)
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab/left-0.1.2.tmp").write_bytes(b"by a process that was killed")
    for number in (0, 1, 2, 0, 3):
        kept.read(SHARD, number * BLOCK, number * BLOCK + 1)
        time.sleep(0.01)  # the clock of file systems ticks
        assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 3.5 * BLOCK + 16
    assert not list(tmp_path.glob("*/*.tmp"))
    asked.clear()
    for number in (0, 2, 3):
        kept.read(SHARD, number * BLOCK, number * BLOCK + 1)
    assert not asked, "block 1 was not used for longest"


def test_a_disk_that_fails_is_told_of_once_and_done_without(
    tmp_path: Path, asked: Asked, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    kept = Cache(tmp_path / "file", 1)
    for _ in range(2):
        assert kept.read(SHARD, 0, SIZE) == CONTENT
    assert capfd.readouterr().err.count("goes on without keeping what it reads") == 1


WORKER = """
import sys
from pathlib import Path
from data import storage
from data.cache import BLOCK, Cache
from data.location import Location
content = Path(sys.argv[2]).read_bytes()
storage.read = lambda location, start, end: content[start:end]
kept = Cache(Path(sys.argv[1]), 4 * BLOCK / 1e9)
shard = Location("s3://bucket/a.tar", "{}", "tag", len(content))
print("begins", flush=True)
for number in range(int(sys.argv[3])):
    start = number * 7919 * 100 % (len(content) - BLOCK)
    assert kept.read(shard, start, start + BLOCK) == content[start : start + BLOCK]
"""


def test_processes_share_it_whoever_is_killed_meanwhile(tmp_path: Path, asked: Asked) -> None:
    (tmp_path / "content").write_bytes(CONTENT)

    def start(rounds: int) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            WORKER,
            str(tmp_path / "cache"),
            str(tmp_path / "content"),
            str(rounds),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    killed, living = start(10**9), start(300)
    assert killed.stdout is not None and killed.stdout.readline() == "begins\n"
    kept = Cache(tmp_path / "cache", 4 * BLOCK / 1e9)
    with ThreadPoolExecutor(4) as pool:
        assert set(
            pool.map(
                lambda number: kept.read(SHARD, number, number + BLOCK) == CONTENT[number : number + BLOCK],
                range(0, 4 * BLOCK, 77_777),
            )
        ) == {True}
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert living.wait() == 0
    assert living.stdout is not None
    living.stdout.close()
