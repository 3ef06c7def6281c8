"""The benchmarks run, and say in JSON what they promise; what they find on a model this small means
nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.making import run_program

SAVE = {"blocking_seconds", "total_seconds", "gigabytes"}
TRAINING, WAITING = SAVE | {"hidden_seconds", "step_seconds"}, SAVE | {"cpu_seconds_per_gigabyte"}


def bench(folder: Path, what: str, *options: object) -> dict:
    done = run_program("tools.bench", what, *options, "--rounds", 1, "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


def positive(figures: dict[str, float]) -> bool:
    return all(
        value > 0
        for name, value in figures.items()
        if name not in ("hidden_seconds", "largest_mel_difference")
    )


@pytest.mark.slow
def test_saving_and_loading_are_measured(tmp_path: Path) -> None:
    found = bench(tmp_path, "checkpoint", "--model", "sandbox")
    fields = {
        "earwitness": TRAINING,
        "dcp": TRAINING,
        "deepspeed": WAITING,
        "earwitness sync": WAITING,
        "dcp sync": WAITING,
    }
    assert {method: set(about["median"]) for method, about in found["save"].items()} == fields
    assert set(found["load"]) == {"earwitness 2 -> 2", "deepspeed 2 -> 2", "earwitness 2 -> 3"}
    assert all(positive(about["median"]) and positive(about["first"]) for about in found["save"].values())
    assert all(positive(about["median"]) for about in found["load"].values())
    assert set(found["aims"]) == {"blocking", "load"}


@pytest.mark.slow
def test_exports_are_measured(tmp_path: Path) -> None:
    found = bench(tmp_path, "export", "--model", "sandbox")
    for about in found["export"].values():
        assert set(about["median"]) == {
            "total_seconds",
            "import_seconds",
            "work_seconds",
            "peak_gigabytes",
        } and positive(about["median"])
    assert set(found["aims"]) == {"export time", "export work", "export memory"}


@pytest.mark.slow
def test_starts_are_measured(tmp_path: Path) -> None:
    found = bench(tmp_path, "index", "--samples", 2000, "--shards", 20, "--procs", 2)
    assert set(found["first start"]["merge"]["median"]) == {"seconds", "peak_megabytes"}
    assert set(found["later start"]) == {"ranks 1", "ranks 2"}
    assert all(about["median"][aim] > 0 for about in found["later start"].values() for aim in found["aims"])


@pytest.mark.slow
def test_readers_are_measured(tmp_path: Path) -> None:
    found = bench(
        tmp_path,
        "data",
        "--clips",
        32,
        "--format",
        "flac-10s-16k-mono",
        "--place",
        "local",
        "--place",
        "s3-far",
    )
    readers = {"earwitness", "waveforms", "webdataset"} | {
        name for name in ("datasets", "litdata") if f"skipped {name}" not in found
    }
    assert set(found["data"]) == {
        f"flac-10s-16k-mono, {place}, {reader}" for place in ("local", "s3-far") for reader in readers
    }
    for name, about in found["data"].items():
        figures = about["median"]
        assert positive(figures) and figures["distinct_samples"] == 32
        assert "waveforms" in name or figures["largest_mel_difference"] < 1e-3
