"""A run goes on with another number of ranks, under another engine, with other settings, or from a damaged
folder: exactly, or it says why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.run.events import Changed, Damaged, Spike, Started
from configs.run.folder import RunDir
from tests.forks import Course, Launcher
from tests.making import audit, config_values, make_clips, run_program
from tests.test_equivalence import TOLERANCE, losses
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.engines import KINDS

STEPS, STOPPED = 4, 2


class Elastic(Course):
    """Runs that are stopped and go on."""

    def config(
        self, name: str, backend: str = "fsdp2", precision: str = "fp32", **sections: dict[str, object]
    ) -> dict[str, Any]:
        more = {"run": {"name": name, "dir": str(self.folder / name), "seed": 7, **sections.pop("run", {})}}
        return config_values(
            name,
            self.folder,
            self.model,
            self.shards,
            **{
                "engine": {"backend": backend, "dtype": precision},
                "batch": {"global_size": 8, "micro_size": 2},
                "optim": {"max_steps": STEPS, "lr": 1e-3},
                "checkpoint": {"every_steps": 1, "keep_last": 9},
                "evaluate": {"every_steps": 1000, "captions": 0, "max_samples": 4},
                **more,
                **sections,
            },
        )

    def stopped(self, whole: Path, name: str) -> RunDir:
        """A copy of a run, as it was after two steps."""
        run = RunDir(shutil.copytree(whole, self.folder / name))
        for folder in checkpoint.find(run.checkpoints):
            if folder.name > checkpoint.name_of(STOPPED):
                shutil.rmtree(folder)
        shutil.rmtree(run.tensorboard)
        shutil.rmtree(run.audit.folder)
        return run


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, launch: Launcher) -> Elastic:
    folder = tmp_path_factory.mktemp("elastic")
    assert (
        run_program(
            "tools.pack", make_clips(folder / "clips", range(40)), folder / "shards", "--shard-mb", 1
        ).returncode
        == 0
    )
    return Elastic(folder, model, f"{folder}/shards/*.tar", launch)


@pytest.fixture(scope="module")
def whole(course: Elastic, launch: Launcher) -> dict[str, Path]:
    """A run on 2 ranks under ZeRO-2, by precision."""
    for precision in TOLERANCE:
        assert launch(course.config(f"whole-{precision}", "zero2", precision), procs=2).returncode == 0
    return {precision: course.folder / f"whole-{precision}" for precision in TOLERANCE}


FAST = [("fsdp2", 3, "fp32"), ("zero2", 1, "bf16"), ("fsdp2", 4, "bf16")]
ALL = [
    (backend, procs, precision)
    for backend in ("zero2", "fsdp2")
    for procs in (1, 2, 3, 4, 8)
    for precision in TOLERANCE
]


@pytest.mark.parametrize(
    ("backend", "procs", "precision"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(map(str, case)))
        for case in ALL
    ],
)
def test_the_first_loss_after_a_resume_is_the_uninterrupted_runs(
    course, whole, launch, backend: str, procs: int, precision: str
) -> None:
    """From 2 ranks under ZeRO-2; with the same ranks and engine the weights in the end are the same bit for
    bit."""
    run = course.stopped(whole[precision], f"{backend}-{procs}-{precision}")
    assert (
        launch(
            course.config(
                run.path.name, backend, precision, batch={"global_size": 8, "micro_size": 1 + procs % 2}
            ),
            procs=procs,
        ).returncode
        == 0
    )
    assert losses(run.path)[0] == pytest.approx(losses(whole[precision])[STOPPED], rel=TOLERANCE[precision])
    assert audit(run.path) == {
        step: keys for step, keys in audit(whole[precision]).items() if step >= STOPPED
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_on_the_same_ranks_the_weights_in_the_end_are_bit_equal(course, launch, backend: str) -> None:
    assert launch(course.config(f"{backend}-whole", backend, "bf16"), procs=3).returncode == 0
    run = course.stopped(course.folder / f"{backend}-whole", f"{backend}-again")
    assert launch(course.config(run.path.name, backend, "bf16"), procs=3).returncode == 0
    assert_equal_state(run.path, course.folder / f"{backend}-whole")


def assert_equal_state(run: Path, other: Path) -> None:
    found, expected = (Reader(checkpoint.find(path / "checkpoints")[0]) for path in (run, other))
    assert found.manifest.step == expected.manifest.step
    for name in expected.manifest.parameters:
        count = expected.tensor(name).numel()
        for kind in KINDS:
            assert torch.equal(found(name, kind, 0, count), expected(name, kind, 0, count)), (name, kind)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "rank-00001-of-00002.safetensors", 1000)


def flip_a_bit(folder: Path) -> None:
    file = folder / "rank-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_a_file(folder: Path) -> None:
    (folder / "rank-00000-of-00002.safetensors").unlink()


def half_a_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 200)


DAMAGE = {
    cut_off: "has 1000 bytes",
    flip_a_bit: "damaged between bytes",
    without_a_file: "No such file",
    half_a_manifest: "not a valid checkpoint",
}


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(course, whole, launch) -> None:
    """Each kind of damage in turn; what is left of it is kept for somebody to look at."""
    for number, (damage, said) in enumerate(DAMAGE.items()):
        run = course.stopped(whole["fp32"], f"damaged-{number}")
        damage(run.checkpoints / checkpoint.name_of(STOPPED))
        done = launch(course.config(run.path.name), procs=3)
        assert done.returncode == 0 and "set aside" in done.stdout
        (found,) = run.ledger.read().of(Damaged)
        assert said in found["message"] and checkpoint.name_of(STOPPED) in found["message"]
        assert [line.step for line in run.ledger.read().of(Started)][-1] == STOPPED - 1
        assert (run.checkpoints / f"{checkpoint.name_of(STOPPED)}.damaged").is_dir()


def test_a_folder_without_a_manifest_is_no_checkpoint(course, whole, launch) -> None:
    run = course.stopped(whole["fp32"], "no-manifest")
    (run.checkpoints / checkpoint.name_of(STOPPED) / "manifest.json").unlink()
    assert launch(course.config(run.path.name), procs=1).returncode == 0
    assert [line.step for line in run.ledger.read().of(Started)][-1] == STOPPED - 1


def test_a_run_of_which_all_checkpoints_are_damaged_does_not_begin_anew(course, whole, launch) -> None:
    run = course.stopped(whole["fp32"], "all-damaged")
    for folder in checkpoint.find(run.checkpoints):
        flip_a_bit(folder)
    for _ in range(2):  # nor at the next start
        done = launch(course.config(run.path.name), procs=2)
        assert (
            done.returncode == 1
            and "no sound checkpoint is left" in done.stderr
            and "step-00000002.damaged" in done.stderr
        )


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(course, whole, launch) -> None:
    """As when a file system is not there on one node: nothing is set aside, and nothing older is used in its
    place."""
    run = course.stopped(whole["fp32"], "unreadable")
    file = run.checkpoints / checkpoint.name_of(STOPPED) / "rank-00001-of-00002.safetensors"
    kept = file.rename(run.path / "kept")
    file.symlink_to(file.name)
    done = launch(course.config(run.path.name), procs=2)
    assert (
        done.returncode == 1
        and "cannot be read: " in done.stderr
        and "nothing was changed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert [folder.name for folder in sorted(run.checkpoints.iterdir())] == ["step-00000001", "step-00000002"]
    kept.replace(file)
    assert launch(course.config(run.path.name), procs=2).returncode == 0


CHANGES = {
    "optim.lr": {"optim": {"max_steps": STEPS, "lr": 2e-3}},
    "run.seed": {"run": {"seed": 8}},
    "batch.global_size": {"batch": {"global_size": 4, "micro_size": 2}},
}


def test_a_change_that_breaks_exactness_is_refused_with_the_difference(course, whole, launch) -> None:
    run = course.stopped(whole["fp32"], "refused")
    before = run.config.read_text(encoding="utf-8")
    for name, change in CHANGES.items():
        done = launch(course.config(run.path.name, **change))
        assert (
            done.returncode == 2
            and f"{name}: " in done.stderr
            and " -> " in done.stderr
            and f"run.allow_change=[{name}]" in done.stderr
        )
    assert run.config.read_text(encoding="utf-8") == before and not run.proposal.path.exists()


def test_a_change_that_leaves_no_step_to_take_is_refused(course, whole, launch) -> None:
    """It would begin the second epoch of a run that has one."""
    run = course.stopped(whole["fp32"], "no-step")
    done = launch(
        course.config(
            run.path.name,
            run={"seed": 8, "allow_change": ["run.seed"]},
            optim={"epochs": 1, "lr": 1e-3, "max_steps": None},
        )
    )
    assert done.returncode == 2 and "begins epoch 2, but optim.epochs=1 ends before it" in done.stderr


def test_a_change_on_purpose_begins_a_new_epoch_and_stays(course, whole, launch) -> None:
    """Another seed: the rest of the run has the samples of a new epoch, in its order. A later resume needs no
    more permission."""
    run = course.stopped(whole["fp32"], "allowed")
    longer = {"optim": {"max_steps": STEPS + 4, "lr": 1e-3}}
    assert (
        launch(
            course.config(run.path.name, run={"seed": 8, "allow_change": ["run.seed"]}), procs=2
        ).returncode
        == 0
    )
    manifest = Reader(checkpoint.find(run.checkpoints)[0]).manifest
    assert manifest.epoch_base == (STOPPED, 1)
    (told,) = run.ledger.read().of(Changed)
    assert told.what == ["run.seed: 7 -> 8"] and told.epoch_base == (STOPPED, 1)
    assert launch(course.config(run.path.name, run={"seed": 8}, **longer), procs=3).returncode == 0
    assert Reader(checkpoint.find(run.checkpoints)[0]).manifest.epoch_base == (STOPPED, 1)
    steps = audit(run.path)
    epoch = [key for step in sorted(steps)[:-1] for key in steps[step]]
    assert sorted(steps) == list(range(STOPPED, STEPS + 4)) and len(set(epoch[:34])) == len(epoch[:34])
    assert steps[STOPPED] != audit(whole["fp32"])[STOPPED]


def test_what_may_change_does(course, whole, launch) -> None:
    """More steps, other intervals, other URLs of the same shards, in one resume."""
    run = course.stopped(whole["fp32"], "changed")
    moved = course.folder / "elsewhere"
    shutil.copytree(course.folder / "shards", moved)
    config = course.config(
        run.path.name,
        optim={"max_steps": STEPS + 1, "lr": 1e-3},
        checkpoint={"every_steps": 3},
        monitor={"every_steps": 2},
    )
    config["data"]["sources"] = [{**config["data"]["sources"][0], "shards": [f"{moved}/*.tar"]}]
    assert launch(config, procs=1).returncode == 0
    assert {step: keys for step, keys in audit(run.path).items() if step < STEPS} == {
        k: v for k, v in audit(whole["fp32"]).items() if k >= STOPPED
    }


def test_a_loss_that_stands_out_is_marked_with_its_samples(course, launch) -> None:
    """With a threshold so low that some batch of ordinary ones is over it."""
    config = course.config(
        "spikes",
        optim={"max_steps": 40, "lr": 1e-9},
        monitor={"every_steps": 1, "spike_sigma": 0.5},
        checkpoint={"every_steps": 100},
    )
    assert launch(config, procs=2).returncode == 0
    run = course.folder / "spikes"
    spikes = RunDir(run).ledger.read().of(Spike)
    values, keys = losses(run), audit(run)
    over = [
        step
        for step in range(20, 39)
        if values[step] > np.mean(kept := ordinary(values, step)) + 0.5 * np.std(kept)
    ]
    assert over and [line.step for line in spikes] == over
    assert [line.keys for line in spikes] == [keys[step] for step in over]
    assert [line.loss for line in spikes] == pytest.approx([values[step] for step in over], rel=1e-6)


def ordinary(values: list[float], step: int) -> list[float]:
    """The losses before a step that did not stand out themselves."""
    kept: list[float] = []
    for value in values[:step]:
        if len(kept) < 20 or value <= np.mean(kept) + 0.5 * np.std(kept):
            kept.append(value)
    return kept
