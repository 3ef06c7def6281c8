"""A run of whose samples too few can be used ends with their reasons, on all ranks, and keeps what it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import ExitCode
from configs.run.events import Progress
from configs.run.folder import RunDir
from tests.forks import Launcher
from tests.making import config_values, run_program
from tests.shards import Members, clip, shard, sound, words
from tests.test_lengths import clips
from trainer.checkpoint import Reader, find


def numbers(count: int) -> Members:
    """Clips whose captions are numbers."""
    return [
        member
        for number in range(count)
        for member in ((f"n{number}.wav", sound(number)), (f"n{number}.json", words(number)))  # type: ignore[arg-type]
    ]


LONG_CAPTION = (("wav", sound()), ("json", words("A bell rings. " * 400)))


def good(count: int) -> Members:
    return [member for number in range(count) for member in clip(f"g{number}", number)]


def config(
    folder: Path,
    model: Path,
    sources: list[dict[str, object]],
    steps: int = 4,
    size: int = 8,
    every: int = 1000,
    **data: object,
) -> dict[str, dict[str, object]]:
    return config_values(
        "run",
        folder,
        model,
        "",
        batch={"global_size": size, "micro_seconds": 4},
        data={"sources": sources, "index_dir": str(folder / "index"), "threads": 1, **data},
        optim={"max_steps": steps, "lr": 1e-3},
        evaluate={"captions": 0, "max_samples": 8},
        checkpoint={"every_steps": every},
    )


def source(name: str, path: Path, **options: object) -> dict[str, object]:
    return {"name": name, "shards": [str(path)], **options}


@pytest.mark.parametrize("procs", [1, 2])
@pytest.mark.parametrize("max_bad_fraction", [0.01, 1.0])
def test_a_run_that_learns_nothing_does_not_finish(
    tmp_path: Path, model: Path, launch: Launcher, procs: int, max_bad_fraction: float
) -> None:
    sources = [source("sounds", shard(tmp_path / "ten.tar", numbers(10)))]
    done = launch(config(tmp_path, model, sources, max_bad_fraction=max_bad_fraction), procs=procs)
    assert done.returncode == ExitCode.DATA and "Traceback" not in done.stderr
    assert "none of the first 8 samples of epoch 1 can be used.\n  8 x the caption" in done.stderr
    assert "e.g. sounds/ten.tar/n" in done.stderr and "loss" not in done.stdout
    run = RunDir(tmp_path / "run")
    assert not find(run.checkpoints)
    assert [event.step for event in run.ledger.read().of(Progress)] == [0]


@pytest.mark.parametrize("procs", [1, 2])
def test_a_source_of_which_nothing_can_be_used_ends_the_run_with_its_last_step_saved(
    tmp_path: Path, model: Path, launch: Launcher, procs: int
) -> None:
    """Four poor clips among twelve good ones, which are two steps: the second one is not taken."""
    sources = [
        source("fine", shard(tmp_path / "fine.tar", good(12))),
        source("poor", shard(tmp_path / "poor.tar", numbers(4))),
    ]
    done = launch(config(tmp_path, model, sources, every=1), procs=procs)
    assert done.returncode == ExitCode.DATA
    assert "source poor: none of its first 4 samples can be used.\n  4 x the caption" in done.stderr
    run = RunDir(tmp_path / "run")
    (saved,) = find(run.checkpoints)
    assert Reader(saved).manifest.step == 1 and not Reader(saved).verify()
    told = run_program("launch", "status", run.path).stdout
    assert "ended: bad config or data: source poor: none of its first 4 samples can be used" in told


def test_steps_that_stay_mostly_empty_end_the_run_and_name_what_would_fill_them(
    tmp_path: Path, model: Path, launch: Launcher
) -> None:
    """Four of five clips are longer than the window, which a quick index does not know."""
    shards = shard(tmp_path / "long.tar", clips([0.3, 2.5, 2.5, 2.5, 2.5] * 3))
    done = launch(config(tmp_path, model, [source("sounds", shards)], steps=110, size=5), procs=2)
    assert "source sounds: 12 of 15 clips (80.0 %), 30.0 s of 30.9 s (97.1 %), are longer" in done.stdout
    assert done.returncode == ExitCode.DATA
    assert "samples of the last 100 steps could not be used: steps are 20% of what" in done.stderr
    assert "12 x the audio has" in done.stderr
    assert "data.overlong=start (or crop)" in done.stderr


def test_what_is_said_of_long_captions_is_not_what_is_said_of_long_clips(
    tmp_path: Path, model: Path, launch: Launcher
) -> None:
    long = [(f"{number}.{ending}", content) for number in range(3) for ending, content in LONG_CAPTION]
    sources = [source("sounds", shard(tmp_path / "long.tar", long))]
    done = launch(config(tmp_path, model, sources, long_caption="skip"))
    assert done.returncode == ExitCode.DATA
    assert "data.long_caption=truncate" in done.stderr and "overlong" not in done.stderr


def test_one_bad_clip_of_few_ends_no_run_wherever_it_is_resumed(
    tmp_path: Path, model: Path, launch: Launcher
) -> None:
    """Nine clips are two steps of eight and one; some attempt begins with the bad one alone, perhaps."""
    shards = shard(tmp_path / "few.tar", [*good(8), *numbers(1)])
    for steps in (1, 2, 20):
        done = launch(config(tmp_path, model, [source("sounds", shards)], steps=steps), procs=2)
        assert done.returncode == 0, done.stderr


def test_a_validation_part_without_a_usable_sample_is_no_best_checkpoint(
    tmp_path: Path, model: Path, launch: Launcher
) -> None:
    held_out = shard(tmp_path / "held-out.tar", numbers(3))
    sources = [
        source("sounds", shard(tmp_path / "good.tar", good(8)), validation={"shards": [str(held_out)]})
    ]
    done = launch(config(tmp_path, model, sources), procs=2)
    assert done.returncode == ExitCode.DATA
    assert "source sounds: none of its 3 validation samples can be used" in done.stderr
    assert "3 x the caption under 'caption' is" in done.stderr
    assert not find(RunDir(tmp_path / "run").checkpoints)


def test_status_shows_what_can_be_used_and_what_cannot(tmp_path: Path, model: Path, launch: Launcher) -> None:
    members = [*good(20), *numbers(2), ("alone.json", words())]
    sources = [source("sounds", shard(tmp_path / "mixed.tar", members))]
    assert launch(config(tmp_path, model, sources)).returncode == 0
    (line,) = [
        line.split()
        for line in run_program("launch", "status", tmp_path / "run").stdout.splitlines()
        if line.startswith(" sounds ")
    ]
    assert line[:8] == ["sounds", "23", "22", "1", "0", "1", "0", "2"] and line[8:11] == ["2", "x", "the"]
    told = json.loads(run_program("launch", "status", tmp_path / "run", "--json").stdout)["samples"]
    (counts,) = told["sources"]
    assert (counts["samples"], counts["training"], counts["unusable"], counts["met_unusable"]) == (
        23,
        22,
        1,
        2,
    )
    assert list(counts["met_reasons"].values()) == [2]

    # Earlier versions did not tell the ledger what there is.
    for file in (tmp_path / "run/events").iterdir():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["event"] != "samples"]
        file.write_text("".join(kept), encoding="utf-8")
    (row,) = [
        line.split()[:8]
        for line in run_program("launch", "status", tmp_path / "run").stdout.splitlines()
        if line.startswith(" sounds ")
    ]
    assert row == ["sounds", *["?"] * 6, "2"]
    assert "1 of 23 samples are left out" in told["left_out"][0]
