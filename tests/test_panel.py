"""What TensorBoard shows: the first look, clips with what was said of them, the worst and the best."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from configs.metrics import HIGHER_IS_BETTER
from configs.run.events import Evaluated
from configs.run.ledger import History
from configs.run.predictions import Prediction, Sound
from data.batch import Sample
from data.captions import Tokens
from trainer.curves import Curves
from trainer.layout import layout
from trainer.listening import PanelClip
from trainer.panel import Panel, clip_picture, extremes

SOUND = Sound("a.tar", 0, 1, "flac")


def clip(key: str, caption: str, seconds: float = 1.0) -> PanelClip:
    waveform = (8000 * np.sin(np.arange(int(16_000 * seconds)) / 5)).astype(np.int16)
    sample = Sample(waveform, Tokens([1], [1]), "A beep | a buzz.", 0, key, 100)
    return PanelClip(sample, caption)


def prediction(key: str, source: str, loss: float, **scores: float) -> Prediction:
    return Prediction(key, source, 1.0, ["a beep"], f"said of {key}", loss, SOUND, scores)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"audio": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {
        point.step: point.tensor_proto.string_val[0].decode()
        for point in events.Tensors(f"{tag}/text_summary")
    }


def arranged(folder: Path) -> dict[str, list[str]]:
    """Sections of the page and the titles of their charts, as TensorBoard takes them from its newest
    layout."""
    content = read(folder).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return {
        section.title: [chart.title for chart in section.chart]
        for section in Layout.FromString(content).category
    }


def test_the_first_look_shows_each_chart_that_has_a_curve(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 0)
    curves.scalars({"loss": 1.0, "loss/sounds": 1.0, "speed/samples_per_second": 9.0}, 1)
    curves.flush()
    assert arranged(tmp_path) == {
        "loss": ["training and validation", "training, by source"],
        "speed": ["samples per second"],
    }
    curves.scalars({"validation/cider_d": 0.3, "validation/cider_d/sounds": 0.3}, 1)
    curves.close()
    assert arranged(tmp_path)["captions"] == ["against what people said", "CIDEr-D, by source"]


def test_the_first_look_of_a_later_attempt_keeps_the_charts_of_evaluations(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 5, ["validation/discrimination"])
    curves.scalars({"loss": 1.0}, 5)
    curves.close()
    assert arranged(tmp_path) == {"loss": ["training and validation"], "listening": ["discrimination"]}


@pytest.mark.parametrize("metric", HIGHER_IS_BETTER)
def test_every_metric_has_its_place_in_the_first_look(metric: str) -> None:
    assert layout([f"validation/{metric}"])


def test_a_look_at_a_clip_shows_how_its_caption_has_changed(tmp_path: Path) -> None:
    """Over restarts, too, but without what was said at steps that are taken again."""
    said = [(0, "Noise"), (10, "A beep"), (20, "A beep"), (30, "lost")]
    history = History(
        [
            Evaluated(attempt=0, step=step, metrics={}, captions=[{"key": "a", "caption": words}])
            for step, words in said
        ]
    )
    curves = Curves(tmp_path, 26)
    panel = Panel(curves, history, first_step=25)
    panel.show([clip("a", "Two beeps")], [], 30)
    curves.close()
    text = texts(read(tmp_path), "panel/0")[30]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == ["| 0 | Noise |", "| 10-20 | A beep |", "| 30 | Two beeps |"]
    assert "**said** Two beeps" in text and "**reference** A beep \\| a buzz." in text and "`a`" in text


def test_sound_and_picture_of_a_clip_are_written_once(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 0)
    panel = Panel(curves, History([]), 0)
    for step in (0, 10, 20):
        panel.show([clip("a", f"said at {step}"), clip("b", "")], [], step)
    curves.close()
    events = read(tmp_path)
    for tag in ("panel/0", "panel/1"):
        assert [point.step for point in events.Audio(tag)] == [0]
        assert [point.step for point in events.Images(f"{tag}/log_mel")] == [0]
        assert list(texts(events, tag)) == [0, 10, 20]


def test_a_picture_is_bright_where_the_sound_is() -> None:
    """A tone of 4 kHz in the second half: two thirds up."""
    waveform = np.zeros(32_000)
    waveform[16_000:] = 9000 * np.sin(2 * math.pi * 4000 / 16_000 * np.arange(16_000))
    picture = clip_picture(torch.from_numpy(waveform.astype(np.int16))).float().mean(0)
    height, width = picture.shape
    row, column = divmod(int(picture.argmax()), width)
    assert column > width / 2 and 0.2 < row / height < 0.4
    assert picture[:, : width // 2 - 2].max() < picture.max() / 4


def test_the_worst_and_the_best_clips_of_each_source_are_shown() -> None:
    clips = [prediction(f"a{n}", "a", loss=n, cider_d=n / 10) for n in range(8)]
    clips.append(prediction("b0", "b", loss=1, cider_d=0.05))
    tables = extremes(clips)
    keys = {
        tag: [line.split("|")[-2].strip() for line in table.splitlines()[2:]] for tag, table in tables.items()
    }
    assert keys == {"clips/worst": ["a0", "a1", "a2", "b0"], "clips/best": ["a7", "a6", "a5", "b0"]}
    assert "| a | 0.000 | said of a0 | a beep | a0 |" in tables["clips/worst"]


def test_clips_without_scores_are_ranked_by_their_loss() -> None:
    clips = [prediction(f"a{n}", "a", loss=n) for n in range(8)]
    clips[2] = replace(clips[2], loss=math.nan)
    keys = [line.split("|")[-2].strip() for line in extremes(clips)["clips/worst"].splitlines()[2:]]
    assert keys == ["a2", "a7", "a6"]
    assert extremes([]) == {}
