"""Which shards a pattern names: what exists as it is written is no pattern."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from configs.errors import DataError
from data.sources import expand, locate
from tests.making import config_values, make_clips, run_program
from tests.shards import source
from tools.caption import caption
from tools.export import export
from tools.index import index
from tools.inspect import inspect
from tools.pack import pack
from tools.sandbox import s3
from tools.stage import stage

NAMES = (
    "a.tar",
    "what?.tar",
    "a{1}.tar",
    "a{1,2}.tar",
    "a[1].tar",
    "b*.tar",
    "back\\slash.tar",
    "c{.tar",
    " d .tar",
)
FOLDERS = ("plain", "set [v2]", "set {a}", "set {a,b}", "what?", "st*r", "back\\slash", "[[x]", "v{0..3}")


def found(*patterns: Path | str, **options: object) -> list[str]:
    return [shard.location.url for shard in expand(source(*patterns, **options))]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of that name with files of many names."""
    folder: Path = tmp_path / request.param
    folder.mkdir()
    for name in (*NAMES, "x-0.tar", "x-1.tar"):
        (folder / name).write_bytes(b"x")
    # What the names would match as patterns.
    for other in ("set v", "set a", "star", "whats", "x"):
        (tmp_path / other).mkdir(exist_ok=True)
        (tmp_path / other / "x-0.tar").write_bytes(b"other")
    return folder


def test_what_exists_is_taken_as_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        assert found(folder / name) == [f"{folder}/{name}"] == found(f"file://{folder}/{name}")
    monkeypatch.chdir(folder)
    for name in NAMES:
        assert found(name) == [f"{folder}/{name}"]


@pytest.mark.parametrize(
    "pattern", ["x-*.tar", "x-?.tar", "x-[01].tar", "x-{0..1}.tar", "{x-0,x-1}.tar", "**/x-*.tar"]
)
def test_only_what_is_after_a_folder_that_exists_is_a_pattern(
    folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"{folder}/x-0.tar", f"{folder}/x-1.tar"]
    assert found(f"{folder}/{pattern}") == wanted
    monkeypatch.chdir(folder)
    assert found(pattern) == wanted
    monkeypatch.chdir(folder.parent)
    assert found(f"{folder.name}/{pattern}") == wanted


def test_patterns_of_folders_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        (tmp_path / f"home [1]/set-{number}").mkdir(parents=True)
        (tmp_path / f"home [1]/set-{number}/x{number}.tar").write_bytes(b"x")
    wanted = [f"{tmp_path}/home [1]/set-{number}/x{number}.tar" for number in range(2)]
    monkeypatch.setenv("HOME", f"{tmp_path}/home [1]")
    for pattern in ("set-*/x*.tar", "set-{0..1}/x?.tar", "*/*.tar"):
        assert found(f"~/{pattern}") == wanted == found(f"{tmp_path}/home [1]/{pattern}")
    with pytest.raises(DataError, match=r"home \[1\]/\*\.tar matches no shard"):
        found("~/*.tar")


def test_a_backslash_is_one_but_before_a_brace(tmp_path: Path) -> None:
    for name in ("a\\b-0.tar", "a\\b-1.tar", "ab-0.tar", "{0..1}x.tar"):
        (tmp_path / name).write_bytes(b"x")
    assert found(f"{tmp_path}/a\\b-{{0..1}}.tar") == [f"{tmp_path}/a\\b-0.tar", f"{tmp_path}/a\\b-1.tar"]
    assert found(f"{tmp_path}/a\\b-*.tar") == [f"{tmp_path}/a\\b-0.tar", f"{tmp_path}/a\\b-1.tar"]
    assert found(f"{tmp_path}/\\{{0..1\\}}x.tar") == [f"{tmp_path}/{{0..1}}x.tar"]


@pytest.fixture(scope="module")
def bucket(s3_server: s3.Server) -> Iterator[dict[str, object]]:
    """Storage options for objects of such names."""
    client = s3_server.client()
    client.create_bucket(Bucket="patterns")
    for key in ("a[1].tar", "a1.tar", "b{1,2}.tar", "set [v2]/x-0.tar", "set [v2]/x-1.tar", "set v/x-0.tar"):
        client.put_object(Bucket="patterns", Key=key, Body=b"x")
    yield {
        "key": s3_server.access_key,
        "secret": s3_server.secret_key,
        "endpoint_url": s3_server.endpoint,
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a[1].tar", ["a[1].tar"]),
        ("b{1,2}.tar", ["b{1,2}.tar"]),
        ("a[0-9].tar", ["a1.tar"]),
        ("set [v2]/x-*.tar", ["set [v2]/x-0.tar", "set [v2]/x-1.tar"]),
        ("set [v2]/x-{0..1}.tar", ["set [v2]/x-0.tar", "set [v2]/x-1.tar"]),
        ("set [v]/x-*.tar", ["set v/x-0.tar"]),
        ("no{0..1}.tar", ["no0.tar", "no1.tar"]),
    ],
)
def test_in_a_bucket_it_is_the_same(bucket: dict[str, object], pattern: str, names: list[str]) -> None:
    # A config would not take keys.
    of_bucket = source("x").model_copy(update={"storage_options": bucket})
    urls = [place.url for place in locate([f"s3://patterns/{pattern}"], of_bucket)]
    assert urls == [f"s3://patterns/{name}" for name in names]


def test_all_commands_work_in_a_folder_with_brackets_and_braces_in_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set [v2] {a}"
    table = make_clips(folder / "clips", range(24), ("wav",))
    monkeypatch.chdir(folder)
    pack(table, "packed")
    values = config_values("run", folder, model, "packed/*.tar", optim={"max_steps": 1, "lr": 1e-3})
    values["data"] |= {"index_dir": "beside", "cache_dir": f"{folder}/cache"}
    values["checkpoint"] = {"mirror": f"{folder}/mirror"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    index(["mine.yaml"])
    assert "24 samples" in capsys.readouterr().out
    assert list((folder / "packed/index").glob("*.parquet"))
    inspect(["packed/*.tar"], index_dir="beside")
    assert "24 of 24 samples" in capsys.readouterr().out
    stage(["mine.yaml"], Path("copies [1]"))
    _, override = shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:]
    assert yaml.safe_load(override.partition("=")[2]) == [f"{folder}/copies [1]/sounds/*.tar"]
    done = run_program("launch", "train", "mine.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "mirror").glob("run/checkpoints/*/manifest.json"))
    export(Path("run"), "exported")
    capsys.readouterr()
    caption(Path("exported"), [Path("clips")])
    assert capsys.readouterr().out.count("clip00") == 24
