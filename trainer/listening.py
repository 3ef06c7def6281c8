"""What a model says of validation clips: captions of a choice of each source, their scores, and whether it
listens."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch

from configs.metrics import CURVES
from configs.run.predictions import Prediction, Sound
from data.batch import Sample, collate
from data.captions import IGNORED, Tokens
from data.decode import SAMPLE_RATE
from data.order import EMPTY, LISTEN, Ints, fractions, hashed, random_keys
from data.windows import HOP
from trainer.captioning import Generator, in_groups
from trainer.counts import repeated
from trainer.evaluate import Fetch, Setup
from trainer.loss import token_losses
from trainer.said import words_of
from trainer.scores import score
from trainer.whisper import Whisper

GROUP = 8
"""Clips that are captioned together."""
DISCRIMINATION = "discrimination"
"""Whether a clip's own caption is likelier than that of another clip of its source."""
SECONDS_WITHOUT_CONTENT = (3, 10)
"""Lengths of the silence and of the noise that a model is tried on."""
NOISE = 0.2
"""From the lowest to the highest value of that noise; full scale is from -1 to 1."""


@dataclass(frozen=True)
class PanelClip:
    """A clip of the panel with what the model says of it."""

    sample: Sample
    caption: str


@dataclass(frozen=True)
class Listening:
    """What a model said of clips: on rank 0 of all of them, on the others nothing but the metrics."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`validation/METRIC` of all clips, and `validation/METRIC/SOURCE`; empty if only the panel was heard."""
    predictions: list[Prediction] = field(default_factory=list)
    panel: list[PanelClip] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Metrics that broke, and why."""
    seconds: float = 0.0
    """That the captions took, scores left out."""


@dataclass(frozen=True)
class _Answer:
    """Of a rank: a clip, by its row in the index, with what the model says of it."""

    row: int
    prediction: Prediction
    shown: Sample | None
    """A clip of the panel."""


@dataclass(frozen=True)
class Listener:
    """Captions a run's validation clips. All ranks call `listen` at the same point.

    Each group of clips is of one source and of like length, and is heard by one rank. Groups do not depend on
    how many ranks there are, so neither does what a model says, to the last bit of its rounding.
    """

    setup: Setup
    sign_of_life: Callable[[], None] = lambda: None
    """Called where something begins that takes time."""
    arrive: Callable[[], None] = lambda: None
    """Called before the ranks wait for each other."""

    @cached_property
    def rows(self) -> list[int]:
        """The clips that may be captioned, by their rows in the index, of each source in turn: in an order
        that depends on the seed alone. The panel comes first."""
        index, settings = self.setup.loaders.dataset.validation, self.setup.config.evaluate
        sources, of_caption = index.column("source"), index.column("caption")
        by_source = []
        for number in range(len(self.setup.names)):
            rows = np.flatnonzero((sources == number) & (of_caption <= 0))  # a clip with 5 captions once
            by_source.append(rows[hashed(rows, self.setup.config.run.seed, LISTEN).argsort(kind="stable")])
        in_turn = _in_turn(by_source)
        panel = in_turn[: settings.captions]
        scored = _in_turn([rows[: settings.scored] for rows in by_source])
        return list(dict.fromkeys([*panel, *scored]))

    @property
    def panel(self) -> int:
        """Clips of the panel."""
        return min(self.setup.config.evaluate.captions, len(self.rows))

    def is_scored(self, count: int) -> bool:
        """Whether so many clips are enough for figures: more than the panel, or all that there are."""
        return self.setup.config.evaluate.scored > 0 and (count > self.panel or count >= len(self.rows))

    @torch.no_grad()
    def listen(self, module: Whisper, fetch: Fetch, count: int) -> Listening:
        """What the model says of the first `count` of the clips, and of silence and noise. Raises as `fetch`
        does."""
        rows = self.rows[:count]
        if not rows:
            return Listening()
        setup = self.setup
        setup.records.share_tokens()
        generator = setup.generator(module)
        if setup.world.rank == 0 and generator.beyond:
            asked = ", ".join(generator.beyond)
            print(f"the generation config asks for {asked}: clips are captioned one at a time", flush=True)
        panel = set(rows[: self.panel])
        row_of = {setup.loaders.dataset.validation.identity(row): row for row in rows}
        began = time.monotonic()
        answers: list[_Answer] = []
        for step in setup.steps(self._grouped(rows), GROUP, fetch):
            group = [row_of[sample.key] for sample in step.samples]
            predictions = self._hear(module, generator, step.samples, group)
            for row, sample, prediction in zip(group, step.samples, predictions, strict=True):
                answers.append(_Answer(row, prediction, sample if row in panel else None))
        seconds = time.monotonic() - began
        is_scored = self.is_scored(len(rows))
        without_content = {}
        if setup.world.rank == 0 and is_scored:
            self.sign_of_life()
            without_content = self._of_silence_and_noise(generator)
        self.arrive()
        by_rank = setup.world.gather(answers)
        said = Listening()
        if by_rank is not None:
            self.sign_of_life()
            said = self._sum_up(by_rank, rows, is_scored=is_scored)
            curves = {f"{CURVES}{name}": value for name, value in without_content.items()}
            said = replace(said, metrics=said.metrics | curves, seconds=seconds)
        self.arrive()
        return replace(said, metrics=setup.world.share(said.metrics))

    def _grouped(self, rows: Sequence[int]) -> list[int]:
        """Rows in groups of GROUP, each of one source and of like length; a source's last group is filled up
        with EMPTY."""
        index = self.setup.loaders.dataset.validation
        of_source, seconds = index.column("source")[rows], np.nan_to_num(index.column("seconds")[rows])
        grouped: list[int] = []
        for source in np.unique(of_source):
            own = np.flatnonzero(of_source == source)
            for group in in_groups(seconds[own].tolist(), GROUP):
                grouped += [*(rows[own[place]] for place in group), *[EMPTY] * (GROUP - len(group))]
        return grouped

    def _hear(
        self, module: Whisper, generator: Generator, samples: Sequence[Sample], rows: Sequence[int]
    ) -> list[Prediction]:
        """What the model says of a group of clips of one source, and how likely it finds their captions."""
        if not samples:
            return []
        clips = [self.setup.as_captioned(sample) for sample in samples]
        tokens = generator([self.setup.heard(clip) for clip in clips])
        losses = self._losses(module, clips)
        exchanged = [_with_caption_of_another(clips, number) for number in range(len(clips))]
        of_others = iter(self._losses(module, [clip for clip in exchanged if clip]))
        predictions = []
        for clip, row, said, loss, other in zip(clips, rows, tokens, losses, exchanged, strict=True):
            scores = {DISCRIMINATION: float(loss < next(of_others))} if other else {}
            predictions.append(
                Prediction(
                    key=clip.key,
                    source=self.setup.names[clip.source],
                    seconds=clip.seconds,
                    references=list(clip.references or (clip.caption,)),
                    caption=self.setup.captioner.decode(said),
                    loss=loss,
                    sound=self._sound(row, clip),
                    scores=scores,
                )
            )
        return predictions

    def _losses(self, module: Whisper, clips: Sequence[Sample]) -> list[float]:
        """Mean loss of a token of each clip's caption."""
        setup, means = self.setup, []
        # Not as much as fits: that depends on the number of ranks, and rounding on it.
        for part in replace(setup.size, seconds=setup.size.window_seconds).cut(clips):
            batch = collate(part).to(setup.world.device)
            losses = token_losses(module, batch, setup.captioner.config, setup.dtype).double()
            sums = losses.new_zeros(2, len(part))
            sums.index_add_(1, batch.text.owners, torch.stack([losses, (batch.labels != IGNORED).double()]))
            means += (sums[0] / sums[1]).tolist()
        return means

    def _of_silence_and_noise(self, generator: Generator) -> dict[str, float]:
        """Words and repetition rate of what the model says of silence and of noise."""
        window = self.setup.loaders.windows.whole * HOP / SAMPLE_RATE
        lengths = [round(min(seconds, window) * SAMPLE_RATE) for seconds in SECONDS_WITHOUT_CONTENT]
        sounds = {
            "silence": [np.zeros(length, np.int16) for length in lengths],
            "noise": [_noise(length) for length in lengths],
        }
        metrics = {}
        for name, waveforms in sounds.items():
            clips = [self.setup.as_captioned(_without_caption(waveform)) for waveform in waveforms]
            tokens = generator([self.setup.heard(clip) for clip in clips])
            said = [" ".join(words_of(self.setup.captioner.decode(each))) for each in tokens]
            metrics[f"{name}_words"] = fmean(len(words.split()) for words in said)
            metrics[f"{name}_repetition_rate"] = fmean(map(repeated, said))
        return metrics

    def _sum_up(
        self, by_rank: Sequence[Sequence[_Answer]], rows: Sequence[int], *, is_scored: bool
    ) -> Listening:
        """Scores and panel of all ranks' answers, in the order of the clips."""
        answers = {answer.row: answer for of_rank in by_rank for answer in of_rank}
        in_order = [answers[row] for row in rows if row in answers]
        panel = [PanelClip(answer.shown, answer.prediction.caption) for answer in in_order if answer.shown]
        predictions = [answer.prediction for answer in in_order]
        if not is_scored:
            return Listening({}, predictions, panel)
        folders = self.setup.config.evaluate.parts
        scored = score(predictions, folders=folders, sign_of_life=self.sign_of_life)
        metrics = scored.means | _discrimination(scored.predictions)
        curves = {f"{CURVES}{name}": value for name, value in metrics.items()}
        return Listening(curves, scored.predictions, panel, scored.failed)

    def _sound(self, row: int, clip: Sample) -> Sound:
        index = self.setup.loaders.dataset.validation
        shard = index.shards[int(index.column("shard")[row])]
        start, size = (int(index.column(name)[row]) for name in ("audio_offset", "audio_size"))
        ending = index.text("ending", row)
        return Sound(shard.location.url, start, start + size, ending, clip.begins)


def _discrimination(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of clips, and of each source's, whose own caption is likelier than another one."""
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        if DISCRIMINATION in prediction.scores:
            for name in (DISCRIMINATION, f"{DISCRIMINATION}/{prediction.source}"):
                by_name[name].append(prediction.scores[DISCRIMINATION])
    return {name: fmean(values) for name, values in by_name.items()}


def _in_turn(by_source: Sequence[Ints]) -> list[int]:
    """The first of each, then the second of each, and so on."""
    longest = max(map(len, by_source), default=0)
    return [int(rows[turn]) for turn in range(longest) for rows in by_source if turn < len(rows)]


def _noise(length: int) -> npt.NDArray[np.int16]:
    """White noise, always the same."""
    return ((fractions(random_keys(length, 0, LISTEN)) - 0.5) * NOISE * 32768).astype(np.int16)


def _without_caption(waveform: npt.NDArray[np.int16]) -> Sample:
    """A clip of the first source that nobody has captioned."""
    frames = 2 * max(1, len(waveform) // (2 * HOP))
    return Sample(waveform, Tokens([], []), "", source=0, key="", frames=frames)


def _with_caption_of_another(clips: Sequence[Sample], number: int) -> Sample | None:
    """A clip with the caption of the next one that has another; None if there is none."""
    clip = clips[number]
    for other in [*clips[number + 1 :], *clips[:number]]:
        is_right = other.caption in (clip.caption, *clip.references)
        if not is_right and other.tokens.labels != clip.tokens.labels:
            return replace(clip, tokens=other.tokens)
    return None
