"""Validation: loss per source, and captions of a fixed panel of clips."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from configs.errors import UnusableData
from configs.schema import RunConfig
from data.batch import Sample, Size, collate
from data.loader import Loader, Step
from data.samples import Rejected
from trainer.captioning import Generator, Heard
from trainer.distributed import World
from trainer.loaders import Loaders
from trainer.loss import SourceTotals, token_losses
from trainer.model import Captioner
from trainer.records import SampleRecords
from trainer.whisper import Whisper

Fetch = Callable[[Loader], Step | None]
"""Gives the next step of a loader once all ranks have theirs, None where they leave off. Raises on all ranks
if one has failed. All ranks call it at the same point."""


@dataclass(frozen=True)
class PanelClip:
    """A clip of the panel with what the model says of it."""

    sample: Sample
    caption: str


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on a run's validation samples. All ranks call its methods at the same point."""

    config: RunConfig
    world: World
    captioner: Captioner
    loaders: Loaders
    records: SampleRecords
    size: Size
    dtype: torch.dtype
    """Type of the weights that compute."""
    before_leaving: Callable[[], None]
    """Called by all ranks before they leave together, as nothing of a source could be used."""

    @property
    def samples(self) -> int:
        """How many clips the loss is of."""
        return sum(map(len, self.loaders.validation_rows(self.config.evaluate.max_samples)))

    @torch.no_grad()
    def loss(self, module: Whisper, fetch: Fetch) -> dict[str, float] | None:
        """Mean loss of a caption token over all validation samples (`validation/loss`) and by source
        (`validation/loss/SOURCE`), each clip padded to the whole window, as programs that use the export do;
        where clips are trained at their own lengths, the same at these (`validation/loss_own`), too.

        Empty without validation samples; None where the ranks leave off. Raises UnusableData if none of a
        source's validation samples can be used.
        """
        rows_by_source = self.loaders.validation_rows(self.config.evaluate.max_samples)
        rows = [row for rows in rows_by_source for row in rows]
        at_full, at_own = (SourceTotals.zeros(len(self._names), self.world.device) for _ in range(2))
        rejected: list[Rejected] = []
        module.eval()
        with closing(self.loaders.validation(rows, self._windows_at_once)) as loader:
            for _ in loader.steps:
                step = fetch(loader)
                if step is None:
                    module.train()
                    return None
                self.records.quarantine(step.rejected, None)
                rejected += step.rejected
                self._add(at_full, module, [replace(clip, frames=self._whole) for clip in step.samples])
                if self._at_own_lengths:
                    self._add(at_own, module, step.samples)
        module.train()
        at_full, at_own = at_full.over_ranks(self.world), at_own.over_ranks(self.world)
        self._check_usable(rows_by_source, at_full, rejected)
        return at_full.means(self._names, "validation/loss") | at_own.means(
            self._names, "validation/loss_own"
        )

    def _add(self, totals: SourceTotals, module: Whisper, samples: list[Sample]) -> None:
        batch = collate(samples).to(self.world.device)
        totals.add(batch, token_losses(module, batch, self.captioner.config, self.dtype))

    @torch.no_grad()
    def captions(self, module: Whisper, fetch: Fetch) -> list[PanelClip] | None:
        """Captions of the panel: as many validation clips of each source. Rank 0 gets them, the others an
        empty list; None where the ranks leave off."""
        wanted = self.config.evaluate.captions
        rows_by_source = self.loaders.validation_rows(-(-wanted // len(self._names)))
        in_turn = [rows[turn] for turn in range(wanted) for rows in rows_by_source if turn < len(rows)]
        self.records.share_tokens()
        generator = self.generator(module)
        module.eval()
        clips = []
        with closing(self.loaders.validation(in_turn[:wanted], per_rank=1)) as loader:
            for _ in loader.steps:
                step = fetch(loader)
                if step is None:
                    module.train()
                    return None
                clips += [PanelClip(clip, self.caption(generator, clip)) for clip in step.samples]
        module.train()
        by_rank = self.world.gather(clips) or []
        return [panel[turn] for turn in range(wanted) for panel in by_rank if turn < len(panel)]

    def generator(self, module: Whisper) -> Generator:
        """Captions clips, without the tokens that Whisper bans and no caption has had."""
        from transformers import GenerationConfig

        generation = GenerationConfig.from_dict(self.captioner.generation)
        learnt = self.records.caption_tokens
        suppressed = [token for token in generation.suppress_tokens or [] if not learnt[token]]
        generation.suppress_tokens = suppressed or None
        generation.max_length = self.captioner.config.max_target_positions
        return Generator(module, generation)

    def caption(self, generator: Generator, sample: Sample) -> str:
        """The caption that the model gives a clip, greedily, at the windows that it is trained on."""
        prompt = self.loaders.encoder.prompts[self.config.data.sources[sample.source].style]
        frames = sample.frames if self._at_own_lengths else self._whole
        (tokens,) = generator([Heard(torch.from_numpy(sample.waveform), frames, prompt)])
        return self.captioner.decode(tokens)

    @property
    def _at_own_lengths(self) -> bool:
        return self.config.data.window == "own"

    @property
    def _whole(self) -> int:
        """Mel frames of the model's window."""
        return self.loaders.windows.whole

    @property
    def _windows_at_once(self) -> int:
        """Samples of a forward pass of the validation."""
        return max(1, int(self.size.seconds / self.size.window_seconds))

    @property
    def _names(self) -> list[str]:
        return [source.name for source in self.config.data.sources]

    def _check_usable(
        self, rows_by_source: list[list[int]], totals: SourceTotals, rejected: list[Rejected]
    ) -> None:
        """Raise UnusableData, PeerFailed on the ranks but 0, if nothing of a source could be used."""
        for name, rows, tokens in zip(self._names, rows_by_source, totals.tokens.tolist(), strict=True):
            if rows and not tokens:
                of_source = [sample for sample in rejected if sample.source == name]
                self.before_leaving()
                reasons = self.records.explain(of_source)
                raise UnusableData(
                    f"source {name}: none of its {len(rows)} validation samples can be used, and a loss of"
                    " nothing is none; mend them, or choose others by"
                    f" data.sources.{name}.validation.{reasons}"
                )
