"""Validation: loss per source, and captions of a fixed panel of clips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from configs.errors import DataError
from configs.schema import RunConfig
from data.batch import Sample, collate
from data.captions import LANGUAGE, TASK
from data.features import log_mel
from data.loader import Loader, Step
from data.samples import Rejected
from trainer.distributed import World
from trainer.loaders import Loaders
from trainer.loss import SourceTotals, token_losses
from trainer.model import Captioner
from trainer.records import SampleRecords

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
    dtype: torch.dtype
    """Type of the weights that compute."""

    @torch.no_grad()
    def loss(self, module: torch.nn.Module, fetch: Fetch) -> dict[str, float] | None:
        """Mean loss of a caption token over all validation samples (`validation/loss`) and by source
        (`validation/loss/SOURCE`).

        Empty without validation samples; None where the ranks leave off. Raises DataError if none of a
        source's validation samples can be used.
        """
        rows_by_source = self.loaders.validation_rows(self.config.evaluate.max_samples)
        rows = [row for rows in rows_by_source for row in rows]
        totals = SourceTotals.zeros(len(self._names), self.world.device)
        rejected: list[Rejected] = []
        frames, mels = self.loaders.order.frames, self.captioner.config.num_mel_bins
        module.eval()
        with closing(self.loaders.validation(rows, self.config.batch.micro_size)) as loader:
            for _ in loader.steps:
                step = fetch(loader)
                if step is None:
                    module.train()
                    return None
                self.records.quarantine(step.rejected, None)
                rejected += step.rejected
                batch = collate(step.samples, frames, self.captioner.pad_id).to(self.world.device)
                totals.add(batch, token_losses(module, batch, mels, self.dtype))
        module.train()
        totals = totals.over_ranks(self.world)
        self._check_usable(rows_by_source, totals, rejected)
        return totals.means(self._names, "validation/loss")

    @torch.no_grad()
    def captions(self, module: torch.nn.Module, fetch: Fetch) -> list[PanelClip] | None:
        """Captions of the panel: as many validation clips of each source. Rank 0 gets them, the others an
        empty list; None where the ranks leave off."""
        wanted = self.config.evaluate.captions
        rows_by_source = self.loaders.validation_rows(-(-wanted // len(self._names)))
        in_turn = [rows[turn] for turn in range(wanted) for rows in rows_by_source if turn < len(rows)]
        self.records.share_tokens()
        clips = []
        with closing(self.loaders.validation(in_turn[:wanted], per_rank=1)) as loader:
            for _ in loader.steps:
                step = fetch(loader)
                if step is None:
                    return None
                clips += [PanelClip(clip, self.caption(module, clip)) for clip in step.samples]
        by_rank = self.world.gather(clips) or []
        return [panel[turn] for turn in range(wanted) for panel in by_rank if turn < len(panel)]

    def caption(self, module: torch.nn.Module, sample: Sample) -> str:
        """The caption that a model gives a clip, greedily."""
        config = self.captioner.model.generation_config
        learnt = self.records.caption_tokens
        suppressed = [token for token in config.suppress_tokens or [] if not learnt[token]]
        waveform = torch.from_numpy(sample.waveform)[None].to(self.world.device)
        lengths = torch.tensor([len(sample.waveform)], device=waveform.device)
        mels = self.captioner.config.num_mel_bins
        features = log_mel(waveform, lengths, self.loaders.order.frames, mels).to(self.dtype)
        prompt = self.loaders.encoder.prompts[self.config.data.sources[sample.source].style]
        spoken = {}
        if getattr(config, "is_multilingual", False):
            spoken = {"language": LANGUAGE, "task": TASK}
        chosen = copy.deepcopy(config)
        chosen.suppress_tokens = suppressed or [-1]  # none; an empty list would be filled up with the model's
        chosen.max_length = self.captioner.config.max_target_positions
        module.eval()
        tokens = module.generate(  # type: ignore[operator]
            features,
            generation_config=chosen,
            prompt_ids=torch.tensor(prompt, device=waveform.device) if prompt else None,
            **spoken,
        )
        module.train()
        return str(self.captioner.processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()

    @property
    def _names(self) -> list[str]:
        return [source.name for source in self.config.data.sources]

    def _check_usable(
        self, rows_by_source: list[list[int]], totals: SourceTotals, rejected: list[Rejected]
    ) -> None:
        """Raise DataError, PeerFailed on the ranks but 0, if nothing of a source could be used."""
        for name, rows, tokens in zip(self._names, rows_by_source, totals.tokens.tolist(), strict=True):
            if rows and not tokens:
                of_source = [sample for sample in rejected if sample.key.startswith(f"{name}/")]
                reasons = self.records.explain(of_source)
                raise DataError(
                    f"source {name}: none of its {len(rows)} validation samples can be used. {reasons}"
                )
