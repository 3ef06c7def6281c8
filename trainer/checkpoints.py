"""The checkpoints of a run as one thing: written in the background, kept or deleted, mirrored, the best
known."""

from __future__ import annotations

from configs.metrics import cost
from configs.run.events import CheckpointSaved, SlowSave
from configs.run.folder import RunDir
from configs.run.lease import Lease
from configs.schema import RunConfig
from trainer import checkpoint
from trainer.checkpoint import Manifest
from trainer.distributed import World
from trainer.engines import Engine
from trainer.mirror import Mirror
from trainer.writer import Commit, Writer


class Checkpoints:
    """Saves the state of an engine. Every method but `failed`, `hold`, `drain` and the mirror's is called by
    all ranks at the same point."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        lease: Lease,
        world: World,
        engine: Engine,
        shapes: dict[str, list[int]],
        mirror: Mirror | None,
        *,
        step: int,
        best: float,
        grace_seconds: float | None,
    ) -> None:
        """shapes: of the trained parameters, by name; mirror: on rank 0, if there is one; step: of the
        checkpoint that this attempt goes on from, 0 without one; best: the lowest cost by
        `evaluate.best_metric` yet; grace_seconds: in which a job must save when it is asked to, if that is
        known."""
        self._config, self._run, self._lease, self._world = config, run, lease, world
        self._mirror, self._grace_seconds = mirror, grace_seconds
        self._writer = Writer(
            run.checkpoints,
            lease.attempt,
            engine,
            world,
            shapes,
            fence=lease.check,
            committed=self._committed,
        )
        self._newest = step
        """Step of the newest checkpoint, on disk or under way."""
        self._best = best

    def begin_mirror(self) -> None:
        """Let copies be made from now on: the run has accepted its config, which is copied, too."""
        if self._mirror:
            self._mirror.begin(self._newest)
            # The last attempt may not have got to them.
            for folder in reversed(checkpoint.find(self._run.checkpoints)):
                self._mirror.upload(folder)

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint, on disk or under way, is that of a step."""
        return 0 < step == self._newest

    def improve(self, metrics: dict[str, float]) -> bool:
        """Take note of `evaluate.best_metric`; whether it is better than ever before."""
        value = cost(self._config.evaluate.best_metric, metrics)
        if value >= self._best:
            return False
        self._best = value
        return True

    def save(self, manifest: Manifest, *, urgent: bool = False) -> None:
        """Begin to write a checkpoint in the background. The state must not change before `hold` has
        returned.

        urgent: sooner than anything else. Raises as `finish` does, for the one under way.
        """
        self._writer.save(manifest, urgent=urgent)
        self._newest = manifest.step

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Note the metrics of an evaluation in a checkpoint that is there already. Raises as `finish`
        does."""
        self._writer.finish()
        if self._world.rank == 0:
            folder = self._run.checkpoints / checkpoint.name_of(step)
            checkpoint.set_metrics(folder, metrics)
            if self._mirror:
                self._mirror.upload(folder)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint under way has failed; `finish` then says why."""
        return self._writer.failed

    def hold(self) -> None:
        """Wait for the snapshot, before the state changes."""
        self._writer.hold()

    def finish(self) -> None:
        """Wait until the checkpoint under way is durable. Raises CheckpointError if it could not be written,
        Superseded if a later attempt has taken over, PeerFailed if another rank says so."""
        self._writer.finish()

    def drain(self, seconds: float) -> None:
        """Give the checkpoint under way a last chance, before this rank leaves with an error and without the
        others."""
        self._writer.drain(seconds)

    def finish_mirror(self) -> None:
        """Wait until all checkpoints are copied, or have failed to be."""
        if self._mirror:
            self._mirror.finish()

    def _committed(self, commit: Commit) -> None:
        """On rank 0, in the background: a checkpoint is complete."""
        ledger, manifest = self._run.ledger, commit.manifest
        if self._grace_seconds and commit.total_seconds > self._grace_seconds / 2:
            advice = (
                "a preemption or the time limit may come sooner; raise slurm.signal_seconds, or take a faster"
                " file system"
            )
            ledger.record(
                SlowSave(
                    attempt=self._lease.attempt,
                    step=manifest.step,
                    seconds=round(commit.total_seconds, 1),
                    grace_seconds=self._grace_seconds,
                    advice=advice,
                )
            )
        ledger.record(
            CheckpointSaved(
                attempt=self._lease.attempt,
                step=manifest.step,
                reason=manifest.reason,
                folder=commit.folder.name,
                blocking_seconds=round(commit.blocking_seconds, 4),
                total_seconds=round(commit.total_seconds, 3),
                bytes=commit.bytes,
                metrics=manifest.metrics,
            )
        )
        being_copied = self._mirror.copying if self._mirror else None
        metric = self._config.evaluate.best_metric
        checkpoint.retain(self._run.checkpoints, self._config.checkpoint, metric, spare=being_copied)
        if self._mirror:
            self._mirror.upload(commit.folder)
