"""Start a run, or take it up again: data, model, checkpoint, and the session that they make."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import CheckpointError, ConfigError
from configs.run.crash_journal import CrashJournal, find_poisoned
from configs.run.events import InitFrom, LeftOut, Samples
from configs.run.folder import RunDir
from configs.run.lease import Lease
from configs.run.stopwatch import Stopwatch
from configs.schema import RunConfig
from data import dataset
from data.batch import Size
from data.captions import CaptionEncoder
from data.dataset import Dataset
from data.windows import Windows
from trainer import model, parts
from trainer.changes import pinned
from trainer.checkpoints import Checkpoints
from trainer.distributed import World, has_bf16
from trainer.engines import Engine
from trainer.loaders import Loaders
from trainer.micro import micro_seconds
from trainer.mirror import Mirror
from trainer.model import Captioner
from trainer.records import SampleRecords
from trainer.resume import Resumed, find_checkpoints, resume
from trainer.session import Session, State, StopFlag
from trainer.weights import is_model, resolve


class StopRequested(Exception):
    """A stop was requested before training began: nothing has changed."""


@dataclass(frozen=True)
class Start:
    """One start of a run. Every method is called by all ranks. stop: whether somebody asked to stop
    meanwhile; stopwatch: is told what has been done."""

    config: RunConfig
    run: RunDir
    lease: Lease
    world: World
    stop: StopFlag
    stopwatch: Stopwatch

    def session(self, journal: CrashJournal, grace_seconds: float | None) -> Session:
        """Everything that training needs.

        journal: where to note what is being decoded; grace_seconds: in which a job must save when it is asked
        to, if that is known. Raises StopRequested if a stop was requested meanwhile, ConfigError if going on
        would not be the same run, CheckpointError if no checkpoint of the run is sound.
        """
        config, run, world = self.config, self.run, self.world
        if world.rank == 0:  # which alone scores
            parts.check(config.evaluate.parts, config.evaluate.best_metric)
            if missing := parts.remark():
                print(missing, flush=True)
        self._check_stop()
        mirror = None
        if world.rank == 0 and config.checkpoint.mirror:
            mirror = Mirror(run, config, self.lease)
        folders = find_checkpoints(run, self.lease, mirror, world)
        captioner = self._model(has_checkpoint=bool(folders))
        self.stopwatch.lap("model")
        self._check_stop()
        samples = self._dataset(captioner)
        self.stopwatch.lap("index")
        self._check_stop()
        poisoned = self._poisoned()
        if world.rank == 0 and not folders:
            model.save_base(run, captioner)
        engine = self._engine(captioner)
        self.stopwatch.lap("engine")
        shapes = {name: list(tensor.shape) for name, tensor in captioner.trained.items()}
        now = pinned(config, samples.training.digest)
        resumed = resume(folders, config, run, self.lease, world, engine, shapes, now)
        self.stopwatch.lap("checkpoint")
        order = samples.order(config, resumed.epoch_base)
        windows = Windows.of(config, captioner.frames)
        total_steps = config.optim.max_steps or order.steps_of(config.optim.epochs or 0)
        self._check_length(resumed, total_steps)
        vocabulary = torch.zeros(captioner.config.vocab_size, dtype=torch.bool)
        vocabulary[resumed.caption_tokens] = True
        return Session(
            config=config,
            run=run,
            lease=self.lease,
            world=world,
            captioner=captioner,
            engine=engine,
            loaders=Loaders(
                config,
                world,
                samples,
                self._encoder(captioner),
                order,
                windows,
                journal,
                poisoned,
                captioner.config,
            ),
            records=SampleRecords(config.data, run, self.lease.attempt, world, vocabulary),
            checkpoints=Checkpoints(
                config,
                run,
                self.lease,
                world,
                engine,
                shapes,
                mirror,
                step=resumed.step,
                best=resumed.best,
                grace_seconds=grace_seconds,
            ),
            state=State(resumed.step, resumed.evaluated),
            size=Size(
                seconds=micro_seconds(config, run, self.lease.attempt, world, captioner, engine),
                window_seconds=captioner.frames / 100,
                tokens=captioner.config.max_target_positions,
            ),
            total_steps=total_steps,
            stopwatch=self.stopwatch,
        )

    def _check_stop(self) -> None:
        if self.world.any(self.stop.requested):
            raise StopRequested

    def _model(self, *, has_checkpoint: bool) -> Captioner:
        """The model of the run's base, whose weights a checkpoint completes; or the one to start from."""
        config = self.config
        if self.world.rank == 0 and config.engine.dtype == "bf16" and not has_bf16(self.world.device):
            print(
                "this CPU has no BF16 arithmetic: a new run with engine.dtype=fp32 would be many times faster"
                " here",
                flush=True,
            )
        if has_checkpoint:
            return model.load_base(self.run, config.model)
        captioner = model.load(config.model, config.run.seed, self.run, self._init_from())
        if self.world.rank == 0:
            for remark in captioner.remarks:
                print(remark, flush=True)
        return captioner

    def _init_from(self) -> Path | None:
        """What this run's weights begin with: one and the same checkpoint on all ranks, and at every start
        until the run has one of its own."""
        source = self.config.model.init_from
        if source is None:
            return None
        checkpoint = Path(source)
        if self.world.rank == 0 and not is_model(checkpoint):
            checkpoint = self._checkpoint_meant_by(source)
        return self.world.share(checkpoint)

    def _checkpoint_meant_by(self, source: str) -> Path:
        """The checkpoint that `model.init_from` meant when the run first asked for it."""
        meant = [event for event in self.run.ledger.read().of(InitFrom) if event.source == source]
        if meant and Path(meant[-1].checkpoint).is_dir():
            return Path(meant[-1].checkpoint)
        with contextlib.suppress(ConfigError, CheckpointError):  # told when it is read
            _, checkpoint = resolve(Path(source))
            self.run.ledger.record(
                InitFrom(attempt=self.lease.attempt, source=source, checkpoint=str(checkpoint))
            )
            return checkpoint
        return Path(source)

    def _dataset(self, captioner: Captioner) -> Dataset:
        """The merged index: rank 0 merges it, and says what is left out; all ranks map the result."""
        seconds = captioner.frames / 100
        if (self.config.data.max_seconds or 0) > seconds:
            raise ConfigError(
                f"data.max_seconds: {self.config.data.max_seconds:g} s, but the model's window is"
                f" {seconds:g} s"
            )
        if self.world.rank == 0:
            overview = dataset.build(self.config, self.run.path, seconds)
            for line in overview.lines:
                print(line, flush=True)
                self.run.ledger.record(LeftOut(attempt=self.lease.attempt, what=line))
            if overview.passes:
                print(overview.passes, flush=True)
            self.run.ledger.record(Samples(attempt=self.lease.attempt, sources=overview.sources))
        self.world.barrier()
        return dataset.open_dataset(self.config, self.run.path)

    def _poisoned(self) -> frozenset[str]:
        """Keys of the samples whose decoder crashed or never ended before."""
        keys: frozenset[str] = frozenset()
        if self.world.rank == 0:
            keys = find_poisoned(self.run, self.lease.attempt)
        return self.world.share(keys)

    def _encoder(self, captioner: Captioner) -> CaptionEncoder:
        return CaptionEncoder(
            captioner.tokenizer,
            captioner.prefix,
            positions=captioner.config.max_target_positions,
            long_caption=self.config.data.long_caption,
            styles=[source.style for source in self.config.data.sources],
        )

    def _engine(self, captioner: Captioner) -> Engine:
        # Imported here: DeepSpeed takes seconds, and need not be there for FSDP2.
        if self.config.engine.backend == "fsdp2":
            from trainer.engines.fsdp2 import Fsdp2Engine

            return Fsdp2Engine(captioner.model, self.config, self.world)
        from trainer.engines.zero2 import Zero2Engine

        return Zero2Engine(captioner.model, self.config, self.world)

    def _check_length(self, resumed: Resumed, total_steps: int) -> None:
        """Raise ConfigError if the run is asked for fewer steps than it has taken, or for none of the new
        epoch that a change begins."""
        if resumed.step > total_steps:
            raise ConfigError(
                f"{self.run.path}: has taken {resumed.step} steps, more than the {total_steps} that"
                " optim.max_steps or optim.epochs ask for"
            )
        if resumed.has_new_epoch and resumed.step == total_steps:
            raise ConfigError(
                f"{self.run.path}: what was changed begins epoch {resumed.epoch_base[1] + 1}, but"
                f" optim.epochs={self.config.optim.epochs:g} ends before it; raise it"
            )
