"""Shards that are copied to a cluster's disk are the bucket's, byte for byte, whatever happens on the way;
and a run cannot tell them apart."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError, DataError
from configs.load import load
from data import storage
from data.index import index_shard
from data.location import Location
from data.merged import TRAINING, Index, merge
from data.sources import expand
from tests.making import ROOT, config_values, make_clips, run_program
from tools import stage
from tools.sandbox import faults, s3
from tools.sandbox.faults import Fault, Proxy


@dataclass
class Bucket:
    """Shards behind a proxy."""

    server: s3.Server
    proxy: Proxy
    content: dict[str, bytes]

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment | {"AWS_ENDPOINT_URL": self.proxy.endpoint}

    def read_bytes(self) -> int:
        """How many bytes were asked for since the faults were set."""
        total = 0
        for method, _, byte_range in self.proxy.requests:
            if method == "GET" and byte_range:
                start, end = byte_range.removeprefix("bytes=").split("-")
                total += int(end) + 1 - int(start)
        return total


@pytest.fixture(scope="module")
def bucket(s3_server: s3.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("staged")
    table = make_clips(folder / "clips", range(60), ("wav",))
    packed = run_program("tools.pack", table, folder / "shards", "--shard-mb", 1)
    assert packed.returncode == 0, packed.stderr
    content = {path.name: path.read_bytes() for path in sorted((folder / "shards").glob("*.tar"))}
    client = s3_server.client()
    client.create_bucket(Bucket="staged")
    for name, shard in content.items():
        client.put_object(Bucket="staged", Key=f"set/{name}", Body=shard)
    assert len(content) >= 3
    with faults.serve(s3_server.endpoint) as proxy:
        yield Bucket(s3_server, proxy, content)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("data.location._open", {})
    bucket.proxy.set()


def write_config(folder: Path, model: Path, name: str = "mine.yaml", **source: object) -> Path:
    values = config_values("run", folder, model, "s3://staged/set/*.tar")
    values["data"]["sources"][0].update(source)
    (folder / name).write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / name


def held(folder: Path) -> dict[str, bytes]:
    """The content of the copies in a folder, by name."""
    others = (stage.STAGED, stage.LOCK)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in others}


def digest(config: Path, index: Path, *overrides: str) -> str:
    shards = [shard for source in load(config, overrides).data.sources for shard in expand(source)]
    merge(shards, [index_shard(shard, index, full=False) for shard in shards], index)
    return Index(index / TRAINING, load(config).data.sources).digest


def test_a_run_takes_the_copies_for_what_they_are_copies_of(
    bucket: Bucket, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(bucket.content)
    config = write_config(
        tmp_path,
        model,
        shards=[f"s3://staged/set/{name}" for name in names[1:]],
        validation={"shards": [f"s3://staged/set/{names[0]}"]},
    )
    stage.stage([str(config)], tmp_path / "disk")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:5] == ["python", "-m", "launch", "train", str(config)]
    overrides = command[5:]
    assert overrides == [
        f"data.sources.sounds.shards=[{tmp_path}/disk/sounds/*.tar]",
        f"data.sources.sounds.validation.shards=[{tmp_path}/disk/sounds/validation/*.tar]",
    ]
    assert held(tmp_path / "disk/sounds/validation") == {names[0]: bucket.content[names[0]]}
    assert digest(config, tmp_path / "a") == digest(config, tmp_path / "b", *overrides)


def test_copies_are_whole_whatever_happens_to_the_answers(bucket: Bucket, tmp_path: Path) -> None:
    bucket.proxy.set(
        Fault("reset", after=200_000, times=3), Fault("503", times=3), Fault("close", after=300_000, times=2)
    )
    stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    assert held(tmp_path / "disk") == bucket.content and sum(bucket.proxy.hits.values()) == 8


def test_bits_that_flip_on_the_way_are_found_by_a_full_index(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    indexed = run_program("tools.index", "s3://staged/set/*.tar", "--index-dir", tmp_path / "index")
    assert indexed.returncode == 0, indexed.stderr
    name = min(bucket.content)
    bucket.proxy.set(Fault("flip", after=50_000, key=name))
    with pytest.raises(DataError, match=rf"set/{name}: sample '.*' did not come as it was indexed"):
        stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    assert held(tmp_path / "disk") == bucket.content


def test_one_at_a_time_copies_into_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with (
        stage._alone(tmp_path / "disk"),
        pytest.raises(ConfigError, match=r"disk: another tools\.stage is copying into it"),
    ):
        stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    (tmp_path / "disk" / stage.STAGED).write_text("{", encoding="utf-8")  # damaged: it is made anew
    stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    assert held(tmp_path / "disk") == bucket.content


def test_after_a_kill_only_what_was_not_complete_is_copied_again(bucket: Bucket, tmp_path: Path) -> None:
    """The last shard comes slowly; it is killed when the others are there."""
    disk, last = tmp_path / "disk", max(bucket.content)

    def only_the_last_is_missing() -> bool:
        is_under_way = (disk / f"{last}.part").exists()
        return is_under_way and len(stage._staged(disk)) == len(bucket.content) - 1

    bucket.proxy.set(Fault("pace", times=0, rate=100_000, key=last))
    with subprocess.Popen(
        [sys.executable, "-m", "tools.stage", "s3://staged/set/*.tar", disk],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    ) as process:
        while not only_the_last_is_missing():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert f"{last}.part" in held(disk) and last not in held(disk)
    bucket.proxy.set()
    stage.stage(["s3://staged/set/*.tar"], disk)
    assert held(disk) == bucket.content and bucket.read_bytes() == len(bucket.content[last])
    bucket.proxy.set()
    stage.stage(["s3://staged/set/*.tar"], disk)
    assert bucket.read_bytes() == 0


def test_a_shard_that_was_replaced_is_copied_anew(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, content = bucket.server.client(), dict(bucket.content)
    for name, shard in content.items():
        client.put_object(Bucket="staged", Key=f"replaced/{name}", Body=shard)
    stage.stage(["s3://staged/replaced/*.tar"], tmp_path / "disk")
    name = min(content)
    content[name] = bytes(len(content[name]))  # of the same size
    client.put_object(Bucket="staged", Key=f"replaced/{name}", Body=content[name])
    bucket.proxy.set()
    stage.stage(["s3://staged/replaced/*.tar"], tmp_path / "disk")
    assert held(tmp_path / "disk") == content and bucket.read_bytes() == len(content[name])
    assert f"s3://staged/replaced/{name}: was replaced since it was copied" in capsys.readouterr().out


def test_a_shard_that_is_replaced_while_it_is_copied_is_not_mixed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, read = bucket.server.client(), storage.read

    def put(byte: bytes) -> None:
        client.put_object(Bucket="staged", Key="mixed/a.tar", Body=byte * 1_000_000)

    def read_and_replace(location: Location, start: int, end: int) -> bytes:
        block = read(location, start, end)
        put(b"2")
        return block

    monkeypatch.setattr(storage, "read", read_and_replace)
    for block in (1 << 18, 1 << 20):  # seen by If-Match of the second block; seen at the end
        monkeypatch.setattr(stage, "BLOCK", block)
        put(b"1")
        with pytest.raises(DataError, match=r"mixed/a\.tar: .*was replaced .*start"):
            stage.stage(["s3://staged/mixed/a.tar"], tmp_path / "disk")
        assert list(held(tmp_path / "disk")) == ["a.tar.part"]


def test_what_cannot_be_staged_is_told_before_a_byte_is_copied(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "mine.tar").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"disk: holds mine\.tar, .*remove it"):
        stage.stage(["s3://staged/set/*.tar"], disk)
    with pytest.raises(ConfigError, match="s3:/staged/copy: is no folder"):
        stage.stage(["s3://staged/set/*.tar"], Path("s3://staged/copy"))
    (disk / "mine.tar").rename(tmp_path / "file")
    with pytest.raises(ConfigError, match="file: cannot be made"):
        stage.stage(["s3://staged/set/*.tar"], tmp_path / "file")
    with pytest.raises(
        DataError, match=r"no-bucket/a\.tar: cannot read its size: it does not exist.*Check bucket"
    ):
        stage.stage(["s3://no-bucket/a.tar"], disk)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"disk: 0\.00 GB are to be copied, 0\.00 GB are free; make room"):
        stage.stage(["s3://staged/set/*.tar"], disk)
    assert not held(disk) and not bucket.read_bytes()


def test_bytes_that_the_disk_does_not_give_back_are_named(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_crc32", lambda path: 1)
    with pytest.raises(stage.ShardError, match=r"\.tar\.part: does not hold what was written"):
        stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
    assert not (tmp_path / "disk" / stage.STAGED).exists()
    assert all(name.endswith(".part") for name in held(tmp_path / "disk"))


def test_a_disk_that_fills_up_meanwhile_is_told_of(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage.os, "fsync", full)
    words = "disk: cannot be written: No space left on device; mend it and start again"
    with pytest.raises(stage.ShardError, match=words):
        stage.stage(["s3://staged/set/*.tar"], tmp_path / "disk")
