"""What a tool writes to S3 is there whole, or not there at all, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from configs.errors import ConfigError, run_command
from data import location
from tests.making import ROOT, make_clips, run_program
from tools.output import new_folder
from tools.pack import pack
from tools.sandbox import faults, s3

MB = 1 << 20


class Bucket:
    """What lies in a bucket of its own, complete and begun."""

    def __init__(self, server: s3.Server) -> None:
        self.client, self.environment = server.client(), server.environment
        self.client.create_bucket(Bucket="written")

    def objects(self, prefix: str) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket="written", Prefix=f"{prefix}/")
        keys = [item["Key"] for item in listed.get("Contents", [])]
        return {key.removeprefix(f"{prefix}/"): self._content(key) for key in keys}

    def begun(self, prefix: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        listed = self.client.list_multipart_uploads(Bucket="written", Prefix=f"{prefix}/")
        return [item["Key"] for item in listed.get("Uploads", [])]

    def empty(self, prefix: str) -> bool:
        return not self.objects(prefix) and not self.begun(prefix)

    def _content(self, key: str) -> bytes:
        return self.client.get_object(Bucket="written", Key=key)["Body"].read()


@pytest.fixture(scope="module")
def bucket(s3_server: s3.Server) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(location, "_open", {})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips for four shards, and one that is rejected."""
    table = make_clips(tmp_path_factory.mktemp("clips"), range(60), ("wav",))
    with table.open("a", encoding="utf-8") as file:
        file.write("absent.wav,A bell.,CC0\n")
    return table


def test_a_pack_on_s3_is_the_pack_in_a_folder(bucket: Bucket, table: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "out", "s3://written/pack/"):
        done = run_program("tools.pack", table, out, "--shard-mb", 1)
        assert done.returncode == 0 and "60 samples in 4 shards, 1 rows rejected" in done.stdout, done.stderr
    assert bucket.objects("pack") == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_pack_that_is_ended_after_a_shard_was_uploaded_leaves_nothing(
    bucket: Bucket, table: Path, s3_server: s3.Server
) -> None:
    waits = table.with_name("waits.csv")
    waits.write_bytes(table.read_bytes() + b"waits.wav,A bell.,CC0\n")
    os.mkfifo(table.with_name("waits.wav"))  # nobody writes into it
    with faults.serve(s3_server.endpoint) as proxy:
        command = [sys.executable, "-m", "tools.pack", waits, "s3://written/ended", "--shard-mb", "1"]
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        # A shell lets what it starts in the background ignore Ctrl-C.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heed) as process:
            while ("PUT", "/written/ended/shard-000000.tar") not in {each[:2] for each in proxy.requests}:
                with suppress(subprocess.TimeoutExpired):
                    pytest.fail(f"tools.pack ended with {process.wait(0.05)}")
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert process.returncode == 130 and bucket.empty("ended")


def test_what_is_there_already_is_not_written_over(bucket: Bucket, table: Path) -> None:
    bucket.client.put_object(Bucket="written", Key="full/mine.txt", Body=b"precious")
    done = run_program("tools.pack", table, "s3://written/full")
    assert done.returncode == 2
    assert "s3://written/full: exists and is not empty (mine.txt, ...); choose another place" in done.stderr
    assert bucket.objects("full") == {"mine.txt": b"precious"}


@pytest.mark.parametrize(
    ("out", "env", "said"),
    [
        ("s3://no-bucket/a", {}, "cannot read what is there: it does not exist (NoSuchBucket)"),
        (
            "s3://written/a",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            "cannot read what is there: access denied (403 SignatureDoesNotMatch)",
        ),
        ("gs://bucket/a", {}, "is written to a folder or to s3://"),
        ("s3://", {}, "names no bucket"),
        (
            "s3://written/a",
            {"AWS_ENDPOINT_URL": "127.0.0.1:9000"},
            "cannot read what is there: Invalid endpoint: 127.0.0.1:9000. Check",
        ),
    ],
)
def test_where_nothing_can_be_written_no_row_is_packed(
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    env: dict[str, str],
    said: str,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as done:
        run_command(lambda: pack(table, out))
    printed = capsys.readouterr()
    assert done.value.code in (2, 3) and f"{out}: {said}" in printed.err, printed.err
    assert "absent.wav" not in printed.out


def test_a_url_with_a_password_is_refused_and_not_repeated(table: Path) -> None:
    with pytest.raises(ConfigError, match="URLs with passwords or signatures are not taken") as refused:
        pack(table, "s3://me:hunter2@written/a")
    assert "hunter2" not in str(refused.value)


def test_the_last_file_is_uploaded_last_and_large_ones_in_parts(
    bucket: Bucket, s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.serve(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with new_folder("s3://written/export", last="config.json") as output:
            assert bucket.empty("export")
            (output.folder / "config.json").write_text("{}", encoding="utf-8")
            with (output.folder / "model.safetensors").open("wb") as file:
                file.truncate(110 * MB)
            (output.folder / "vocab.json").write_text("[]", encoding="utf-8")
        sent = [
            path.removeprefix("/written/export/").partition("?")[0]
            for method, path, _ in proxy.requests
            if method == "PUT"
        ]
    assert sent == ["model.safetensors"] * (len(sent) - 2) + ["vocab.json", "config.json"] and len(sent) > 4
    assert {name: len(content) for name, content in bucket.objects("export").items()} == {
        "config.json": 2,
        "model.safetensors": 110 * MB,
        "vocab.json": 2,
    }
    assert not bucket.begun("export") and not output.folder.exists()


@pytest.mark.parametrize("old", [True, False])
def test_what_a_killed_run_has_begun_is_aborted_after_a_day(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Younger uploads may be those of a run that lives."""
    bucket.client.create_multipart_upload(Bucket="written", Key=f"begun-{old}/model.safetensors")
    monkeypatch.setattr("tools.output.ABANDONED", timedelta(0) if old else timedelta(days=1))
    with new_folder(f"s3://written/begun-{old}") as made:
        (made.folder / "config.json").write_text("{}", encoding="utf-8")
    assert bucket.begun(f"begun-{old}") == ([] if old else [f"begun-{old}/model.safetensors"])
    assert set(bucket.objects(f"begun-{old}")) == {"config.json"}


PROGRAM = """
import asyncio
import signal
import s3fs
from tools.output import new_folder

# A shell lets what it runs in the background ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
call = s3fs.S3FileSystem._call_s3

async def never_complete(self, method, *arguments, **options):
    await asyncio.sleep(3600 if method == "complete_multipart_upload" else 0)
    return await call(self, method, *arguments, **options)

s3fs.S3FileSystem._call_s3 = never_complete
with new_folder("s3://written/stopped", last="config.json") as output:
    (output.folder / "a.json").write_text("{}")
    with (output.folder / "model.safetensors").open("wb") as file:
        file.truncate(200 << 20)
    (output.folder / "config.json").write_text("{}")
"""


def test_ctrl_c_in_the_middle_of_an_upload_leaves_nothing(bucket: Bucket) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    ) as process:
        while "stopped/model.safetensors" not in bucket.begun("stopped"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode and bucket.empty("stopped")
