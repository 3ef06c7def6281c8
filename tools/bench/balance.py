"""The benchmark of balance: the planner of a run, on made clips of seven sources with the reference's mix of
lengths. Nothing is read."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import WhisperConfig

from configs.schema import RunConfig
from data.augment import Augmentation
from data.balance import Balance, Work, deal, is_possible
from data.decode import SAMPLE_RATE
from data.loader import Loader
from data.location import Location
from data.order import Ints, Order, cut_runs, rank_lanes
from data.samples import SampleReader
from data.sources import Shard
from data.windows import Windows
from tools.bench.report import Figures
from trainer.loaders import sample_work

SHARES = {
    "audioset": 0.56,
    "music": 0.08,
    "freesound": 0.12,
    "clotho": 0.06,
    "speech": 0.10,
    "events": 0.06,
    "effects": 0.02,
}
"""Of all samples, by source."""
LONGEST = 30.0
"""Seconds of the model's window."""
FRAMES = 3000
BYTES_PER_SECOND = 20_000
"""Of FLAC with 16 kHz, about."""
SAMPLES_PER_SHARD = 1000
READING_RANKS = 4
"""Ranks whose reads are planned, at most: they are much alike."""
TURBO = WhisperConfig(
    d_model=1280,
    encoder_layers=32,
    decoder_layers=4,
    encoder_ffn_dim=5120,
    decoder_ffn_dim=5120,
    num_mel_bins=128,
    vocab_size=51_866,
)
"""The shape of whisper-large-v3-turbo."""
NOT_NEEDED: Any = None
"""What reading would need, and planning does not."""


class Clips:
    """Samples as the merged index of a run has them."""

    def __init__(self, count: int, seed: int) -> None:
        """count: of samples, in all sources."""
        random = np.random.default_rng(seed)
        parts = [_seconds(name, round(share * count), random) for name, share in SHARES.items()]
        lengths = [len(part) for part in parts]
        seconds = np.concatenate(parts).astype(np.float32)
        audio = np.rint(seconds * BYTES_PER_SECOND * random.uniform(0.6, 1.4, len(seconds))).astype(np.int64)
        within = np.concatenate([np.arange(length) for length in lengths])
        is_first = within % SAMPLES_PER_SHARD == 0
        shard = np.cumsum(is_first) - 1
        ends = np.cumsum(2048 + audio)  # two headers, the text in a block
        ends -= np.repeat((ends - audio - 2048)[is_first], np.bincount(shard))
        self._columns = {
            "source": np.repeat(np.arange(len(parts)), lengths),
            "shard": shard,
            "seconds": seconds,
            "audio_offset": ends - audio,
            "audio_size": audio,
            "text_offset": ends - audio - 1024,
            "text_size": np.full(len(seconds), 300),
            "crc32": np.zeros(len(seconds), np.int64),
            "caption": np.full(len(seconds), -1),
        }
        self.shards = [
            Shard(NOT_NEEDED, Location(f"shard-{number}.tar")) for number in range(int(is_first.sum()))
        ]

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers."""
        return self._columns[name]


def _seconds(source: str, count: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Lengths of a source's clips, (count,)."""
    match source:
        case "audioset":
            return np.full(count, 10.0)
        case "music":
            return np.full(count, LONGEST)
        case "freesound":
            return random.lognormal(1.8, 1.1, count).clip(0.5, LONGEST)
        case "clotho":
            return random.normal(8, 2, count).clip(2, LONGEST)
        case "effects":
            return random.normal(4, 1, count).clip(1, 8)
        case _:
            return random.uniform(2, LONGEST, count)


@dataclass(frozen=True)
class Planned:
    """What one rank has planned of some steps."""

    samples: int
    requests: int
    first_seconds: float
    """CPU time until the first step is planned."""
    seconds: float
    """CPU time until all are."""


class Course:
    """A run on made clips whose steps are planned on any number of ranks."""

    def __init__(self, samples: int, steps: int, config: RunConfig) -> None:
        """samples: of the index; steps: that are planned, from the first one on."""
        self.config, self.steps = config, steps
        self.lanes = config.batch.global_size
        clips = Clips(samples, seed=0)
        index: Any = clips
        windows = Windows.of(config, FRAMES)
        augmentation = Augmentation(
            config.data.augment, 0, clips.column("shard"), round(LONGEST * SAMPLE_RATE)
        )
        self.reader = SampleReader(
            index,
            NOT_NEEDED,
            windows=windows,
            max_seconds=LONGEST,
            overlong="skip",
            seed=0,
            crash_journal=NOT_NEEDED,
            augmentation=augmentation,
        )
        runs = cut_runs(clips.column("shard"), clips.column("audio_size"), self.lanes)
        self.order = Order(
            runs=runs,
            run_source=clips.column("source")[runs[:-1]],
            weights=[1.0] * len(SHARES),
            seed=0,
            global_batch=self.lanes,
            shuffle_window=config.data.shuffle_window,
        )
        self.work: Work = sample_work(TURBO, windows, clips.column("seconds"), LONGEST, augmentation)
        rows = self.order.lanes(0, range(self.lanes))[:, :steps]
        self._work_of_steps: Ints = self.work(rows.ravel(), 0).reshape(rows.shape)

    def measure(self, ranks: int) -> Figures:
        """How even `ranks` ranks are, and what it costs."""
        lanes_of = [len(rank_lanes(rank, ranks, self.lanes)) for rank in range(ranks)]
        home = np.repeat(np.arange(ranks), lanes_of)[:, None]
        taker = deal(self._work_of_steps, ranks)
        kept = self._plan(ranks, is_balanced=False)
        dealt = self._plan(ranks, is_balanced=is_possible(self.config, ranks))
        balanced = self._fullest(taker, ranks)
        return {
            "fullest_as_shuffled": float(self._fullest(np.broadcast_to(home, taker.shape), ranks).mean()),
            "fullest_balanced": float(balanced.mean()),
            "fullest_99th_percentile": float(np.quantile(balanced, 0.99)),
            "share_moved": float((taker != home).mean()),
            "requests_as_shuffled": kept.requests / kept.samples,
            "requests_balanced": dealt.requests / dealt.samples,
            "milliseconds_as_shuffled": 1000 * kept.seconds / self.steps,
            "milliseconds_balanced": 1000 * dealt.seconds / self.steps,
            "first_milliseconds_as_shuffled": 1000 * kept.first_seconds,
            "first_milliseconds_balanced": 1000 * dealt.first_seconds,
        }

    def _fullest(self, taker: Ints, ranks: int) -> npt.NDArray[np.float64]:
        """Work of the fullest rank over the mean, (steps,)."""
        loads = np.stack(
            [np.where(taker == rank, self._work_of_steps, 0).sum(axis=0) for rank in range(ranks)]
        )
        return np.asarray(loads.max(axis=0) / loads.mean(axis=0))

    def _plan(self, ranks: int, *, is_balanced: bool) -> Planned:
        """What ranks plan: requests and samples of some of them together, CPU times of one on average."""
        chosen = range(0, ranks, max(1, ranks // READING_RANKS))
        parts = [self._plan_rank(rank, ranks, is_balanced=is_balanced) for rank in chosen]
        return Planned(
            sum(part.samples for part in parts),
            sum(part.requests for part in parts),
            sum(part.first_seconds for part in parts) / len(parts),
            sum(part.seconds for part in parts) / len(parts),
        )

    def _plan_rank(self, rank: int, ranks: int, *, is_balanced: bool) -> Planned:
        began = time.process_time()
        loader = Loader(
            self.reader,
            replace(self.order),  # which has not been asked for anything yet
            rank_lanes(rank, ranks, self.lanes),
            range(self.steps),
            threads=1,
            read_ahead_mb=self.config.data.read_ahead_mb,
            balance=Balance(self.work, rank, ranks, self.lanes) if is_balanced else None,
        )
        loader._plan_step()  # reading would follow, and there is nothing to read
        planned_one = time.process_time()
        while loader._plan_step():
            pass
        ended = time.process_time()
        loader.close()
        slots = [slot for coming in loader._planned for slot in coming.slots]
        requests = len({id(span) for slot in slots for span in slot.spans})
        return Planned(len(slots), requests, planned_one - began, ended - began)
