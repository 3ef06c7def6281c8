"""A run on this rank, ready to train: what `trainer/start.py` puts together and `trainer/loop.py` works
with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from configs.run.folder import RunDir
from configs.run.goodput import Phase
from configs.run.lease import Lease
from configs.run.stopwatch import Stopwatch
from configs.schema import RunConfig
from data.batch import Size
from trainer.changes import pinned
from trainer.checkpoint import Manifest
from trainer.checkpoints import Checkpoints
from trainer.distributed import World
from trainer.engines import Engine
from trainer.loaders import Loaders
from trainer.model import Captioner
from trainer.records import SampleRecords


class StopFlag(Protocol):
    """Says whether somebody asked this process to stop."""

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""


class Watch(Protocol):
    """Is given signs of life; without them for long it takes this rank for hung."""

    def __call__(self, phase: Phase, step: int) -> None:
        """A phase begins, or goes on."""

    def arrive(self) -> None:
        """This rank waits for the others."""


@dataclass
class State:
    """Where a run is. The position in the data, the learning rate and all else follow from `step`."""

    step: int = 0
    """Optimizer steps taken."""
    evaluated: bool = False
    """Whether this step has been evaluated."""


@dataclass(frozen=True)
class Session:
    """A run on this rank."""

    config: RunConfig
    run: RunDir
    lease: Lease
    world: World
    captioner: Captioner
    engine: Engine
    loaders: Loaders
    records: SampleRecords
    checkpoints: Checkpoints
    state: State
    size: Size
    """Of a micro-batch."""
    total_steps: int
    stopwatch: Stopwatch
    """Of this start, until its first step."""

    @property
    def attempt(self) -> int:
        """Number of this start of the run."""
        return self.lease.attempt

    def save(self, reason: str, metrics: dict[str, float], *, urgent: bool = False) -> None:
        """Begin to write a checkpoint of the present step in the background; if there is one, only note the
        metrics in it. The beginning of a run is not saved. All ranks call it."""
        step = self.state.step
        if step == 0:
            return
        if not self.checkpoints.has(step):
            self.checkpoints.save(self._manifest(reason, metrics), urgent=urgent)
        elif metrics:
            self.checkpoints.add_metrics(step, metrics)

    def _manifest(self, reason: str, metrics: dict[str, float]) -> Manifest:
        self.records.share_tokens()
        suppressed = self.captioner.generation.get("suppress_tokens") or []
        order = self.loaders.order
        return Manifest(
            step=self.state.step,
            updates=self.engine.updates(),
            identity=pinned(self.config, self.loaders.dataset.training.digest),
            epoch_base=(order.base_step, order.base_epoch),
            position=order.locate(self.state.step),
            reason=reason,
            metrics=metrics,
            caption_tokens=[token for token in suppressed if self.records.caption_tokens[token]],
        )
