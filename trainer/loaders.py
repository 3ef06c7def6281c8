"""The loaders of a run on this rank: training from any step on, and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from configs.cores import decoding_threads
from configs.run.crash_journal import CrashJournal
from configs.schema import RunConfig
from data import storage
from data.augment import Augmentation
from data.balance import Balance, Work, is_possible
from data.cache import Cache
from data.captions import CaptionEncoder
from data.dataset import Dataset
from data.decode import SAMPLE_RATE
from data.loader import Loader, Read
from data.order import Ints, Listed, Order, Plan, rank_lanes
from data.samples import SampleReader
from data.windows import Windows
from trainer.distributed import World
from trainer.flops import step_flops

if TYPE_CHECKING:
    from transformers import WhisperConfig

VALIDATION_AHEAD_MB = 64
"""Megabytes of validation samples that are read ahead, at most: what training has read ahead stays in
memory."""
CAPTION_TOKENS = 32
"""Tokens of a caption, about, where only the length of its clip is known."""


def sample_work(
    model: WhisperConfig,
    windows: Windows,
    seconds: npt.NDArray[np.float32],
    longest: float,
    augmentation: Augmentation | None = None,
) -> Work:
    """The work of samples in FLOPs. seconds: (n,) of all samples of the index; longest: seconds that are used
    of a clip."""
    by_positions = np.array(
        [step_flops(model, positions, CAPTION_TOKENS) for positions in range(windows.whole // 2 + 1)],
        np.int64,
    )

    def length_of(rows: Ints) -> Ints:
        used = np.minimum(seconds[rows].astype(np.float64), longest)
        return np.rint(used * SAMPLE_RATE).astype(np.int64)

    def work(rows: Ints, epoch: int) -> Ints:
        lengths = augmentation.lengths(length_of, rows, epoch) if augmentation else length_of(rows)
        return by_positions[windows.frames(lengths, rows, epoch) // 2]

    return work


@dataclass(frozen=True)
class Loaders:
    """Makes loaders. crash_journal: what this rank is decoding; poisoned: keys of the samples whose decoder
    crashed or never ended before; model: its shape says how much work a clip is."""

    config: RunConfig
    world: World
    dataset: Dataset
    encoder: CaptionEncoder
    order: Order
    windows: Windows
    crash_journal: CrashJournal
    poisoned: frozenset[str]
    model: WhisperConfig

    def training(self, steps: range) -> Loader:
        """Steps of training: what this rank takes of the global batch."""
        lanes = rank_lanes(self.world.rank, self.world.size, self.config.batch.global_size)
        ahead = self.config.data.read_ahead_mb
        reader = self._reader(validation=False)
        return self._loader(reader, self.order, lanes, steps, ahead, self._balance())

    def validation(self, rows: Sequence[int], per_rank: int) -> Loader:
        """Validation samples: each step has the next `per_rank` for each rank, on all ranks as many steps."""
        listed = Listed(rows, per_rank * self.world.size)
        lanes = range(self.world.rank * per_rank, (self.world.rank + 1) * per_rank)
        ahead = min(self.config.data.read_ahead_mb, VALIDATION_AHEAD_MB)
        return self._loader(self._reader(validation=True), listed, lanes, range(listed.steps), ahead)

    def validation_rows(self, per_source: int) -> list[list[int]]:
        """Up to `per_source` samples of each source's validation part, spread evenly over it, by source."""
        source = self.dataset.validation.column("source")
        by_source = []
        for number in range(len(self.config.data.sources)):
            rows = (source == number).nonzero()[0]
            count = min(per_source, len(rows))
            by_source.append(rows[np.linspace(0, len(rows) - 1, count).astype(int)].tolist())
        return by_source

    def _balance(self) -> Balance | None:
        """How samples are dealt to ranks; None where each keeps those of its lanes. Rank 0 says so where a
        full index would change that."""
        if not is_possible(self.config, self.world.size):
            return None
        seconds = self.dataset.training.column("seconds")
        unknown = int(np.isnan(seconds).sum())
        if unknown:
            if self.world.rank == 0:
                print(
                    f"the lengths of {unknown:,} of {len(seconds):,} clips are unknown (quick index): at"
                    " every step all ranks wait for the one with the longest clips. A full index, made"
                    " by `python -m tools.index CONFIG` before a run begins, gives them nearly the same work"
                    " (docs/benchmarks.md, Balance)",
                    flush=True,
                )
            return None
        work = sample_work(self.model, self.windows, seconds, self._longest, self._augmentation)
        return Balance(work, self.world.rank, self.world.size, self.config.batch.global_size)

    @property
    def _longest(self) -> float:
        """Seconds of a clip that are used, at most."""
        window_seconds = self.windows.whole / 100
        return min(window_seconds, self.config.data.max_seconds or window_seconds)

    @property
    def _augmentation(self) -> Augmentation | None:
        """Of training; None where it is off."""
        settings = self.config.data.augment
        if not settings.is_on:
            return None
        shard = self.dataset.training.column("shard")
        return Augmentation(settings, self.config.run.seed, shard, round(self._longest * SAMPLE_RATE))

    def _reader(self, *, validation: bool) -> SampleReader:
        data = self.config.data
        return SampleReader(
            self.dataset.validation if validation else self.dataset.training,
            self.encoder,
            windows=replace(self.windows, share=0.0) if validation else self.windows,
            max_seconds=self._longest,
            overlong=data.overlong,
            seed=self.config.run.seed,
            crash_journal=self.crash_journal,
            poisoned=self.poisoned,
            always_alike=validation,
            style_drop=0.0 if validation else data.style_drop,
            augmentation=None if validation else self._augmentation,
        )

    def _loader(
        self,
        reader: SampleReader,
        plan: Plan,
        lanes: range,
        steps: range,
        ahead_mb: int,
        balance: Balance | None = None,
    ) -> Loader:
        return Loader(
            reader,
            plan,
            lanes,
            steps,
            threads=decoding_threads(self.config.data),
            read_ahead_mb=ahead_mb,
            balance=balance,
            read=self._read,
        )

    @cached_property
    def _read(self) -> Read:
        """Reads a range of a shard; one cache for all loaders."""
        data = self.config.data
        return Cache(data.cache_dir, data.cache_gb).read if data.cache_dir else storage.read
