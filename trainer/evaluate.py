"""Validation: what an evaluation is made with, and the loss by source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

Fetch = Callable[[Loader], Step]
"""Gives the next step of a loader once all ranks have theirs. Raises LeftOff where they leave off, and on all
ranks if one has failed. All ranks call it at the same point."""


class LeftOff(Exception):
    """The ranks leave an evaluation off: they were asked to stop, or a later attempt has taken over."""


@dataclass(frozen=True)
class Setup:
    """What an evaluation is made with, on this rank."""

    config: RunConfig
    world: World
    captioner: Captioner
    loaders: Loaders
    records: SampleRecords
    size: Size
    """Of a forward pass."""
    dtype: torch.dtype
    """Type of the weights that compute."""

    @property
    def names(self) -> list[str]:
        """Of the sources, by their numbers."""
        return [source.name for source in self.config.data.sources]

    @property
    def at_own_lengths(self) -> bool:
        """Whether clips are trained at their own lengths."""
        return self.config.data.window == "own"

    def steps(self, rows: Sequence[int], per_rank: int, fetch: Fetch) -> Iterator[Step]:
        """Validation samples, `per_rank` for each rank in a step; those that cannot be used are noted. Raises
        as `fetch` does."""
        with closing(self.loaders.validation(rows, per_rank)) as loader:
            for _ in loader.steps:
                step = fetch(loader)
                self.records.quarantine(step.rejected, None)
                yield step

    def padded(self, sample: Sample) -> Sample:
        """The same clip in the model's whole window."""
        return replace(sample, frames=self.loaders.windows.whole)

    def as_captioned(self, sample: Sample) -> Sample:
        """The same clip in the window that the model captions it in: as it is trained."""
        return sample if self.at_own_lengths else self.padded(sample)

    def heard(self, sample: Sample) -> Heard:
        """What the model is given of a clip to caption it."""
        style = self.config.data.sources[sample.source].style
        return Heard(torch.from_numpy(sample.waveform), sample.frames, self.loaders.encoder.prompts[style])

    def generator(self, module: Whisper) -> Generator:
        """Captions clips, without the tokens that Whisper bans and no caption has had."""
        from transformers import GenerationConfig

        generation = GenerationConfig.from_dict(self.captioner.generation)
        learnt = self.records.caption_tokens
        suppressed = [token for token in generation.suppress_tokens or [] if not learnt[token]]
        generation.suppress_tokens = suppressed or None
        generation.max_length = self.captioner.config.max_target_positions
        return Generator(module, generation)


@dataclass(frozen=True)
class Evaluator:
    """Measures the loss of a run's validation samples. All ranks call it at the same point."""

    setup: Setup
    before_leaving: Callable[[], None]
    """Called by all ranks before they leave together, as nothing of a source could be used."""

    @property
    def samples(self) -> int:
        """How many clips the loss is of."""
        return sum(map(len, self._rows_by_source))

    @property
    def _rows_by_source(self) -> list[list[int]]:
        return self.setup.loaders.validation_rows(self.setup.config.evaluate.max_samples)

    @torch.no_grad()
    def loss(self, module: Whisper, fetch: Fetch) -> dict[str, float]:
        """Mean loss of a caption token over all validation samples (`validation/loss`) and by source
        (`validation/loss/SOURCE`), each clip padded to the whole window, as programs that use the export do;
        where clips are trained at their own lengths, the same at these (`validation/loss_own`), too.

        Empty without validation samples. Raises UnusableData if none of a source's validation samples can be
        used, and as `fetch` does.
        """
        setup, rows_by_source = self.setup, self._rows_by_source
        rows = [row for rows in rows_by_source for row in rows]
        at_full, at_own = (SourceTotals.zeros(len(setup.names), setup.world.device) for _ in range(2))
        rejected: list[Rejected] = []
        for step in setup.steps(rows, self._windows_at_once, fetch):
            rejected += step.rejected
            self._add(at_full, module, [setup.padded(clip) for clip in step.samples])
            if setup.at_own_lengths:
                self._add(at_own, module, step.samples)
        at_full, at_own = at_full.over_ranks(setup.world), at_own.over_ranks(setup.world)
        self._check_usable(rows_by_source, at_full, rejected)
        return at_full.means(setup.names, "validation/loss") | at_own.means(
            setup.names, "validation/loss_own"
        )

    def _add(self, totals: SourceTotals, module: Whisper, samples: list[Sample]) -> None:
        setup = self.setup
        batch = collate(samples).to(setup.world.device)
        totals.add(batch, token_losses(module, batch, setup.captioner.config, setup.dtype))

    @property
    def _windows_at_once(self) -> int:
        """Samples of a forward pass of the validation."""
        return max(1, int(self.setup.size.seconds / self.setup.size.window_seconds))

    def _check_usable(
        self, rows_by_source: list[list[int]], totals: SourceTotals, rejected: list[Rejected]
    ) -> None:
        """Raise UnusableData, PeerFailed on the ranks but 0, if nothing of a source could be used."""
        by_source = totals.tokens.tolist()
        for name, rows, tokens in zip(self.setup.names, rows_by_source, by_source, strict=True):
            if rows and not tokens:
                of_source = [sample for sample in rejected if sample.source == name]
                self.before_leaving()
                reasons = self.setup.records.explain(of_source)
                raise UnusableData(
                    f"source {name}: none of its {len(rows)} validation samples can be used, and a loss of"
                    " nothing is none; mend them, or choose others by"
                    f" data.sources.{name}.validation.{reasons}"
                )
