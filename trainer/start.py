"""Start a run, or take it up again from its newest sound checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from configs.errors import CheckpointError, ConfigError, PeerFailed
from configs.run.crash_journal import CrashJournal, find_poisoned
from configs.run.events import Changed, CheckpointSaved, InitFrom, LeftOut, SlowSave
from configs.run.events import Damaged as CheckpointDamaged
from configs.run.folder import RunDir
from configs.run.lease import Lease
from configs.schema import RunConfig
from data import dataset
from data.captions import CaptionEncoder
from data.dataset import Dataset
from trainer import checkpoint, model
from trainer.checkpoint import Damaged, Manifest, Reader
from trainer.distributed import World, has_bf16
from trainer.engines import Engine
from trainer.identity import ORDER, changes, check_changes, differences, identity
from trainer.mirror import Mirror
from trainer.model import Captioner
from trainer.session import Session, State, StopFlag
from trainer.weights import resolve
from trainer.writer import Commit, Writer


class StopRequested(Exception):
    """A stop was requested before training began: nothing has changed."""


def prepare(
    config: RunConfig,
    run: RunDir,
    lease: Lease,
    world: World,
    stop: StopFlag,
    in_hand: CrashJournal,
    grace: float | None = None,
) -> Session:
    """Build a session. All ranks call it. grace: seconds in which a job must save when it is asked to, if
    that is known.

    Raises StopRequested if `stop` was requested meanwhile, ConfigError if going on would not be the same run,
    CheckpointError if no checkpoint of the run is sound.
    """

    def check_stop() -> None:
        if world.sum([stop.requested])[0]:
            raise StopRequested

    check_stop()
    if world.rank == 0 and config.engine.dtype == "bf16" and not has_bf16(world.device):
        print(
            "this CPU has no BF16 arithmetic: a new run with engine.dtype=fp32 would be many times faster"
            " here",
            flush=True,
        )
    mirror = Mirror(run, config, lease) if world.rank == 0 and config.checkpoint.mirror else None
    found = _find_checkpoints(run, lease, mirror, world)
    captioner = (
        model.load_base(run, config.model)
        if found
        else model.load(config.model, config.run.seed, run.pretrained, _init_from(config, run, lease, world))
    )
    check_stop()
    samples = _open_dataset(config, run, lease, world, captioner)
    check_stop()
    poisoned = world.share(find_poisoned(run, lease.attempt) if world.rank == 0 else frozenset())
    if world.rank == 0 and not found:
        model.save_base(run, captioner)
    engine = _engine(config, captioner, world)
    shapes = {name: list(p.shape) for name, p in captioner.trained.items()}
    now = identity(config, samples.training.digest)
    manifest = (
        _resume(found, run, lease, engine, world, lambda reader: _compare(reader, now, shapes, config))
        if found
        else None
    )

    base = _epoch_base(manifest, now, run, lease.attempt, world) if manifest else (0, 0)
    order = samples.order(config, captioner.frames, base)
    total = config.optim.max_steps or order.steps_of(config.optim.epochs or 0)
    state, vocabulary = State(), torch.zeros(captioner.config.vocab_size, dtype=torch.bool)
    if manifest:
        if total < manifest.step:
            raise ConfigError(
                f"{run.path}: has taken {manifest.step} steps, more than the {total} that optim.max_steps or"
                " optim.epochs ask for"
            )
        if total == manifest.step and base != manifest.epoch_base:
            raise ConfigError(
                f"{run.path}: what was changed begins epoch {base[1] + 1}, but"
                f" optim.epochs={config.optim.epochs:g} ends before it; raise it"
            )
        best, _ = checkpoint.best_of(run.checkpoints, config.evaluate.best_metric)
        state = State(manifest.step, manifest.step, bool(manifest.metrics), best)
        vocabulary[manifest.caption_tokens] = True
    encoder = CaptionEncoder(
        captioner.processor.tokenizer,
        captioner.prefix,
        positions=captioner.config.max_target_positions,
        long_caption=config.data.long_caption,
        styles=[source.style for source in config.data.sources],
    )

    def committed(commit: Commit) -> None:
        made = commit.manifest
        if grace and commit.total_seconds > grace / 2:
            advice = (
                "a preemption or the time limit may come sooner; raise slurm.signal_seconds, or take a faster"
                " file system"
            )
            run.ledger.record(
                SlowSave(
                    attempt=lease.attempt,
                    step=made.step,
                    seconds=round(commit.total_seconds, 1),
                    grace_seconds=grace,
                    advice=advice,
                )
            )
        run.ledger.record(
            CheckpointSaved(
                attempt=lease.attempt,
                step=made.step,
                reason=made.reason,
                folder=commit.folder.name,
                blocking_seconds=round(commit.blocking_seconds, 4),
                total_seconds=round(commit.total_seconds, 3),
                bytes=commit.bytes,
                metrics=made.metrics,
            )
        )
        checkpoint.retain(
            run.checkpoints,
            config.checkpoint,
            config.evaluate.best_metric,
            spare=mirror.copying if mirror else None,
        )
        if mirror:
            mirror.upload(commit.folder)

    writer = Writer(
        run.checkpoints, lease.attempt, engine, world, shapes, fence=lease.check, committed=committed
    )
    if mirror:
        mirror.begin(state.step)
        for folder in reversed(checkpoint.find(run.checkpoints)):  # the last attempt may not have got to them
            mirror.upload(folder)
    return Session(
        config=config,
        run=run,
        lease=lease,
        world=world,
        captioner=captioner,
        engine=engine,
        dataset=samples,
        encoder=encoder,
        order=order,
        total_steps=total,
        state=state,
        writer=writer,
        mirror=mirror,
        in_hand=in_hand,
        poisoned=poisoned,
        caption_tokens=vocabulary,
    )


def _find_checkpoints(run: RunDir, lease: Lease, mirror: Mirror | None, world: World) -> list[Path]:
    """The run's checkpoints, newest first, the same on all ranks; from its mirror, if its folder has none."""
    found: list[Path] = []
    if world.rank == 0:
        lease.check()  # the imports may have taken long
        checkpoint.clean(run.checkpoints, lease.attempt)
        found = checkpoint.find(run.checkpoints)
        if not found and mirror:
            mirror.restore()
            found = checkpoint.find(run.checkpoints)
        if not found:
            _refuse_to_forget(run)
    return world.share(found)


def _refuse_to_forget(run: RunDir) -> None:
    """Raises CheckpointError if all that is left of a run is damaged: it must not start from nothing without
    a word."""
    if aside := sorted(folder.name for folder in run.checkpoints.glob("step-*.damaged")):
        raise CheckpointError(
            f"{run.checkpoints}: no sound checkpoint is left; damaged ones are set aside as"
            f" {', '.join(aside)}. Put back a copy of one, or delete them to start this run from the"
            " beginning."
        )


def _init_from(config: RunConfig, run: RunDir, lease: Lease, world: World) -> Path | None:
    """What this run's weights begin with: one and the same checkpoint on all ranks, and at every start until
    the run has one of its own."""
    source = config.model.init_from
    if source is None:
        return None
    found = Path(source)
    if world.rank == 0 and not (found / "config.json").is_file():
        known = [
            Path(event.checkpoint) for event in run.ledger.read().of(InitFrom) if event.source == source
        ]
        if known and known[-1].is_dir():
            found = known[-1]
        else:
            with contextlib.suppress(ConfigError, CheckpointError):  # told when it is read
                _, found = resolve(found)
                run.ledger.record(InitFrom(attempt=lease.attempt, source=source, checkpoint=str(found)))
    return world.share(found)


def _open_dataset(
    config: RunConfig, run: RunDir, lease: Lease, world: World, captioner: Captioner
) -> Dataset:
    """Merge the indexes on rank 0, and say what is left out; all ranks map the result."""
    seconds = captioner.frames / 100
    if (config.data.max_seconds or 0) > seconds:
        raise ConfigError(
            f"data.max_seconds: {config.data.max_seconds:g} s, but the model's window is {seconds:g} s"
        )
    if world.rank == 0:
        for line in dataset.build(config, run.path, seconds):
            print(line, flush=True)
            run.ledger.record(LeftOut(attempt=lease.attempt, what=line))
    world.barrier()
    return dataset.open_dataset(config, run.path)


def _engine(config: RunConfig, captioner: Captioner, world: World) -> Engine:
    # Imported here: DeepSpeed takes seconds, and need not be there for FSDP2.
    if config.engine.backend == "fsdp2":
        from trainer.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(captioner.model, config, world)
    from trainer.engines.zero2 import Zero2Engine

    return Zero2Engine(captioner.model, config, world)


def _resume(
    folders: Sequence[Path],
    run: RunDir,
    lease: Lease,
    engine: Engine,
    world: World,
    accept: Callable[[Reader], None],
) -> Manifest:
    """Load the newest sound checkpoint that `accept` does not refuse; damaged ones are named and set aside.
    Returns its manifest."""
    for folder in folders:
        problem = ""
        try:
            reader = Reader(folder)
            accept(reader)
            engine.load(reader, reader.manifest.updates)
        except Damaged as error:
            problem = str(error)
        problems = world.gather(problem)
        if not world.share(any(problems or [])):
            engine.publish()
            return reader.manifest
        if problems is not None:
            first = next(filter(None, map(str, problems)))
            lease.check()
            aside = checkpoint.set_aside(folder)
            print(f"{first}; set aside as {aside.name}, going on from the checkpoint before", flush=True)
            run.ledger.record(
                CheckpointDamaged(attempt=lease.attempt, folder=folder.name, message=first)
            )
        world.barrier()
    if world.rank == 0:
        _refuse_to_forget(run)
    raise PeerFailed("no sound checkpoint is left")


def _compare(reader: Reader, now: dict[str, object], shapes: dict[str, list[int]], config: RunConfig) -> None:
    """Raises ConfigError if a checkpoint is not of this run."""
    check_changes(reader.manifest.identity, now, config.run.allow_change, reader.folder)
    if shapes != {name: entry["shape"] for name, entry in reader.manifest.parameters.items()}:
        raise ConfigError(
            f"{reader.folder}: is of another model than the run's base; put back that base, or start a new"
            " run with another run.name"
        )


def _epoch_base(
    manifest: Manifest, now: dict[str, object], run: RunDir, attempt: int, world: World
) -> tuple[int, int]:
    """Where the order of the samples begins: as in the checkpoint, or with a new epoch where data or order
    were changed on purpose."""
    changed = changes(manifest.identity, now)
    epoch, step = manifest.position
    base = (manifest.step, epoch + (step > 0)) if set(changed) & set(ORDER) else manifest.epoch_base
    if changed and world.rank == 0:
        lines = differences(manifest.identity, now, changed)
        print("\n  ".join(["changed on purpose (run.allow_change):", *lines]), flush=True)
        run.ledger.record(
            Changed(attempt=attempt, step=manifest.step, what=lines, epoch_base=base)
        )
    return base
