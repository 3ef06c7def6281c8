"""What becomes known of samples when their content is read: written down before the step is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

import torch

from configs.errors import DataError, PeerFailed
from configs.run.events import CaptionCut
from configs.run.folder import RunDir
from configs.run.quarantine import Unusable
from configs.schema import Data
from data.batch import Sample
from data.captions import IGNORED
from data.loader import Step
from data.samples import Rejected
from trainer.distributed import World

LEAST_COUNTED = 1000
"""Samples from which on `data.max_bad_fraction` counts; of fewer, one would be too many."""
REASONS_SHOWN = 3


class SampleRecords:
    """Of this rank's samples: tokens of their captions, unusable ones, captions cut off, and the audit."""

    def __init__(
        self, data: Data, run: RunDir, attempt: int, world: World, caption_tokens: torch.Tensor
    ) -> None:
        """caption_tokens: (vocabulary,) bool, the tokens that occurred in captions before."""
        self.caption_tokens = caption_tokens
        """(vocabulary,) bool: the tokens that occurred in captions, of all ranks as of `share_tokens`."""
        self._data, self._run, self._attempt, self._world = data, run, attempt, world
        self._unusable: dict[str, Rejected] = {}
        """Samples that this rank could not use in this attempt, by key."""
        self._sources_cut: set[int] = set()
        """Numbers of the sources of which a caption was cut off in this attempt."""

    def note(self, step: Step) -> None:
        """Write down what is known of a step of training, before it is taken."""
        for sample in step.samples:
            learnt = [token for token in sample.tokens.labels if token != IGNORED]
            self.caption_tokens[learnt] = True
        self.quarantine(step.rejected, step.number)
        self._note_cut(step.samples)
        if self._data.audit:
            entry: dict[str, object] = {
                "step": step.number,
                "attempt": self._attempt,
                "rank": self._world.rank,
                "keys": [sample.key for sample in step.samples],
                "lanes": step.lanes,
            }
            if step.rejected:
                entry["rejected"] = [sample.key for sample in step.rejected]
            self._run.audit.append(entry)

    def quarantine(self, rejected: Sequence[Rejected], step: int | None) -> None:
        """Name samples that could not be used, each once per attempt. step: None for validation."""
        for sample in rejected:
            if sample.key not in self._unusable:
                self._unusable[sample.key] = sample
                self._run.quarantine.add(
                    Unusable(self._attempt, self._world.rank, sample.key, sample.reason, step)
                )

    def bad_by_source(self) -> Counter[str]:
        """Samples with bad content that this rank has met in this attempt, by name of the source."""
        return Counter(sample.key.partition("/")[0] for sample in self._unusable.values() if sample.bad)

    def too_many_bad(self, bad: int, samples: int) -> bool:
        """Whether more of an attempt's samples are bad, over all ranks, than `data.max_bad_fraction`
        allows."""
        return bad > self._data.max_bad_fraction * max(LEAST_COUNTED, samples)

    def raise_bad(self, bad: int) -> NoReturn:
        """Raise DataError with the commonest reasons, PeerFailed on the ranks but 0. All ranks call it."""
        reasons = self.explain([sample for sample in self._unusable.values() if sample.bad])
        fraction = self._data.max_bad_fraction
        raise DataError(
            f"{bad} samples could not be used, more than data.max_bad_fraction={fraction:g} allows. {reasons}"
        )

    def explain(self, rejected: Sequence[Rejected]) -> str:
        """The commonest reasons over all ranks, each with an example. All ranks call it; rank 0 gets the
        text, on the others it raises PeerFailed."""
        by_rank = self._world.gather([(sample.reason, sample.key) for sample in rejected])
        if by_rank is None:
            raise PeerFailed("samples could not be used; rank 0 says why")
        keys: dict[str, list[str]] = {}
        for of_rank in by_rank:
            for reason, key in of_rank:
                keys.setdefault(reason, []).append(key)
        commonest = sorted(keys.items(), key=lambda item: -len(item[1]))[:REASONS_SHOWN]
        lines = ["Reasons:"]
        lines += [f"{len(examples)} x {reason}, e.g. {examples[0]}" for reason, examples in commonest]
        lines.append(f"All are named in {self._run.quarantine.folder}")
        if any("caption under" in reason for reason in keys):
            lines[-1] += "; is data.sources.NAME.caption_key right?"
        return "\n  ".join(lines)

    def share_tokens(self) -> None:
        """Let all ranks know which tokens occurred in the captions of any of them. All ranks call it."""
        self.caption_tokens = self._world.any_of_each(self.caption_tokens)

    def _note_cut(self, samples: Sequence[Sample]) -> None:
        """Say it once for each source that captions are cut off because they are too long: in this rank's
        output, and in the ledger."""
        for sample in samples:
            if not sample.tokens.cut or sample.source in self._sources_cut:
                continue
            self._sources_cut.add(sample.source)
            what = (
                f"{sample.key}: its caption is {sample.tokens.cut} tokens too long; they are cut off"
                " (data.long_caption=skip leaves such samples out)"
            )
            print(f"{what}; further ones of this source are not named", flush=True)
            self._run.ledger.record(CaptionCut(attempt=self._attempt, rank=self._world.rank, what=what))
