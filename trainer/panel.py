"""What a person looks at after an evaluation: clips of the panel, and the worst and the best of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from configs.metrics import HIGHER_IS_BETTER
from configs.run.events import Evaluated
from configs.run.ledger import History
from configs.run.predictions import Prediction
from data.decode import SAMPLE_RATE
from trainer.listening import PanelClip
from trainer.picture import palette, picture
from trainer.trackers import Tracker

LATEST = 10
"""Captions of a clip that are shown, after the first one."""
SHOWN = 3
"""Clips of each source among the worst, and among the best."""
COLOURS = 256


class Panel:
    """Shows an evaluation in the trackers."""

    def __init__(self, trackers: Tracker, history: History, first_step: int) -> None:
        """history: of the attempts before; what they said after first_step is said anew."""
        self._trackers = trackers
        self._said: dict[str, dict[int, str]] = {}
        """Captions of each clip by step."""
        self._shown: set[str] = set()
        """Clips whose sound and picture this attempt has shown, which never change."""
        for event in history.of(Evaluated):
            if event.step <= first_step:
                for clip in event.captions:
                    self._said.setdefault(clip["key"], {})[event.step] = clip["caption"]

    def show(self, clips: Sequence[PanelClip], predictions: Sequence[Prediction], step: int) -> None:
        """Show clips of the panel, and the worst and the best of all."""
        for number, clip in enumerate(clips):
            tag = f"panel/{number}"
            said = self._said.setdefault(clip.sample.key, {})
            said[step] = clip.caption
            self._trackers.text(tag, clip_text(clip, said), step)
            if clip.sample.key not in self._shown:
                self._shown.add(clip.sample.key)
                waveform = torch.from_numpy(clip.sample.waveform)
                self._trackers.audio(tag, waveform[None] / 32768, SAMPLE_RATE, step)
                # A name of its own: TensorBoard shows one kind of thing under each.
                self._trackers.image(f"{tag}/log_mel", clip_picture(waveform), step)
        for tag, table in extremes(predictions).items():
            self._trackers.text(tag, table, step)


def clip_text(clip: PanelClip, said: Mapping[int, str]) -> str:
    """A clip with all that the model has said of it, in Markdown. said: captions by step, the last one
    included."""
    lines = [f"**said** {flat(clip.caption)}", f"**reference** {flat(clip.sample.caption)}"]
    spans = _spans(said)
    if len(spans) > 1:
        shown = [spans[0], ("...", ""), *spans[-LATEST:]] if len(spans) > LATEST + 1 else spans
        lines.append(
            "\n".join(["| step | said |", "|---|---|", *(f"| {at} | {flat(what)} |" for at, what in shown)])
        )
    return "\n\n".join([*lines, f"`{clip.sample.key}`"])


def _spans(said: Mapping[int, str]) -> list[tuple[str, str]]:
    """Captions in the order of their steps; such as did not change together, as 500-1500."""
    spans: list[tuple[int, int, str]] = []
    for step, caption in sorted(said.items()):
        if spans and spans[-1][2] == caption:
            spans[-1] = (spans[-1][0], step, caption)
        else:
            spans.append((step, step, caption))
    return [(str(first) if first == last else f"{first}-{last}", caption) for first, last, caption in spans]


def clip_picture(waveform: torch.Tensor) -> torch.Tensor:
    """The log-mel spectrogram of a clip. (n,) int16 -> (3, MELS, up to WIDEST) uint8."""
    return torch.from_numpy(palette(COLOURS)[picture(waveform, COLOURS)]).permute(2, 0, 1)


def extremes(predictions: Sequence[Prediction]) -> dict[str, str]:
    """The worst and the best clips of each source, as tables in Markdown by name; none without
    predictions."""
    if not predictions:
        return {}
    measure = _measure(predictions)
    by_source: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_source.setdefault(prediction.source, []).append(prediction)
    ranked = {
        source: sorted(of_source, key=lambda one: _badness(one, measure))
        for source, of_source in by_source.items()
    }
    return {
        "clips/worst": _table(measure, [one for clips in ranked.values() for one in clips[::-1][:SHOWN]]),
        "clips/best": _table(measure, [one for clips in ranked.values() for one in clips[:SHOWN]]),
    }


def _measure(predictions: Sequence[Prediction]) -> str:
    """What clips are ranked by: the first metric of captions that all have, or the loss."""
    for name, higher_is_better in HIGHER_IS_BETTER.items():
        if higher_is_better and all(name in prediction.scores for prediction in predictions):
            return name
    return "loss"


def _badness(prediction: Prediction, measure: str) -> tuple[float, float]:
    """Clips that score alike are told apart by their loss; one that is not a number is the worst."""
    loss = prediction.loss if np.isfinite(prediction.loss) else np.inf
    return (loss, loss) if measure == "loss" else (-prediction.scores[measure], loss)


def _table(measure: str, predictions: Sequence[Prediction]) -> str:
    lines = [f"| source | {measure} | said | reference | clip |", "|---|---|---|---|---|"]
    for one in predictions:
        value = one.loss if measure == "loss" else one.scores[measure]
        cells = [one.source, f"{value:.3f}", one.caption, one.references[0], one.key]
        lines.append(f"| {' | '.join(map(flat, cells))} |")
    return "\n".join(lines)


def flat(text: str) -> str:
    """A text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
