"""What becomes known of samples when their content is read: written down before the step is taken."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

import torch

from configs.errors import PeerFailed, UnusableData
from configs.run.events import CaptionCut
from configs.run.folder import RunDir
from configs.run.quarantine import Unusable, without_numbers
from configs.schema import Data
from data.batch import Sample
from data.captions import IGNORED
from data.loader import Step
from data.samples import Rejected
from trainer.distributed import World
from trainer.tally import Complaint

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
        self._held_out: set[str] = set()
        """Keys of those among them that are for validation."""
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
                if step is None:
                    self._held_out.add(sample.key)
                self._run.quarantine.add(
                    Unusable(self._attempt, self._world.rank, sample.key, sample.reason, step)
                )

    def bad_by_source(self) -> Counter[str]:
        """Samples with bad content that this rank has met in this attempt, by name of the source."""
        return Counter(sample.source for sample in self._unusable.values() if sample.bad)

    def refuse(self, complaint: Complaint) -> NoReturn:
        """Raise UnusableData with the commonest reasons of what is complained of, PeerFailed on the ranks but
        0. All ranks call it."""
        reasons = self.explain(
            [
                sample
                for sample in self._unusable.values()
                if sample.key not in self._held_out
                and (sample.bad or not complaint.only_bad)
                and complaint.source in ("", sample.source)
            ]
        )
        raise UnusableData(f"{complaint.what}.{reasons}")

    def explain(self, rejected: Sequence[Rejected]) -> str:
        """The commonest reasons over all ranks, each with an example, and what to do, on lines of their own.
        All ranks call it; rank 0 gets the text, on the others it raises PeerFailed."""
        by_rank = self._world.gather(list(rejected))
        if by_rank is None:
            raise PeerFailed("samples could not be used; rank 0 says why")
        alike: dict[str, list[Rejected]] = {}
        met = {sample.key: sample for sample in itertools.chain(*by_rank)}  # an epoch later by another rank
        for sample in met.values():
            alike.setdefault(without_numbers(sample.reason), []).append(sample)
        commonest = sorted(alike.items(), key=lambda item: -len(item[1]))[:REASONS_SHOWN]
        lines = [""]
        for words, samples in commonest:
            reasons = {sample.reason for sample in samples}
            reason = reasons.pop() if len(reasons) == 1 else words
            lines.append(f"{len(samples)} x {reason}, e.g. {samples[0].key}")
        lines.append(f"All are named in {self._run.quarantine.folder}")
        if any("caption under" in reason for reason in alike):
            lines[-1] += "; is data.sources.NAME.caption_key right?"
        left_out = [words for words, samples in commonest if not all(sample.bad for sample in samples)]
        if any("the audio" in words for words in left_out):
            lines.append(
                "Long clips are left out, as the config says: data.overlong=start (or crop) takes a part of"
                " each; a full index (`python -m tools.index CONFIG`) leaves them out in advance, so that"
                " steps are full"
            )
        if any("the caption" in words for words in left_out):
            lines.append(
                "Long captions are left out, as the config says: data.long_caption=truncate takes the"
                " beginning of each"
            )
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
