"""Whatever happens between a shard on S3 and its reader: the bytes are those that were indexed, or the
message says why they did not come."""

from __future__ import annotations

import asyncio
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import pytest
from fsspec.callbacks import Callback

from configs.errors import ConfigError, DataError, ShardError
from configs.schema import Source
from data import retry, storage
from data.index import index_shard
from data.location import Location, open_filesystem
from data.retry import STATS, Limits
from data.sources import Shard
from data.upload import upload
from tools.sandbox import faults, s3
from tools.sandbox.faults import Fault, Proxy

T = TypeVar("T")
MB = 1 << 20
SIZE = 6 * MB
START, END = 1000, SIZE - 5
QUICK = Limits(
    answer=1.0,
    stall=0.6,
    window=0.8,
    rate=64e3,
    hedge=0.3,
    give_up=4.0,
    warn=1.0,
    first_pause=0.02,
    longest_pause=0.1,
)


@dataclass
class Bucket:
    """An object behind a proxy."""

    server: s3.Server
    proxy: Proxy
    content: bytes

    def location(self, name: str = "a.tar", tag: str = "", **options: object) -> Location:
        keys = {
            "key": self.server.access_key,
            "secret": self.server.secret_key,
            "endpoint_url": self.proxy.endpoint,
            **options,
        }
        return Location(f"s3://faults/{name}", json.dumps(keys), tag)

    def put(self, name: str, content: bytes) -> str:
        """Store an object; returns its ETag."""
        return str(self.server.client().put_object(Bucket="faults", Key=name, Body=content)["ETag"])


@pytest.fixture(scope="module")
def bucket(s3_server: s3.Server) -> Iterator[Bucket]:
    s3_server.client().create_bucket(Bucket="faults")
    with faults.serve(s3_server.endpoint) as proxy:
        bucket = Bucket(s3_server, proxy, os.urandom(SIZE))
        bucket.put("a.tar", bucket.content)
        storage.read(bucket.location(), 0, 10)  # the session is there
        yield bucket


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    if not os.environ.get("EARWITNESS_REAL_LIMITS"):  # docs/data.md has the figures of those
        monkeypatch.setattr(retry, "LIMITS", QUICK)
    bucket.proxy.set()
    STATS.clear()


LIMIT = 300 if os.environ.get("EARWITNESS_REAL_LIMITS") else 40
"""Seconds until a case counts as one that never ends."""
PASSING = {
    "reset in the body": (Fault("reset", after=MB), "resumed"),
    "reset in the body, six times": (Fault("reset", after=MB // 2, times=6), "resumed"),
    "reset at every MB": (Fault("reset", after=MB, times=0), "resumed"),
    "reset before the body": (Fault("reset", times=3), "retries"),
    "the end comes early": (Fault("close", after=3 * MB, times=2), "resumed"),
    "no answer": (Fault("hang", seconds=60, times=1), "hedge_won"),
    "no answer, four times": (Fault("hang", seconds=60, times=4), "retries"),
    "the body stalls, twice": (Fault("stall", after=2 * MB, seconds=60, times=2), "resumed"),
    "a byte every 5 s, twice": (Fault("trickle", after=MB, seconds=5, times=2), "resumed"),
    "a byte every 0.5 s, twice": (Fault("trickle", after=MB, seconds=0.5, times=2), "resumed"),
    "503, eight times": (Fault("503", times=8), "retries"),
    "503, forty times": (Fault("503", times=40), "retries"),
    "500, three times": (Fault("500", times=3), "retries"),
    "expired keys, eight times": (Fault("400", times=8), "retries"),
    "a late first byte": (Fault("delay", seconds=8), "hedge_won"),
    "nobody listens for 2 s": (Fault("refuse", seconds=2), "retries"),
    **(
        {"nobody listens for 20 s": (Fault("refuse", seconds=20), "retries")}
        if os.environ.get("EARWITNESS_REAL_LIMITS")
        else {}
    ),
}


def in_time(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns. One that goes on for ever is left alone, and fails."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        pytest.fail(f"it goes on after {seconds:g} s, with {dict(STATS)}")


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_read_through(bucket: Bucket, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, shows = PASSING[name]
    # It must come whole on a busy machine, too; `in_time` ends a read that goes on for ever.
    patient = replace(retry.LIMITS, give_up=max(LIMIT, retry.LIMITS.give_up))
    if shows == "hedge_won":  # by a second request that has its time
        patient = replace(patient, answer=max(10, patient.answer))
    monkeypatch.setattr(retry, "LIMITS", patient)
    bucket.proxy.set(fault)
    began = time.perf_counter()
    assert in_time(LIMIT, lambda: storage.read(bucket.location(), START, END)) == bucket.content[START:END]
    print(f"{name:32} {time.perf_counter() - began:5.2f} s  {dict(STATS)}")
    assert bucket.proxy.hits[fault] >= (fault.times or 5) or shows == "hedge_won"
    assert STATS[shows] and STATS["bytes"] == END - START  # no byte is fetched twice


def test_no_byte_is_asked_for_again(bucket: Bucket) -> None:
    bucket.proxy.set(Fault("reset", after=MB))
    storage.read(bucket.location(), START, END)
    first, second = [ranges for method, _, ranges in bucket.proxy.requests if method == "GET"]
    assert (
        first == f"bytes={START}-{END - 1}"
        and START < int(second.removeprefix("bytes=").partition("-")[0]) <= START + MB
    )


def test_of_many_readers_at_once_all_get_theirs_while_one_in_ten_requests_fails(bucket: Bucket) -> None:
    kinds = [
        Fault("reset", times=0, share=0.04, after=20_000),
        Fault("503", times=0, share=0.04),
        Fault("delay", times=0, share=0.02, seconds=1),
    ]
    bucket.proxy.set(*kinds)
    places = [(start, start + 60_000) for start in range(0, SIZE - 60_000, 30_000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: storage.read(bucket.location(), *place), places))
    assert found == [bucket.content[start:end] for start, end in places]
    assert sum(bucket.proxy.hits.values()) > 5


FINAL = {
    "403": (Fault("403", times=0), "access denied (403 AccessDenied)", "credentials"),
    "404": (Fault("404", times=0), "it does not exist", "bucket and name"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_does_not_pass_is_told_at_once(bucket: Bucket, name: str) -> None:
    fault, reason, advice = FINAL[name]
    bucket.proxy.set(fault)
    with pytest.raises(DataError) as caught:
        storage.read(bucket.location(), START, END)
    assert all(words in str(caught.value) for words in ("s3://faults/a.tar", reason, advice))
    assert bucket.proxy.hits[fault] <= 2  # once more with keys that are read anew


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("none.tar", {}, "it does not exist"),
        ("a.tar", {"secret": "wrong"}, "access denied (403 SignatureDoesNotMatch)"),
        ("a.tar", {"key": "unknown"}, "access denied (403 InvalidAccessKeyId)"),
    ],
)
def test_wrong_names_and_keys(bucket: Bucket, name: str, options: dict[str, str], said: str) -> None:
    for look in (lambda where: storage.read(where, 0, 9), storage.stat):
        with pytest.raises(DataError) as caught:
            look(bucket.location(name, **options))
        assert said.split(" (")[0] in str(caught.value) and "Traceback" not in str(caught.value)
        assert "wrong" not in str(caught.value)  # no secret is told


def test_names_endpoints_and_options_that_cannot_be_are_told_at_once(bucket: Bucket) -> None:
    for place, said in (
        (Location("s3://a bucket/a.tar", bucket.location().options), "Invalid bucket name"),
        (bucket.location(endpoint_url="127.0.0.1:9000"), "Invalid endpoint: 127.0.0.1:9000"),
        (bucket.location(bogus=3), "bogus"),
    ):
        for look in (lambda place: storage.read(place, 0, 9), storage.stat):
            with pytest.raises(DataError, match=rf"{place.url}: cannot .*{said}"):
                look(place)


def test_a_size_that_does_not_come_is_asked_for_again(bucket: Bucket) -> None:
    for fault in (Fault("far", seconds=60), Fault("400", times=3)):
        bucket.proxy.set(fault)
        began = time.monotonic()
        assert storage.stat(bucket.location()).size == SIZE
        assert bucket.proxy.hits[fault] == fault.times and time.monotonic() - began < 20


def test_many_objects_of_a_folder_are_looked_at_by_its_list(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {
        f"many/{number:02d}.tar": bucket.put(f"many/{number:02d}.tar", bytes(number + 1))
        for number in range(40)
    }
    bucket.put("few/a.tar", b"")
    places = [bucket.location(name) for name in (*tags, "many/none.tar", "few/a.tar", "few/none.tar")]
    wanted = [storage.Stat(number + 1, tag) for number, tag in enumerate(tags.values())] + [
        None,
        storage.find(bucket.location("few/a.tar")),
        None,
    ]
    bucket.proxy.set()
    assert storage.find_all(places) == wanted
    assert {path for method, path, _ in bucket.proxy.requests if method == "HEAD"} == {
        "/faults/few/a.tar",
        "/faults/few/none.tar",
    }

    def forbidden(path: str, **_: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(open_filesystem(places[0])[0], "ls", forbidden)
    assert storage.find_all(places) == wanted


def test_a_hub_that_is_away_is_tried_again_and_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = Location("hf://datasets/a/b/x.tar", json.dumps({"endpoint": "http://127.0.0.1:9"}))
    with pytest.raises(
        ShardError, match=r"hf://datasets/a/b/x\.tar: cannot read its size: \d s without progress"
    ):
        storage.stat(place)


def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(bucket: Bucket) -> None:
    old, new = os.urandom(2 * MB), os.urandom(2 * MB)
    tag = bucket.put("b.tar", old)
    assert storage.stat(bucket.location("b.tar")).tag == tag
    assert storage.read(bucket.location("b.tar", tag), 0, MB) == old[:MB]
    bucket.proxy.set(Fault("stall", after=MB // 2, seconds=10))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read, bucket.location("b.tar", tag), 0, 2 * MB)
        while not bucket.proxy.hits:
            time.sleep(0.01)
        bucket.put("b.tar", new)
        with pytest.raises(DataError, match="replaced since it was indexed"):
            reading.result()


def test_an_object_that_became_shorter(bucket: Bucket) -> None:
    with pytest.raises(DataError, match="shorter than it was"):
        storage.read(bucket.location(), SIZE + 5, SIZE + 10)


def test_where_nothing_comes_for_long_it_ends_with_what_was_tried(
    bucket: Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket.proxy.set(Fault("503", times=0))
    began = time.monotonic()
    with pytest.raises(
        ShardError,
        match=(
            r"s3://faults/a.tar: cannot read bytes 1000-\d+: \d s without progress, \d+ failures, the last:"
            r" .*SlowDown"
        ),
    ):
        storage.read(bucket.location(), START, END)
    assert QUICK.give_up < time.monotonic() - began < QUICK.give_up + 3
    assert "goes on trying" in capfd.readouterr().err  # before it gives up


def test_keys_that_were_changed_are_read_anew(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rotation does: the file has other keys now, and those that were read at the start are refused."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    place = Location("s3://faults/a.tar", json.dumps({"endpoint_url": bucket.proxy.endpoint}))
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = gone\n", encoding="utf-8")
    with pytest.raises(DataError, match="access denied"):
        storage.read(place, START, START + 9)
    file.write_text(
        f"[default]\naws_access_key_id = {bucket.server.access_key}\naws_secret_access_key ="
        f" {bucket.server.secret_key}\n",
        encoding="utf-8",
    )
    assert storage.read(place, START, START + 9) == bucket.content[START : START + 9]


def test_over_http_what_passes_is_tried_again_and_what_does_not_is_told(bucket: Bucket) -> None:
    def place(name: str) -> Location:
        url = bucket.server.client().generate_presigned_url(
            "get_object", Params={"Bucket": "faults", "Key": name}
        )
        return Location(url.replace(bucket.server.endpoint, bucket.proxy.endpoint))

    bucket.proxy.set(Fault("reset", after=1000, times=2), Fault("503", times=2))
    assert storage.read(place("a.tar"), START, START + 50_000) == bucket.content[START : START + 50_000]
    assert STATS["retries"] == 4
    with pytest.raises(DataError, match=r"none\.tar\?.* it does not exist"):
        storage.read(place("none.tar"), 0, 9)


def test_a_quick_index_does_not_ask_for_each_header(bucket: Bucket, tmp_path: Path) -> None:
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w", encoding="utf-8") as archive:
        for number in range(200):
            for ending, size in (("flac", 70_000), ("json", 20)):
                member = tarfile.TarInfo(f"clip{number}.{ending}")
                member.size = size
                archive.addfile(member, BytesIO(bytes(size)))
    bucket.put("clips.tar", content.getvalue())
    sidecar = index_shard(
        Shard(Source(name="sounds", shards=["x"]), bucket.location("clips.tar")), tmp_path, full=False
    )
    assert len(sidecar.table) == 200 and STATS["requests"] < 15


def test_several_buckets_with_several_owners_in_one_run(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"ours": (bucket.server.access_key, bucket.server.secret_key), "theirs": ("somebody", "else")}
    profiles = [
        f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        for name, (key, secret) in keys.items()
    ]
    (tmp_path / "credentials").write_text("\n".join(profiles), encoding="utf-8")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    ours, theirs = (
        Location("s3://faults/a.tar", json.dumps({"endpoint_url": bucket.proxy.endpoint, "profile": name}))
        for name in keys
    )
    for _ in range(2):
        assert storage.read(ours, 0, 9) == bucket.content[:9]
        with pytest.raises(DataError, match="access denied") as caught:
            storage.read(theirs, 0, 9)
        assert "else" not in str(caught.value)


def test_an_upload_that_goes_on_is_not_given_up(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the time without progress, not how long it all takes."""
    (tmp_path / "file").write_bytes(bucket.content)
    took: list[str] = []
    place = bucket.location("copy.tar")
    filesystem, _ = open_filesystem(place)
    put = filesystem._put_file

    async def slow(file: str, path: str, callback: Callback) -> None:
        await asyncio.sleep(QUICK.give_up / 2 + 0.2)
        callback.relative_update(1)
        took.append(path)
        if len(took) < 3:
            raise OSError("reset")
        await put(file, path)

    monkeypatch.setattr(filesystem, "_put_file", slow)
    upload(tmp_path / "file", place)
    assert len(took) == 3 and storage.read(place, 0, SIZE) == bucket.content


def test_folders_that_match_are_listed_or_it_is_an_error(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one/a-1.tar", "one/b.txt", "two/a-2.tar", "two/deep/a-3.tar"):
        bucket.put(f"sets/{name}", b"x")
        (tmp_path / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / name).write_text("x", encoding="utf-8")
    for place in (bucket.location("sets/*/a-*.tar"), Location(f"{tmp_path}/sets/*/a-*.tar")):
        found = storage.glob(place)
        assert [one.url.rpartition("/sets/")[2] for one in found] == ["one/a-1.tar", "two/a-2.tar"] and {
            one.options for one in found
        } == {place.options}
    everything = storage.glob(Location(f"{tmp_path}/sets/**/*.tar"))
    assert [one.url.rpartition("/sets/")[2] for one in everything] == [
        "one/a-1.tar",
        "two/a-2.tar",
        "two/deep/a-3.tar",
    ]

    def unreadable(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage.os, "scandir", unreadable)
    with pytest.raises(DataError, match="cannot read the list of shards: access denied"):
        storage.glob(Location(f"{tmp_path}/sets/*/a-*.tar"))


def test_a_local_shard_that_changes_under_a_run_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(b"old")
    place = Location(str(file), tag=storage.stat(Location(str(file))).tag)
    assert storage.read(place, 0, 3) == b"old"
    file.write_bytes(b"new")
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match=r"a\.tar: was changed since the run began"):
        storage.read(place, 0, 3)


def test_a_fault_that_does_not_exist_is_refused_with_those_that_do() -> None:
    assert Fault.parse("reset,after=1000000,times=6") == Fault("reset", after=1_000_000, times=6)
    for text in ("earthquake", "reset,when=now", "reset,after=soon"):
        with pytest.raises(ConfigError, match="503 "):
            Fault.parse(text)
