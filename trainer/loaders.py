"""The loaders of a run on this rank: training from any step on, and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from configs.cores import decoding_threads
from configs.run.crash_journal import CrashJournal
from configs.schema import RunConfig
from data import storage
from data.cache import Cache
from data.captions import CaptionEncoder
from data.dataset import Dataset
from data.loader import Loader, Read
from data.order import Listed, Order, Plan, rank_lanes
from data.samples import SampleReader
from data.windows import Windows
from trainer.distributed import World

VALIDATION_AHEAD_MB = 64
"""Megabytes of validation samples that are read ahead, at most: what training has read ahead stays in
memory."""


@dataclass(frozen=True)
class Loaders:
    """Makes loaders. crash_journal: what this rank is decoding; poisoned: keys of the samples whose decoder
    crashed or never ended before."""

    config: RunConfig
    world: World
    dataset: Dataset
    encoder: CaptionEncoder
    order: Order
    windows: Windows
    crash_journal: CrashJournal
    poisoned: frozenset[str]

    def training(self, steps: range) -> Loader:
        """Steps of training, for this rank's lanes of the global batch."""
        lanes = rank_lanes(self.world.rank, self.world.size, self.config.batch.global_size)
        ahead = self.config.data.read_ahead_mb
        return self._loader(self._reader(validation=False), self.order, lanes, steps, ahead)

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

    def _reader(self, *, validation: bool) -> SampleReader:
        data = self.config.data
        window_seconds = self.windows.whole / 100
        return SampleReader(
            self.dataset.validation if validation else self.dataset.training,
            self.encoder,
            windows=replace(self.windows, share=0.0) if validation else self.windows,
            max_seconds=min(window_seconds, data.max_seconds or window_seconds),
            overlong=data.overlong,
            seed=self.config.run.seed,
            crash_journal=self.crash_journal,
            poisoned=self.poisoned,
            same_crops=validation,
        )

    def _loader(self, reader: SampleReader, plan: Plan, lanes: range, steps: range, ahead_mb: int) -> Loader:
        threads = decoding_threads(self.config.data)
        return Loader(reader, plan, lanes, steps, threads=threads, read_ahead_mb=ahead_mb, read=self._read)

    @cached_property
    def _read(self) -> Read:
        """Reads a range of a shard; one cache for all loaders."""
        data = self.config.data
        return Cache(data.cache_dir, data.cache_gb).read if data.cache_dir else storage.read
