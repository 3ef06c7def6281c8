"""Take up a run at its newest sound checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, ConfigError, PeerFailed
from configs.run.events import Changed
from configs.run.events import Damaged as DamagedEvent
from configs.run.folder import RunDir
from configs.run.lease import Lease
from configs.schema import RunConfig
from trainer import checkpoint
from trainer.changes import begins_new_epoch, changes, check_changes, differences
from trainer.checkpoint import Damaged, Manifest, Reader
from trainer.distributed import World
from trainer.engines import Engine
from trainer.mirror import Mirror


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on; as it is for one that begins."""

    step: int = 0
    """Optimizer steps taken."""
    evaluated: bool = False
    """Whether that step has been evaluated."""
    epoch_base: tuple[int, int] = (0, 0)
    """Step at which the order of the samples begins, and its first epoch."""
    has_new_epoch: bool = False
    """Whether data or order were changed on purpose, so that a new epoch begins at `step`."""
    best: float = math.inf
    """The lowest cost by `evaluate.best_metric` yet (configs/metrics.py)."""
    caption_tokens: list[int] = field(default_factory=list)
    """Tokens among those that generation suppresses which occurred in captions."""


def find_checkpoints(run: RunDir, lease: Lease, mirror: Mirror | None, world: World) -> list[Path]:
    """The run's checkpoints, newest first, the same on all ranks; from its mirror, if its folder has none."""
    folders: list[Path] = []
    if world.rank == 0:
        lease.check()  # the imports may have taken long
        checkpoint.clean(run.checkpoints, lease.attempt)
        folders = checkpoint.find(run.checkpoints)
        if not folders and mirror:
            mirror.restore()
            folders = checkpoint.find(run.checkpoints)
        if not folders:
            _refuse_to_forget(run)
    return world.share(folders)


def resume(
    folders: Sequence[Path],
    config: RunConfig,
    run: RunDir,
    lease: Lease,
    world: World,
    engine: Engine,
    shapes: dict[str, list[int]],
    now: dict[str, Any],
) -> Resumed:
    """Load the newest sound checkpoint of those into the engine; damaged ones are named and set aside.

    shapes: of the trained parameters, by name; now: what must be as it was (trainer/changes.py). All ranks
    call it. Raises ConfigError if a checkpoint is not of this run, CheckpointError if none is sound.
    """
    if not folders:
        return Resumed()
    for folder in folders:
        manifest, problem = _load(folder, config, engine, shapes, now)
        problems = world.gather(problem)
        first_problem = world.share(next(filter(None, problems or []), ""))
        if manifest is not None and not first_problem:
            engine.publish()
            return _go_on(manifest, config, run, lease, world, now)
        if world.rank == 0:
            lease.check()
            aside = checkpoint.set_aside(folder)
            print(
                f"{first_problem}; set aside as {aside.name}, going on from the checkpoint before", flush=True
            )
            run.ledger.record(DamagedEvent(attempt=lease.attempt, folder=folder.name, message=first_problem))
        world.barrier()
    if world.rank == 0:
        _refuse_to_forget(run)
    raise PeerFailed("no sound checkpoint is left")


def _load(
    folder: Path, config: RunConfig, engine: Engine, shapes: dict[str, list[int]], now: dict[str, Any]
) -> tuple[Manifest | None, str]:
    """Load this rank's share of a checkpoint; returns its manifest, or what is damaged."""
    try:
        reader = Reader(folder)
        check_changes(reader.manifest.identity, now, config.run.allow_change, folder)
        if shapes != {name: entry["shape"] for name, entry in reader.manifest.parameters.items()}:
            raise ConfigError(
                f"{folder}: is of another model than the run's base; put back that base, or start a new run"
                " with another run.name"
            )
        engine.load(reader, reader.manifest.updates)
    except Damaged as error:
        return None, str(error)
    return reader.manifest, ""


def _go_on(
    manifest: Manifest, config: RunConfig, run: RunDir, lease: Lease, world: World, now: dict[str, Any]
) -> Resumed:
    """Where a run goes on after a checkpoint: in the order as it was, or with a new epoch where data or order
    were changed on purpose."""
    changed = changes(manifest.identity, now)
    has_new_epoch = begins_new_epoch(changed)
    epoch_base = manifest.epoch_base
    if has_new_epoch:
        epoch, step_in_epoch = manifest.position
        epoch_base = (manifest.step, epoch if step_in_epoch == 0 else epoch + 1)
    if changed and world.rank == 0:
        lines = differences(manifest.identity, now, changed)
        print("\n  ".join(["changed on purpose (run.allow_change):", *lines]), flush=True)
        run.ledger.record(
            Changed(attempt=lease.attempt, step=manifest.step, what=lines, epoch_base=epoch_base)
        )
    # Rank 0 looks for the best one, and tells: ranks that saw different ones would part ways at a save.
    best = math.inf
    if world.rank == 0:
        best = checkpoint.lowest_cost(run.checkpoints, config.evaluate.best_metric)
    return Resumed(
        step=manifest.step,
        evaluated=bool(manifest.metrics),
        epoch_base=epoch_base,
        has_new_epoch=has_new_epoch,
        best=world.share(best),
        caption_tokens=manifest.caption_tokens,
    )


def _refuse_to_forget(run: RunDir) -> None:
    """Raise CheckpointError if all that is left of a run is damaged: it must not start from nothing without a
    word."""
    damaged = sorted(folder.name for folder in run.checkpoints.glob("step-*.damaged"))
    if damaged:
        raise CheckpointError(
            f"{run.checkpoints}: no sound checkpoint is left; damaged ones are set aside as"
            f" {', '.join(damaged)}. Put back a copy of one, or delete them to start this run from the"
            " beginning."
        )
