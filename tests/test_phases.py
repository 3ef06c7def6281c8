"""A new phase starts from the weights of another run, exactly, and from nothing else of it; afterwards it
stands on its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.run.events import Evaluated, TrainingBegan
from configs.run.folder import RunDir
from tests.forks import Course, Done, Launcher
from tests.making import config_values, make_model, run_program
from trainer import checkpoint
from trainer.checkpoint import Reader

STEPS = 3
TOO_LITTLE = 1e-30
"""A learning rate that changes no fp32 weight: what a run saves with it is what it began with."""


class Phases(Course):
    """Runs that may start from another one."""

    def train(
        self,
        name: str,
        init_from: Path | str | None,
        steps: int,
        backend: str = "fsdp2",
        model: Path | None = None,
        **optim: Any,
    ) -> Done:
        """On 2 ranks, each with a thread of its own."""
        config = config_values(
            name,
            self.folder,
            self.model,
            self.shards,
            optim={"max_steps": steps, **optim},
            checkpoint={"every_steps": 1, "keep_last": 9},
            engine={"backend": backend},
            evaluate={"every_steps": 100, "captions": 0, "max_samples": 4},
        )
        return self.launch(
            config
            | {
                "model": {"name_or_path": str(model or self.model), "init_from": init_from and str(init_from)}
            },
            procs=2,
        )

    def saved(self, name: str, step: int) -> Reader:
        return Reader(self.run(name).checkpoints / checkpoint.name_of(step))

    def validation_losses(self, name: str) -> list[float]:
        return [event.metrics["validation/loss"] for event in self.run(name).ledger.read().of(Evaluated)]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch: Launcher) -> Phases:
    """With a first phase under ZeRO-2, in BF16 with fp32 masters, and an export of it."""
    course = Phases(tmp_path_factory.mktemp("phases"), model, shards, launch)
    assert course.train("first", None, STEPS, "zero2").returncode == 0
    done = run_program("tools.export", course.folder / "first", course.folder / "export", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    return course


def exported(course: Phases) -> dict[str, torch.Tensor]:
    weights = load_file(course.folder / "export/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    return {name: tensor.float() for name, tensor in weights.items()}


def masters(reader: Reader) -> dict[str, torch.Tensor]:
    return {name: reader.tensor(name) for name in reader.manifest.parameters}


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_it_starts_at_step_0_with_exactly_the_weights_and_a_fresh_optimizer_and_schedule(
    course: Phases, source: str
) -> None:
    step = {"run": STEPS, "checkpoint": 2}.get(source)
    place = {"run": "first", "checkpoint": "first/checkpoints/step-00000002", "export": "export"}[source]
    assert (
        course.train(
            f"from-{source}", course.folder / place, 2, "zero2" if source == "run" else "fsdp2", lr=TOO_LITTLE
        ).returncode
        == 0
    )
    (start,) = course.run(f"from-{source}").ledger.read().of(TrainingBegan)
    assert start.step == 0
    events = EventAccumulator(str(course.run(f"from-{source}").tensorboard))
    events.Reload()
    assert [point.value for point in events.Scalars("learning_rate")] == pytest.approx(
        [TOO_LITTLE, TOO_LITTLE / 2]
    )
    if source == "run":  # by the same engine
        assert course.validation_losses("from-run")[0] == course.validation_losses("first")[-1]

    begun = course.saved(f"from-{source}", 1)
    expected = masters(course.saved("first", step)) if step else exported(course)
    found = masters(begun)
    assert set(found) <= set(expected) and len(found) > 50
    assert all(torch.equal(found[name], expected[name]) for name in found)

    assert begun.manifest.updates == 1
    for (
        name,
        weight,
    ) in found.items():  # the moments of a first update: of the gradient g they are 0.1 g and 0.001 g²
        first, second = (begun(name, kind, 0, weight.numel()) for kind in ("exp_avg", "exp_avg_sq"))
        torch.testing.assert_close(
            (first.double() / 0.1).square(), second.double() / 0.001, rtol=1e-4, atol=1e-12
        )


def test_once_begun_it_does_not_need_the_first_phase_any_more(course: Phases) -> None:
    old = shutil.copytree(course.run("first").path, course.folder / "old")
    assert course.train("alone", old, 1).returncode == 0
    shutil.rmtree(old)
    assert course.train("alone", old, 2).returncode == 0
    assert [line.step for line in course.run("alone").ledger.read().of(TrainingBegan)] == [0, 1]


def nonsense(course: Phases) -> Path:
    return course.folder / "no-such-run"


def some_folder(course: Phases) -> Path:
    return course.run("first").tensorboard


def a_run_that_saved_nothing(course: Phases) -> Path:
    run = RunDir(shutil.copytree(course.run("first").path, course.folder / "saved-nothing"))
    shutil.rmtree(run.checkpoints)
    return run.path


def a_checkpoint_alone(course: Phases) -> Path:
    """Without the run's base beside it."""
    return Path(
        shutil.copytree(
            course.run("first").checkpoints / "step-00000002",
            course.folder / "alone-checkpoint/a/step-00000002",
        )
    )


def a_damaged_checkpoint(course: Phases) -> Path:
    run = RunDir(shutil.copytree(course.run("first").path, course.folder / "damaged-source"))
    file = run.checkpoints / "step-00000003/rank-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.parent


REFUSED = {
    nonsense: "no-such-run: not the folder of a run",
    some_folder: "tensorboard: not the folder of a run",
    a_run_that_saved_nothing: "has no complete checkpoint yet",
    a_checkpoint_alone: "base is missing",
    a_damaged_checkpoint: "damaged between bytes",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_cannot_be_started_from_is_refused_with_the_reason(course: Phases, source) -> None:
    refused(course, source.__name__, source(course), REFUSED[source])


@pytest.mark.parametrize(
    "shape", [{"width": 96}, {"layers": 1}, {"layers": 3}], ids=["wider", "shallower", "deeper"]
)
@pytest.mark.parametrize("source", ["first", pytest.param("export", marks=pytest.mark.slow)])
def test_another_model_is_refused(course: Phases, tmp_path: Path, source: str, shape: dict[str, int]) -> None:
    other = make_model(tmp_path / "model", **shape)
    refused(
        course,
        f"other-{source}-{shape}",
        course.folder / source,
        "model.name_or_path: it is of another model: ",
        other,
    )


def refused(course: Phases, name: str, source: Path, said: str, model: Path | None = None) -> None:
    done = course.train(name, source, 1, model=model)
    assert (
        done.returncode == 2
        and f"model.init_from: {source}" in done.stderr
        and said in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not course.run(name).config.exists() and not list(course.run(name).checkpoints.iterdir())
