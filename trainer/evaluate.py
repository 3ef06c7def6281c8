"""Validation: loss per source, and captions of a fixed panel of clips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import DataError
from data.batch import Sample, collate
from data.captions import LANGUAGE, TASK
from data.features import log_mel
from data.loader import Loader, Step
from data.samples import Rejected
from trainer.loss import count_tokens, token_losses
from trainer.session import Session

Take = Callable[[Loader], Step | None]
"""Gives the next step of a loader once all ranks have theirs, None where they leave off. Raises on all ranks
if one has failed. All ranks call it at the same point."""


@dataclass(frozen=True)
class PanelClip:
    """A clip of the panel with what the model says of it."""

    sample: Sample
    caption: str


def validation_rows(session: Session, per_source: int) -> list[list[int]]:
    """Up to `per_source` samples of each source's validation part, spread evenly over it, by source."""
    source = session.dataset.validation.column("source")
    by_source = [(source == number).nonzero()[0] for number in range(len(session.config.data.sources))]
    return [
        rows[np.linspace(0, len(rows) - 1, min(per_source, len(rows))).astype(int)].tolist()
        for rows in by_source
    ]


@torch.no_grad()
def validation_loss(session: Session, module: torch.nn.Module, take: Take) -> dict[str, float] | None:
    """Mean loss of a caption token over all validation samples (`validation/loss`) and by source
    (`validation/loss/SOURCE`).

    Empty without validation samples; None where the ranks leave off. Raises DataError if none of a source's
    validation samples can be used.
    """
    world, names = session.world, [source.name for source in session.config.data.sources]
    by_source = validation_rows(session, session.config.evaluate.max_samples)
    rows = [row for of_source in by_source for row in of_source]
    mels = session.captioner.config.num_mel_bins
    losses = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    tokens = torch.zeros_like(losses)
    rejected: list[Rejected] = []
    module.eval()
    with closing(session.validation_loader(rows, session.config.batch.micro_size)) as loader:
        for _ in loader.steps:
            step = take(loader)
            if step is None:
                module.train()
                return None
            session.quarantine(step.rejected, validation=True)
            rejected += step.rejected
            batch = collate(step.samples, session.order.frames, session.pad_id).to(world.device)
            losses.index_add_(
                0, batch.source, token_losses(module, batch, mels, session.engine.dtype).double()
            )
            tokens.index_add_(0, batch.source, count_tokens(batch).double())
    module.train()
    summed = world.sum([*losses.tolist(), *tokens.tolist()])
    sums = list(zip(names, summed[: len(names)], summed[len(names) :], strict=True))
    for wanted, (name, _, count) in zip(by_source, sums, strict=True):
        if wanted and not count:
            reasons = session.explain([one for one in rejected if one.key.startswith(f"{name}/")])
            raise DataError(
                f"source {name}: none of its {len(wanted)} validation samples can be used. {reasons}"
            )
    metrics = {f"validation/loss/{name}": loss / count for name, loss, count in sums if count}
    total = sum(count for *_, count in sums)
    return {"validation/loss": sum(loss for _, loss, _ in sums) / total, **metrics} if total else {}


@torch.no_grad()
def caption_panel(session: Session, module: torch.nn.Module, take: Take) -> list[PanelClip] | None:
    """Caption the panel: as many validation clips of each source. All ranks take part, rank 0 gets the clips.
    None where the ranks leave off."""
    world, wanted = session.world, session.config.evaluate.captions
    by_source = validation_rows(session, -(-wanted // len(session.config.data.sources)))
    turns = [rows[turn] for turn in range(wanted) for rows in by_source if turn < len(rows)][:wanted]
    session.share_caption_tokens()
    clips = []
    with closing(session.validation_loader(turns, per_rank=1)) as loader:
        for _ in loader.steps:
            step = take(loader)
            if step is None:
                return None
            clips += [PanelClip(clip, generate(session, module, clip)) for clip in step.samples]
    gathered = world.gather(clips)
    panels: list[list[PanelClip]] = gathered or []  # type: ignore[assignment]
    return [panel[turn] for turn in range(wanted) for panel in panels if turn < len(panel)]


def generate(session: Session, model: torch.nn.Module, sample: Sample) -> str:
    """The caption that the model gives a clip, greedily."""
    captioner = session.captioner
    config = captioner.model.generation_config
    kept = [token for token in config.suppress_tokens or [] if not session.caption_tokens[token]]
    waveform = torch.from_numpy(sample.waveform)[None].to(session.world.device)
    lengths = torch.tensor([len(sample.waveform)], device=waveform.device)
    features = log_mel(waveform, lengths, session.order.frames, captioner.config.num_mel_bins).to(
        session.engine.dtype
    )
    style = session.config.data.sources[sample.source].style
    prompt = session.encoder.prompts[style]
    spoken = {"language": LANGUAGE, "task": TASK} if getattr(config, "is_multilingual", False) else {}
    chosen = copy.deepcopy(config)
    chosen.suppress_tokens = kept or [-1]  # none; an empty list would be filled up with the model's
    chosen.max_length = captioner.config.max_target_positions
    model.eval()
    tokens = model.generate(  # type: ignore[operator]
        features,
        generation_config=chosen,
        prompt_ids=torch.tensor(prompt, device=waveform.device) if prompt else None,
        **spoken,
    )
    model.train()
    return str(captioner.processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()
