"""How much of a clip's surroundings the encoder sees: the clip alone, or the model's whole window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import RunConfig
from data.order import WHOLE, Ints, is_chosen

HOP = 160
"""Samples at 16 kHz from one mel frame to the next: 10 ms."""


@dataclass(frozen=True)
class Windows:
    """How many mel frames the encoder takes of a clip: as many as the clip has, or the model's whole window.

    whole: mel frames of the model's window; share: of the samples that are padded to it.
    """

    whole: int
    share: float
    seed: int

    @classmethod
    def of(cls, config: RunConfig, whole: int) -> Windows:
        """Those of a run's training."""
        share = config.data.full_share if config.data.window == "own" else 1.0
        return cls(whole, share, config.run.seed)

    def frames(self, lengths: npt.ArrayLike, rows: npt.ArrayLike, epoch: int) -> Ints:
        """Mel frames of samples, (n,), an even number. lengths: (n,) in samples at 16 kHz; rows: (n,) theirs
        in the index. The samples that are padded are others in each epoch, whatever the number of ranks."""
        own = np.clip(-(-np.asarray(lengths, np.int64) // (2 * HOP)), 1, self.whole // 2) * 2
        return np.where(is_chosen(rows, self.share, self.seed, WHOLE, epoch), self.whole, own)
