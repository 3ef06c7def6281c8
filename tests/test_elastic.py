"""A run goes on with another number of ranks, under another engine, with other settings, or from a damaged
folder: exactly, or it says why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.run.events import Changed, Damaged, Spike, TrainingBegan
from configs.run.folder import RunDir
from tests.forks import Course, Kill, Launcher
from tests.making import audit, config_values, index_in_full, make_clips, run_program
from tests.test_equivalence import TOLERANCE, losses
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.engines import KINDS
from trainer.writer import Snapshot, Writer

STEPS, STOPPED = 4, 2

OPTIM: dict[str, object] = {"lr": 1e-3, "weight_decay": 0.1}
"""Two groups of parameters, each of which is divided among the ranks."""


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
                "batch": {"global_size": 8, "micro_seconds": 2},
                "optim": {**OPTIM, "max_steps": STEPS},
                "checkpoint": {"every_steps": 1, "keep_last": 9},
                "evaluate": {"every_steps": 1000, "captions": 0, "scored": 0, "max_samples": 4},
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


def saved(run: Path, step: int) -> Reader:
    return Reader(run / "checkpoints" / checkpoint.name_of(step))


def weights(reader: Reader) -> torch.Tensor:
    return torch.cat([reader.tensor(name).flatten() for name in sorted(reader.manifest.parameters)])


def learn_another_token(run: RunDir) -> int:
    """Let a token that generation suppresses, and that no caption of these clips has, be one that occurred
    before the run was stopped; returns it."""
    manifest = run.checkpoints / checkpoint.name_of(STOPPED) / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    generation = json.loads((run.base / "generation_config.json").read_text(encoding="utf-8"))
    token = min(set(generation["suppress_tokens"]) - set(values["caption_tokens"]))
    values["caption_tokens"].append(token)
    manifest.write_text(json.dumps(values), encoding="utf-8")
    return token


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, launch: Launcher) -> Elastic:
    folder = tmp_path_factory.mktemp("elastic")
    assert (
        run_program(
            "tools.pack", make_clips(folder / "clips", range(40)), folder / "shards", "--shard-mb", 1
        ).returncode
        == 0
    )
    shards = f"{folder}/shards/*.tar"
    index_in_full(folder, shards)
    return Elastic(folder, model, shards, launch)


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
def test_what_follows_a_resume_is_what_followed_in_the_uninterrupted_run(
    course, whole, launch, backend: str, procs: int, precision: str
) -> None:
    """From 2 ranks under ZeRO-2: samples, first loss, first update and the captions' tokens."""
    run = course.stopped(whole[precision], f"{backend}-{procs}-{precision}")
    token = learn_another_token(run)
    assert (
        launch(
            course.config(
                run.path.name, backend, precision, batch={"global_size": 8, "micro_seconds": 1 + procs % 2}
            ),
            procs=procs,
        ).returncode
        == 0
    )
    assert losses(run.path)[0] == pytest.approx(losses(whole[precision])[STOPPED], rel=TOLERANCE[precision])
    assert audit(run.path) == {
        step: keys for step, keys in audit(whole[precision]).items() if step >= STOPPED
    }
    stopped, found, expected = (
        saved(run.path, STOPPED),
        saved(run.path, STOPPED + 1),
        saved(whole[precision], STOPPED + 1),
    )
    assert found.manifest.updates == expected.manifest.updates == STOPPED + 1
    moved = (weights(expected) - weights(stopped)).norm()
    error = (weights(found) - weights(expected)).norm()
    assert error < (2e-3 if precision == "fp32" else 0.15) * moved
    assert {*found.manifest.caption_tokens} == {*expected.manifest.caption_tokens, token}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_on_the_same_ranks_the_weights_in_the_end_are_bit_equal(course, launch, backend: str) -> None:
    assert launch(course.config(f"{backend}-whole", backend, "bf16"), procs=3).returncode == 0
    run = course.stopped(course.folder / f"{backend}-whole", f"{backend}-again")
    assert launch(course.config(run.path.name, backend, "bf16"), procs=3).returncode == 0
    assert_equal_state(run.path, course.folder / f"{backend}-whole", STEPS)


def assert_equal_state(run: Path, other: Path, step: int) -> None:
    found, expected = saved(run, step), saved(other, step)
    for name in expected.manifest.parameters:
        count = expected.tensor(name).numel()
        for kind in KINDS:
            assert torch.equal(found(name, kind, 0, count), expected(name, kind, 0, count)), (name, kind)


def snapshots_come_late() -> None:
    """In a rank: nothing is copied for a checkpoint before training wants to go on: before it says that it
    waits for the copy, or else before it has taken the next step."""
    from trainer.engines.zero2 import Zero2Engine

    wanted = threading.Event()
    follow, take, step = Snapshot.follow, Snapshot.take, Zero2Engine.step

    def followed(snapshot: Snapshot) -> None:
        wanted.clear()
        follow(snapshot)

    def taken(snapshot: Snapshot, fragments: Any) -> None:
        assert wanted.wait(60)
        take(snapshot, fragments)

    def stepped(engine: Any, lr: float) -> Any:
        update = step(engine, lr)
        wanted.set()
        return update

    def waits(method: Any) -> Any:
        def waiting(writer: Writer) -> None:
            wanted.set()
            method(writer)

        return waiting

    Snapshot.follow, Snapshot.take, Zero2Engine.step = followed, taken, stepped
    Writer.hold, Writer.finish = waits(Writer.hold), waits(Writer.finish)


def test_a_checkpoint_is_the_state_of_its_step_however_late_it_is_copied(course, whole, launch) -> None:
    """And not that of the next step, or some of both; on the same ranks, so bit for bit."""
    run = course.stopped(whole["fp32"], "late")
    late = "tests.test_elastic:snapshots_come_late"
    assert launch(course.config(run.path.name, "zero2"), procs=2, before=late).returncode == 0
    for step in range(STOPPED + 1, STEPS + 1):
        assert_equal_state(run.path, whole["fp32"], step)


@pytest.mark.parametrize(
    ("name", "during", "saves"),
    [
        ("start", "trainer.model:load", []),
        ("evaluation", "trainer.evaluate:Evaluator.loss", []),
        ("step", "trainer.engines.fsdp2:Fsdp2Engine.step", ["step-00000001"]),
    ],
)
def test_a_stop_that_reaches_one_rank_alone_is_heeded_by_all(
    course, launch, name: str, during: str, saves: list[str]
) -> None:
    """Not rank 0, as when the signal of one node comes first: they save what there is, and leave together."""
    config = course.config(f"asked-in-{name}", checkpoint={"every_steps": 100})
    done = launch(config, procs=2, kill=Kill(during, rank=1, signum=signal.SIGTERM))
    assert done.returncode == 85, done.stderr
    found = checkpoint.find(course.run(f"asked-in-{name}").checkpoints)
    assert [folder.name for folder in found] == saves
    assert ("validation/loss" in done.stdout) == (name == "step"), "an evaluation is left off"


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
        assert said in found.message and checkpoint.name_of(STOPPED) in found.message
        assert [line.step for line in run.ledger.read().of(TrainingBegan)][-1] == STOPPED - 1
        assert (run.checkpoints / f"{checkpoint.name_of(STOPPED)}.damaged").is_dir()


def test_a_folder_without_a_manifest_is_no_checkpoint(course, whole, launch) -> None:
    run = course.stopped(whole["fp32"], "no-manifest")
    (run.checkpoints / checkpoint.name_of(STOPPED) / "manifest.json").unlink()
    assert launch(course.config(run.path.name), procs=1).returncode == 0
    assert [line.step for line in run.ledger.read().of(TrainingBegan)][-1] == STOPPED - 1


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
    "optim.lr": {"optim": {**OPTIM, "max_steps": STEPS, "lr": 2e-3}},
    "run.seed": {"run": {"seed": 8}},
    "batch.global_size": {"batch": {"global_size": 4, "micro_seconds": 2}},
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
            optim={**OPTIM, "epochs": 1, "max_steps": None},
        )
    )
    assert done.returncode == 2 and "begins epoch 2, but optim.epochs=1 ends before it" in done.stderr


def test_a_change_on_purpose_begins_a_new_epoch_and_stays(course, whole, launch) -> None:
    """Another seed: the rest of the run has the samples of a new epoch, in its order. A later resume needs no
    more permission."""
    run = course.stopped(whole["fp32"], "allowed")
    longer = {"optim": {**OPTIM, "max_steps": STEPS + 4}}
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
        optim={**OPTIM, "max_steps": STEPS + 1},
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
