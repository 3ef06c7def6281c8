"""The curves of all attempts are read in their order, whatever the clocks of their machines say."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from trainer.curves import open_curves

NOW = 1_700_000_000
DAY = 86_400
Open = Callable[[Path, int], SummaryWriter]


def open_plainly(folder: Path, purge_step: int) -> SummaryWriter:
    return SummaryWriter(str(folder), purge_step=purge_step)


def draw(folder: Path, open_writer: Open, attempt: int, steps: range) -> None:
    """The curve of an attempt that goes on at the first of these steps; its value is the attempt's number."""
    writer = open_writer(folder, steps.start)
    for step in steps:
        writer.add_scalar("loss", attempt, step)
        writer.flush()  # more than once: it must go on in the same file
    writer.close()


def read(events: EventAccumulator) -> list[tuple[int, float]]:
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars("loss")]


def values(*attempts: int) -> list[tuple[int, float]]:
    return [(step, float(attempt)) for step, attempt in enumerate(attempts)]


def at(monkeypatch: pytest.MonkeyPatch, seconds: float, host: str = "n1") -> None:
    monkeypatch.setattr(time, "time", lambda: seconds)
    monkeypatch.setattr(socket, "gethostname", lambda: host)


def machine_a_day_behind(folder: Path, open_writer: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, NOW + DAY)
    draw(folder, open_writer, 0, range(6))
    at(monkeypatch, NOW)
    draw(folder, open_writer, 1, range(3, 8))


def attempts_of_one_second(folder: Path, open_writer: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the names of their files are told apart, and sorted, by the names of the hosts."""
    at(monkeypatch, NOW, "zebra")
    draw(folder, open_writer, 0, range(6))
    at(monkeypatch, NOW, "ape")
    draw(folder, open_writer, 1, range(3, 8))


@pytest.mark.parametrize("attempts", [machine_a_day_behind, attempts_of_one_second])
def test_the_curve_of_a_later_attempt_comes_after_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: Callable[..., None]
) -> None:
    """What the first attempt has drawn from the step on at which the second one goes on is taken back."""
    expected = values(0, 0, 0, 1, 1, 1, 1, 1)
    attempts(tmp_path / "ours", open_curves, monkeypatch)
    assert read(EventAccumulator(str(tmp_path / "ours"))) == expected
    attempts(tmp_path / "plain", open_plainly, monkeypatch)
    assert read(EventAccumulator(str(tmp_path / "plain"))) != expected, "TensorBoard sorts by itself now"


def test_a_tensorboard_that_looks_on_sees_the_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = EventAccumulator(str(tmp_path))
    at(monkeypatch, NOW + DAY)
    draw(tmp_path, open_curves, 0, range(3))
    assert read(events) == values(0, 0, 0)
    at(monkeypatch, NOW)
    draw(tmp_path, open_curves, 1, range(2, 4))
    draw(tmp_path, open_curves, 2, range(3, 5))
    assert read(events) == values(0, 0, 1, 2, 2)
    assert len(list(tmp_path.iterdir())) == 3
