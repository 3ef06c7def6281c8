"""What concerns a run as a whole is counted over all of its ranks and attempts: bad samples, tokens of
captions, the best validation loss; and every source has its own style."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperProcessor

from tests.forks import Course, Launcher
from tests.making import audit, config_values
from trainer import checkpoint
from trainer.checkpoint import Reader

LOSSES = {0: 0.9, 1: 0.5, 2: 0.3, 3: 0.4, 4: 0.35, 5: 0.25, 6: 0.6}
"""Validation loss at each step, as `losses_as_listed` has it."""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch: Launcher) -> Course:
    return Course(tmp_path_factory.mktemp("whole"), model, shards, launch)


def values(course: Course, name: str, **sections: dict[str, object]) -> dict[str, Any]:
    own: dict[str, dict[str, object]] = {
        "engine": {"backend": "fsdp2", "dtype": "fp32"},
        "evaluate": {"every_steps": 1000, "captions": 0, "scored": 0, "max_samples": 1},
        "checkpoint": {"every_steps": 1000, "keep_last": 9},
    }
    return config_values(name, course.folder, course.model, course.shards, **own | sections)


def evaluating(course: Course, name: str, steps: int) -> dict[str, Any]:
    """A run that is evaluated after every step."""
    return values(
        course,
        name,
        batch={"global_size": 2, "micro_seconds": 1},
        optim={"max_steps": steps},
        evaluate={"every_steps": 1, "captions": 0, "max_samples": 1},
    )


def rank_1_is_deaf() -> None:
    """In a rank: rank 1 can use no sample."""
    from data import samples
    from data.decode import BadSample

    def deaf(*_: object) -> None:
        raise BadSample("rank 1 is deaf")

    if os.environ["RANK"] == "1":
        samples.decode = deaf


def test_bad_samples_of_any_rank_end_the_run(course: Course) -> None:
    """With the reasons of them all, in the words of rank 0."""
    config = values(course, "deaf")
    config["data"] |= {"max_bad_fraction": 0.001}
    done = course.launch(config, procs=2, before="tests.test_whole_run:rank_1_is_deaf")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "4 of 8 samples could not be used, more than data.max_bad_fraction=0.001 allows" in done.stderr
    assert "4 x rank 1 is deaf, e.g. sounds/shard-" in done.stderr and "Traceback" not in done.stderr


def only_rank_1_sees_quotes() -> None:
    """In a rank: all others take captions without what generation suppresses."""
    from data import samples

    find = samples.find_captions
    if os.environ["RANK"] != "1":
        samples.find_captions = lambda *place: [find(*place)[0].replace('"', "").replace(":", "")]


def test_what_any_rank_has_seen_in_captions_can_be_said(course: Course) -> None:
    before = "tests.test_whole_run:only_rank_1_sees_quotes"
    assert course.launch(values(course, "quotes"), procs=2, before=before).returncode == 0
    newest = checkpoint.find(course.run("quotes").checkpoints)[0]
    assert len(Reader(newest).manifest.caption_tokens) == 2


def losses_as_listed() -> None:
    """In a rank: the validation loss is that of LOSSES."""
    from trainer.evaluate import Evaluator
    from trainer.loop import Training

    evaluate = Training.evaluate

    def evaluated(training: Any) -> Any:
        Evaluator.loss = lambda *_: {"validation/loss": LOSSES[training.state.step]}
        return evaluate(training)

    Training.evaluate = evaluated


def test_a_loss_that_is_the_lowest_cost_all_attempts_is_saved(course: Course) -> None:
    """And no other one is, between the ends of two attempts."""
    for steps in (3, 6):
        config = evaluating(course, "best", steps)
        done = course.launch(config, procs=2, before="tests.test_whole_run:losses_as_listed")
        assert done.returncode == 0, done.stderr
    manifests = [Reader(folder).manifest for folder in checkpoint.find(course.run("best").checkpoints)]
    assert [(one.step, one.reason) for one in reversed(manifests)] == [
        (1, "best"),
        (2, "best"),
        (3, "finished"),
        (5, "best"),
        (6, "finished"),
    ]
    assert checkpoint.lowest_cost(course.run("best").checkpoints, "validation/loss") == LOSSES[5]


def rank_1_cannot_read_checkpoints_for_the_best() -> None:
    """In a rank: the file system of rank 1 does not answer when it looks for the best loss."""
    if os.environ["RANK"] == "1":
        for name in ("best_of", "lowest_cost"):
            setattr(checkpoint, name, unreadable)


def unreadable(*_: object) -> None:
    raise OSError("rank 1 looks for the best by itself")


def test_one_rank_looks_for_the_best_loss_and_tells_all(course: Course) -> None:
    """Ranks that saw different ones would part ways at the next save."""
    before = "tests.test_whole_run:rank_1_cannot_read_checkpoints_for_the_best"
    for steps in (1, 2):
        done = course.launch(evaluating(course, "told", steps), procs=2, before=before)
        assert done.returncode == 0, done.stderr


def prompts_are_told() -> None:
    """In a rank: what captions of the panel are prompted with is printed."""
    from trainer.captioning import Generator

    caption = Generator.__call__

    def told(generator: Any, clips: Any) -> Any:
        for clip in clips:
            print("prompt:", clip.prompt, flush=True)
        return caption(generator, clips)

    Generator.__call__ = told


def test_the_panel_is_prompted_with_the_style_of_each_clips_source(course: Course) -> None:
    config = values(
        course,
        "panel",
        batch={"global_size": 1, "micro_seconds": 1},
        optim={"max_steps": 1},
        evaluate={"every_steps": 1000, "captions": 3, "max_samples": 1},
    )
    (plain,) = config["data"]["sources"]
    styles = {"short": "In a few words.", "long": "At length.", "plain": None}
    config["data"]["sources"] = [{**plain, "name": name, "style": style} for name, style in styles.items()]
    done = course.launch(config, before="tests.test_whole_run:prompts_are_told")
    assert done.returncode == 0, done.stderr
    tokenizer = WhisperProcessor.from_pretrained(course.model).tokenizer
    prompts = [tokenizer.get_prompt_ids(style).tolist() if style else [] for style in styles.values()]
    told = [line for line in done.stdout.splitlines() if line.startswith("prompt: ")]
    assert sorted(told[:3]) == sorted(f"prompt: {prompt}" for prompt in prompts)


def test_a_save_is_due_after_some_minutes_whatever_the_step(course: Course) -> None:
    config = values(
        course,
        "minutes",
        batch={"global_size": 2, "micro_seconds": 1},
        optim={"max_steps": 3},
        checkpoint={"every_steps": 1000, "every_minutes": 1e-9, "keep_last": 9},
    )
    assert course.launch(config, procs=2).returncode == 0
    manifests = [Reader(folder).manifest for folder in checkpoint.find(course.run("minutes").checkpoints)]
    assert [(one.step, one.reason) for one in reversed(manifests)][:2] == [(1, "interval"), (2, "interval")]


def the_disk_is_full() -> None:
    """In a rank: no checkpoint can be completed; rank 0 knows it before all agree on the step after."""
    from trainer import writer
    from trainer.loop import Training

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    agree = Training.agree

    def agreed(training: Any, *arguments: Any) -> Any:
        if training.state.step == 2 and training.world.rank == 0:
            until = time.monotonic() + 60
            while not training.checkpoints.failed:
                assert time.monotonic() < until
                time.sleep(0.01)
        return agree(training, *arguments)

    writer.write_synced, Training.agree = full, agreed


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(course: Course) -> None:
    """And not when the next one is due, hours later."""
    config = values(
        course,
        "full",
        batch={"global_size": 2, "micro_seconds": 1},
        optim={"max_steps": 7},
        checkpoint={"every_steps": 2, "keep_last": 9},
    )
    done = course.launch(config, procs=2, before="tests.test_whole_run:the_disk_is_full")
    assert done.returncode == 1 and "cannot write the checkpoint of step 2" in done.stderr
    assert sorted(audit(course.run("full").path)) == [0, 1]
