"""Everything that a run needs before its first step: model, data, engine, and the state it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from configs.errors import CheckpointError, ConfigError
from configs.rundir import RunDir, append_line
from configs.schema import RunConfig
from data import dataset
from data.batch import Sample
from data.captions import CaptionEncoder
from data.dataset import Dataset
from data.loader import Loader
from data.order import Order, rank_lanes
from data.samples import Rejected, Samples
from trainer import checkpoint, model
from trainer.distributed import PeerFailed, World
from trainer.engines import Engine
from trainer.engines.zero2 import Zero2Engine
from trainer.model import Captioner


@dataclass
class State:
    """Where a run is. The position in the data, the learning rate and all else follow from `step`."""

    step: int = 0
    """Optimizer steps taken."""
    saved: int = 0
    """The step of the newest checkpoint."""
    evaluated: bool = False
    """Whether this step has been evaluated."""
    best: float = float("inf")
    """The lowest value of `evaluate.best_metric` yet."""


@dataclass
class Session:
    """A run on this rank."""

    config: RunConfig
    run: RunDir
    attempt: int
    world: World
    captioner: Captioner
    engine: Engine
    dataset: Dataset
    encoder: CaptionEncoder
    order: Order
    total_steps: int
    state: State
    caption_tokens: torch.Tensor
    """(vocabulary,) bool: the tokens that occurred in captions."""
    quarantined: dict[str, Rejected] = field(default_factory=dict)
    """Samples that this rank could not use in this attempt, by key."""
    cut: set[int] = field(default_factory=set)
    """Numbers of the sources of which a caption was cut off in this attempt."""

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

    def samples(self, *, validation: bool) -> Samples:
        """Reads samples, for training or for validation."""
        data = self.config.data
        longest = min(self.order.frames / 100, data.max_seconds or float("inf"))
        index = self.dataset.validation if validation else self.dataset.training
        return Samples(index, self.encoder, max_seconds=longest, overlong=data.overlong, seed=self.config.run.seed)

    def loader(self) -> Loader:
        """The steps that are still to be taken."""
        data = self.config.data
        samples, steps = self.samples(validation=False), range(self.state.step, self.total_steps)
        return Loader(samples, self.order, self.lanes, steps, threads=data.threads, read_ahead_mb=data.read_ahead_mb)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it, so that the order of the samples is the same."""
        data = self.config.data
        return {
            "model.name_or_path": self.config.model.name_or_path,
            "run.seed": self.config.run.seed,
            "batch.global_size": self.config.batch.global_size,
            "data.shuffle_window": data.shuffle_window,
            "data.sources": [[source.name, source.weight] for source in data.sources],
            "index": self.dataset.training.digest,
        }

    def quarantine(self, rejected: Sequence[Rejected], **about: Any) -> None:
        """Name samples that could not be used, each once per attempt."""
        for one in rejected:
            if one.key not in self.quarantined:
                self.quarantined[one.key] = one
                append_line(self.run.quarantine, {**about, "attempt": self.attempt, "rank": self.world.rank, "key": one.key, "reason": one.reason})

    def explain(self, rejected: Sequence[Rejected]) -> str:
        """The commonest reasons over all ranks, each with an example. All ranks call it; rank 0 gets the text, on the others it raises PeerFailed."""
        gathered: Any = self.world.gather([(one.reason, one.key) for one in rejected])
        if gathered is None:
            raise PeerFailed("samples could not be used; rank 0 says why")
        keys: dict[str, list[str]] = {}
        for reason, key in (pair for pairs in gathered for pair in pairs):
            keys.setdefault(reason, []).append(key)
        commonest = sorted(keys.items(), key=lambda item: -len(item[1]))[:3]
        lines = [f"{len(found)} x {reason}, e.g. {found[0]}" for reason, found in commonest]
        advice = "; is data.sources.NAME.caption_key right?" if any("no caption under" in reason for reason in keys) else ""
        return "\n  ".join(["Reasons:", *lines, f"All are named in {self.run.quarantine}{advice}"])

    def note_cut(self, samples: Sequence[Sample]) -> None:
        """Say it once for each source that captions are cut off because they are too long: in this rank's output, and in the ledger."""
        for sample in samples:
            if sample.tokens.cut and sample.source not in self.cut:
                self.cut.add(sample.source)
                what = f"{sample.key}: its caption is {sample.tokens.cut} tokens too long; they are cut off (data.long_caption=skip leaves such samples out)"
                print(f"{what}; further ones of this source are not named", flush=True)
                self.run.record("cut_caption", attempt=self.attempt, rank=self.world.rank, what=what)

    def share_caption_tokens(self) -> None:
        """Let all ranks know which tokens occurred in the captions of any of them."""
        self.caption_tokens = torch.tensor(self.world.sum(self.caption_tokens.tolist())) > 0

    def save(self, reason: str, metrics: dict[str, float]) -> None:
        """Write a checkpoint of the present step, unless there is one that says as much, and delete what need not be kept."""
        settings = self.config.checkpoint
        if self.state.step == 0 or (self.state.saved == self.state.step and not metrics):
            return
        self.share_caption_tokens()
        learnt = [token for token in self.captioner.model.generation_config.suppress_tokens or [] if self.caption_tokens[token]]
        manifest = checkpoint.Manifest(self.state.step, self.engine.updates(), self.identity(), metrics, caption_tokens=learnt)
        shapes = {name: list(p.shape) for name, p in self.captioner.trained.items()}
        folder = checkpoint.save(self.run.checkpoints, self.engine, self.world, manifest, shapes, self.attempt)
        self.state.saved = self.state.step
        if self.world.rank == 0:
            checkpoint.retain(self.run.checkpoints, settings.keep_last, settings.keep_every, self.config.evaluate.best_metric)
            self.run.record("checkpoint", step=self.state.step, reason=reason, folder=folder.name, **metrics)


def prepare(config: RunConfig, run: RunDir, attempt: int, world: World) -> Session:
    """Build a session, from the newest checkpoint if there is one."""
    newest = next(iter(checkpoint.find(run.checkpoints)), None)
    captioner = model.load_base(run, config.model) if newest else model.load(config.model, config.run.seed)
    if (config.data.max_seconds or 0) > captioner.frames / 100:
        raise ConfigError(f"data.max_seconds: {config.data.max_seconds:g} s, but the model's window is {captioner.frames / 100:g} s")
    if world.rank == 0:
        for line in dataset.build(config, run.path, captioner.frames / 100):
            print(line, flush=True)
            run.record("left_out", attempt=attempt, what=line)
        if not newest:
            model.save_base(run, captioner)
    world.barrier()
    found = dataset.open_dataset(config, run.path)
    order = found.order(config, captioner.frames)
    total = config.optim.max_steps or order.steps_of(config.optim.epochs or 0)
    encoder = CaptionEncoder(
        captioner.processor.tokenizer, captioner.prefix, positions=captioner.config.max_target_positions,
        long_caption=config.data.long_caption, styles=[source.style for source in config.data.sources],
    )  # fmt: skip
    vocabulary = torch.zeros(captioner.config.vocab_size, dtype=torch.bool)
    engine = Zero2Engine(captioner.model, config, world)
    session = Session(config, run, attempt, world, captioner, engine, found, encoder, order, total, State(), vocabulary)
    if newest:
        _resume(session, checkpoint.Reader(newest))
    return session


def _resume(session: Session, reader: checkpoint.Reader) -> None:
    """Take up the state of a checkpoint. Raises ConfigError if the run would not be the same run."""
    manifest, now = reader.manifest, session.identity()
    names = {"index": "the samples (a shard was added, removed or changed), by their digest"}
    changed = [f"{names.get(key, key)}: {manifest.identity.get(key)} -> {now[key]}" for key in now if manifest.identity.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"{reader.folder}: going on from here would not be the same run, because these changed:\n  "
            + "\n  ".join(changed)
            + "\nUndo that, or start a new run with another run.name."
        )
    shapes = {name: list(p.shape) for name, p in session.captioner.trained.items()}
    if shapes != {name: entry["shape"] for name, entry in manifest.parameters.items()}:
        raise CheckpointError(f"{reader.folder}: is of another model, or of one with other parameters frozen; start a new run with another run.name")
    session.engine.load(reader, manifest.updates)
    session.caption_tokens[manifest.caption_tokens] = True
    session.state.step = session.state.saved = manifest.step
    session.state.evaluated = bool(manifest.metrics)
    session.state.best, _ = checkpoint.best_of(session.run.checkpoints, session.config.evaluate.best_metric)
