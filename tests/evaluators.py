"""Evaluations of one rank by itself, in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.load import validate
from configs.run.crash_journal import CrashJournal
from configs.run.folder import RunDir
from configs.schema import RunConfig
from data import dataset
from data.batch import Size
from data.captions import CaptionEncoder
from data.windows import Windows
from tests.making import WINDOW_SECONDS, config_values
from trainer import model as trainer_model
from trainer.distributed import World
from trainer.evaluate import Setup
from trainer.loaders import Loaders
from trainer.records import SampleRecords

HELD_OUT = 0.9
"""Share of the clips that is for validation."""


@dataclass
class Rank:
    """A rank by itself: what it would sum over all, or tell rank 0, is kept. others: what the other ranks
    have told."""

    rank: int
    size: int
    summed: list[float] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    device = torch.device("cpu")

    def sum(self, values: list[float]) -> list[float]:
        self.summed = values
        return values

    def any_of_each(self, flags: torch.Tensor) -> torch.Tensor:
        return flags

    def share(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any] | None:
        self.told = value
        return [value, *self.others] if self.rank == 0 else None


def open_loaders(
    config: RunConfig, world: World, shape: Any, encoder: CaptionEncoder | None = None, *, full: bool = False
) -> Loaders:
    """The loaders of a run. shape: the config of its model; encoder: not needed where nothing is read; full:
    whether its shards are indexed in full."""
    for shard in dataset.list_shards(config):
        dataset.index_shard(shard, config.data.index_dir, full=full)
    dataset.build(config, config.run.dir, WINDOW_SECONDS)
    found = dataset.open_dataset(config, config.run.dir)
    order, windows = found.order(config), Windows.of(config, 100 * WINDOW_SECONDS)
    unread: Any = encoder
    return Loaders(config, world, found, unread, order, windows, CrashJournal(8), frozenset(), shape)


def open_setup(
    model: Path,
    folder: Path,
    shards: str,
    rank: int = 0,
    ranks: int = 1,
    *,
    micro: int = 4,
    evaluate: dict[str, object] | None = None,
    **data: object,
) -> Setup:
    """What an evaluation of some shards is made with. micro: windows of a forward pass; data: settings."""
    source = {"name": "sounds", "shards": shards, "validation": HELD_OUT}
    values = config_values(
        "run",
        folder,
        model,
        shards,
        data={"sources": [source], "max_seconds": 0.6, "overlong": "crop", "window": "full", **data},
        evaluate={"max_samples": 1000, **(evaluate or {})},
    )
    config = validate(values, "test")
    world: Any = Rank(rank, ranks)
    captioner = trainer_model.load(config.model, config.run.seed)
    encoder = CaptionEncoder(
        captioner.tokenizer, captioner.prefix, positions=64, long_caption="truncate", styles=[None]
    )
    loaders = open_loaders(config, world, captioner.config, encoder)
    learnt = torch.zeros(captioner.config.vocab_size, dtype=torch.bool)
    records = SampleRecords(config.data, RunDir(config.run.dir), 0, world, learnt)
    size = Size(WINDOW_SECONDS * micro, WINDOW_SECONDS, tokens=64)
    return Setup(config, world, captioner, loaders, records, size, torch.float32)
