"""A run on this rank: model, data, engine, and where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from configs.lease import Lease
from configs.rundir import RunDir, append_line
from configs.schema import RunConfig
from data import storage
from data.batch import Sample
from data.cache import Cache
from data.captions import CaptionEncoder
from data.dataset import Dataset
from data.in_hand import InHand
from data.loader import Loader, Read
from data.order import Listed, Order, Plan, rank_lanes
from data.samples import Rejected, SampleReader
from trainer import checkpoint
from trainer.checkpoint import Manifest
from trainer.distributed import PeerFailed, World
from trainer.engines import Engine
from trainer.identity import identity
from trainer.mirror import Mirror
from trainer.model import Captioner
from trainer.writer import Writer

VALIDATION_AHEAD_MB = 64
"""Megabytes of validation samples that are read ahead, at most."""


class StopFlag(Protocol):
    """Says whether somebody asked this process to stop."""

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""


class Watch(Protocol):
    """Is given signs of life; without them for long it takes this rank for hung."""

    def __call__(self, phase: str, step: int) -> None:
        """A phase begins, or goes on."""

    def arrive(self) -> None:
        """This rank waits for the others."""


@dataclass
class State:
    """Where a run is. The position in the data, the learning rate and all else follow from `step`."""

    step: int = 0
    """Optimizer steps taken."""
    saved: int = 0
    """The step of the newest checkpoint, on disk or under way."""
    evaluated: bool = False
    """Whether this step has been evaluated."""
    best: float = float("inf")
    """The lowest value of `evaluate.best_metric` yet."""


@dataclass
class Session:
    """A run on this rank."""

    config: RunConfig
    run: RunDir
    lease: Lease
    world: World
    captioner: Captioner
    engine: Engine
    dataset: Dataset
    encoder: CaptionEncoder
    order: Order
    total_steps: int
    state: State
    writer: Writer
    mirror: Mirror | None
    """Of the checkpoints; on rank 0, if there is one."""
    in_hand: InHand
    """What this rank is decoding."""
    poisoned: frozenset[str]
    """Keys of the samples whose decoder crashed or never ended before."""
    caption_tokens: torch.Tensor
    """(vocabulary,) bool: the tokens that occurred in captions."""
    quarantined: dict[str, Rejected] = field(default_factory=dict)
    """Samples that this rank could not use in this attempt, by key."""
    cut: set[int] = field(default_factory=set)
    """Numbers of the sources of which a caption was cut off in this attempt."""

    @property
    def attempt(self) -> int:
        """Number of this start of the run."""
        return self.lease.attempt

    @property
    def lanes(self) -> range:
        """This rank's lanes of the global batch."""
        return rank_lanes(self.world.rank, self.world.size, self.config.batch.global_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step: of the rank with the most lanes, so that all ranks have as many."""
        most = -(-self.config.batch.global_size // self.world.size)
        return -(-most // self.config.batch.micro_size)

    @property
    def pad_id(self) -> int:
        """Token that fills up decoder inputs."""
        return int(self.captioner.config.pad_token_id or 0)

    def samples(self, *, validation: bool) -> SampleReader:
        """Reads samples, for training or for validation."""
        data = self.config.data
        longest = min(self.order.frames / 100, data.max_seconds or float("inf"))
        index = self.dataset.validation if validation else self.dataset.training
        return SampleReader(
            index,
            self.encoder,
            max_seconds=longest,
            overlong=data.overlong,
            seed=self.config.run.seed,
            in_hand=self.in_hand,
            poisoned=self.poisoned,
            same_crops=validation,
        )

    def loader(self) -> Loader:
        """The steps that are still to be taken."""
        steps = range(self.state.step, self.total_steps)
        return self._loader(self.samples(validation=False), self.order, self.lanes, steps)

    def validation_loader(self, rows: Sequence[int], per_rank: int) -> Loader:
        """Validation samples: each step has the next `per_rank` for each rank, on all ranks as many steps."""
        listed = Listed(rows, per_rank * self.world.size)
        lanes = range(self.world.rank * per_rank, (self.world.rank + 1) * per_rank)
        return self._loader(self.samples(validation=True), listed, lanes, range(listed.steps))

    def _loader(self, reader: SampleReader, plan: Plan, lanes: range, steps: range) -> Loader:
        data = self.config.data
        # What training has read ahead stays in memory while validation reads.
        ahead = data.read_ahead_mb if plan is self.order else min(data.read_ahead_mb, VALIDATION_AHEAD_MB)
        return Loader(reader, plan, lanes, steps, threads=data.threads, read_ahead_mb=ahead, read=self._read)

    @cached_property
    def _read(self) -> Read:
        """Reads a range of a shard; one cache for all loaders."""
        data = self.config.data
        return Cache(data.cache_dir, data.cache_gb).read if data.cache_dir else storage.read

    def quarantine(self, rejected: Sequence[Rejected], **about: Any) -> None:
        """Name samples that could not be used, each once per attempt."""
        for one in rejected:
            if one.key not in self.quarantined:
                self.quarantined[one.key] = one
                append_line(
                    self.run.quarantine,
                    {
                        **about,
                        "attempt": self.attempt,
                        "rank": self.world.rank,
                        "key": one.key,
                        "reason": one.reason,
                    },
                )

    def explain(self, rejected: Sequence[Rejected]) -> str:
        """The commonest reasons over all ranks, each with an example. All ranks call it; rank 0 gets the
        text, on the others it raises PeerFailed."""
        gathered: Any = self.world.gather([(one.reason, one.key) for one in rejected])
        if gathered is None:
            raise PeerFailed("samples could not be used; rank 0 says why")
        keys: dict[str, list[str]] = {}
        for reason, key in (pair for pairs in gathered for pair in pairs):
            keys.setdefault(reason, []).append(key)
        commonest = sorted(keys.items(), key=lambda item: -len(item[1]))[:3]
        lines = [f"{len(found)} x {reason}, e.g. {found[0]}" for reason, found in commonest]
        advice = (
            "; is data.sources.NAME.caption_key right?"
            if any("no caption under" in reason for reason in keys)
            else ""
        )
        return "\n  ".join(["Reasons:", *lines, f"All are named in {self.run.quarantine}{advice}"])

    def note_cut(self, samples: Sequence[Sample]) -> None:
        """Say it once for each source that captions are cut off because they are too long: in this rank's
        output, and in the ledger."""
        for sample in samples:
            if sample.tokens.cut and sample.source not in self.cut:
                self.cut.add(sample.source)
                what = (
                    f"{sample.key}: its caption is {sample.tokens.cut} tokens too long; they are cut off"
                    " (data.long_caption=skip leaves such samples out)"
                )
                print(f"{what}; further ones of this source are not named", flush=True)
                self.run.record("cut_caption", attempt=self.attempt, rank=self.world.rank, what=what)

    def share_caption_tokens(self) -> None:
        """Let all ranks know which tokens occurred in the captions of any of them."""
        self.caption_tokens = self.world.any(self.caption_tokens)

    def save(self, reason: str, metrics: dict[str, float], *, urgent: bool = False) -> None:
        """Begin to write a checkpoint of the present step, in the background; if there is one, only note the
        metrics in it."""
        if self.state.step == 0:
            return
        if self.state.saved < self.state.step:
            self.share_caption_tokens()
            learnt = [
                token
                for token in self.captioner.model.generation_config.suppress_tokens or []
                if self.caption_tokens[token]
            ]
            about = identity(self.config, self.dataset.training.digest)
            manifest = Manifest(
                self.state.step,
                self.engine.updates(),
                about,
                (self.order.base_step, self.order.base_epoch),
                self.order.locate(self.state.step),
                reason,
                metrics,
                learnt,
            )
            self.writer.save(manifest, urgent=urgent)
            self.state.saved = self.state.step
        elif metrics:
            self.writer.finish()
            if self.world.rank == 0:
                folder = self.run.checkpoints / checkpoint.name_of(self.state.step)
                checkpoint.set_metrics(folder, metrics)
                if self.mirror:
                    self.mirror.upload(folder)
