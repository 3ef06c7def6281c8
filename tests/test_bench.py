"""The benchmarks run, and their JSON has what they promise; figures of a model this small mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.making import run_program

SAVE = {"blocking_seconds", "total_seconds", "gigabytes"}
TRAINING = SAVE | {"hidden_seconds", "step_seconds"}
"""Figures of a method that trains on while it saves."""
WAITING = SAVE | {"cpu_seconds_per_gigabyte"}


def bench(folder: Path, name: str, *options: object) -> dict:
    done = run_program("tools.bench", name, *options, "--rounds", 1, "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


def positive(figures: dict[str, float]) -> bool:
    may_be_zero = ("hidden_seconds", "largest_mel_difference")
    return all(value > 0 for name, value in figures.items() if name not in may_be_zero)


@pytest.mark.slow
def test_saving_and_loading_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "checkpoint", "--model", "sandbox")
    saves, loads = result["save"], result["load"]
    assert {method: set(save["median"]) for method, save in saves.items()} == {
        "earwitness": TRAINING,
        "dcp": TRAINING,
        "deepspeed": WAITING,
        "earwitness sync": WAITING,
        "dcp sync": WAITING,
    }
    assert set(loads) == {"earwitness 2 -> 2", "deepspeed 2 -> 2", "earwitness 2 -> 3"}
    assert all(positive(save["median"]) and positive(save["first"]) for save in saves.values())
    assert all(positive(load["median"]) for load in loads.values())
    assert set(result["aims"]) == {"blocking", "load"}


@pytest.mark.slow
def test_exports_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "export", "--model", "sandbox")
    for export in result["export"].values():
        figures = export["median"]
        assert set(figures) == {"total_seconds", "import_seconds", "work_seconds", "peak_gigabytes"}
        assert positive(figures)
    assert set(result["aims"]) == {"export time", "export work", "export memory"}


@pytest.mark.slow
def test_starts_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "index", "--samples", 2000, "--shards", 20, "--procs", 2)
    assert set(result["first start"]["merge"]["median"]) == {"seconds", "peak_megabytes"}
    assert set(result["later start"]) == {"ranks 1", "ranks 2"}
    assert all(start["median"][aim] > 0 for start in result["later start"].values() for aim in result["aims"])


@pytest.mark.slow
def test_readers_are_measured(tmp_path: Path) -> None:
    form = "flac-10s-16k-mono"
    places = ("local", "s3-far")
    options = ["--clips", 32, "--format", form, "--place", places[0], "--place", places[1]]
    result = bench(tmp_path, "data", *options)
    installed = {name for name in ("datasets", "litdata") if f"skipped {name}" not in result}
    readers = {"earwitness", "waveforms", "webdataset"} | installed
    assert set(result["data"]) == {f"{form}, {place}, {reader}" for place in places for reader in readers}
    for name, reading in result["data"].items():
        figures = reading["median"]
        assert positive(figures) and figures["distinct_samples"] == 32
        assert "waveforms" in name or figures["largest_mel_difference"] < 1e-3


@pytest.mark.slow
def test_balance_is_measured() -> None:
    options = ["--samples", 20_000, "--steps", 64, "--rounds", 1, "--json"]
    done = run_program("tools.bench", "balance", *options)
    assert done.returncode == 0, done.stderr
    by_ranks = {name: table["median"] for name, table in json.loads(done.stdout)["balance"].items()}
    assert set(by_ranks) == {f"ranks {ranks}" for ranks in (2, 4, 8, 16, 32, 64)}
    eight, all_alone = by_ranks["ranks 8"], by_ranks["ranks 64"]
    assert eight["fullest_balanced"] < 1.05 < eight["fullest_as_shuffled"]
    assert 0 < eight["share_moved"] < 0.15 and all_alone["share_moved"] == 0
