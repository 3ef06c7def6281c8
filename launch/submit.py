"""`launch submit`: look over everything that would waste an allocation, put the run's folder in order, and
hand the first job to Slurm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs import sbatch, srun
from configs.errors import ConfigError, EarwitnessError
from configs.run.causes import Cause
from configs.run.events import Ended, Submitted
from configs.run.folder import RunDir
from configs.run.lease import Lease, holder
from configs.schema import RunConfig
from configs.trackers import check_keys, check_network, check_packages
from data import storage
from data.dataset import list_shards, load_sidecars
from data.sources import Shard
from launch import snapshot
from launch.remarks import remarks
from slurm import cluster
from slurm.chain import chain_jobs
from slurm.sayings import IMPOSSIBLE, advice
from slurm.shell import SECRETS, heed
from slurm.submit import index_script, look_ahead, submit, write_script
from trainer import parts

if TYPE_CHECKING:
    from trainer.examine import Pretrained


def submit_run(config: RunConfig, *, dry_run: bool) -> None:
    """Submit a run, or print the script that would be. Raises ConfigError or DataError for what has to be
    mended first."""
    settings, said = heed(config.slurm, os.environ)
    config = config.model_copy(update={"slurm": settings})
    _check_size(config)
    if not dry_run and not cluster.can_submit():
        raise ConfigError(
            "no sbatch here: submit on a login node of the cluster, or train on this machine with `python -m"
            " launch train`"
        )
    run = RunDir(config.run.dir)
    _check_idle(run)
    _check_finished(config, run)
    _check_credentials(config)
    _check_scores(config)
    _check_trackers(config)
    shards = list_shards(config)
    missing = _look_at_shards(config, shards)

    run = RunDir.create(config)
    run.slurm.mkdir(exist_ok=True)
    base = examine_model(config, run)
    run.proposal.propose(config)
    (run.slurm / "stop").unlink(missing_ok=True)
    script = write_script(config, run, snapshot.take(run))
    for line in (*(base.remarks if base else ()), *said, *remarks(config, run, base)):
        print(line, file=sys.stderr)
    if missing:
        print(
            f"{missing} of {len(shards)} shards are not indexed: a job without GPUs does that first",
            file=sys.stderr,
        )
    refusal = look_ahead(script) if cluster.can_submit() else None
    if refusal and (dry_run or IMPOSSIBLE in refusal):  # sbatch itself says all else
        print(f"NOTE: as it is, this job would not start here:\n{refusal}", file=sys.stderr)
    if dry_run:
        print(script.read_text(encoding="utf-8"))
        print(f"not submitted: `sbatch {script}` would", file=sys.stderr)
        return
    attempt = run.ledger.read().next_attempt
    job, index_log = _submit_jobs(config, run, script, index_first=missing > 0)
    run.ledger.record(
        Submitted(
            attempt=attempt,
            job=job,
            nodes=str(settings.nodes),
            tasks_per_node=settings.tasks,
            index_log=index_log,
        )
    )
    print(f"""\
submitted job {job}: {config.run.name}, nodes: {settings.nodes}, processes on each: {settings.tasks}
  python -m launch status {run.path}    attempts, causes, goodput
  python -m launch stop {run.path}      save, and end the chain
  tail -F {run.slurm / f"{job}.log"}    what the job says; the ranks' own logs are in {run.logs}
  tensorboard --logdir {run.path.parent}""")
    for line in _remarks_on_queue(config, script, job):
        print(line, file=sys.stderr)


def _submit_jobs(config: RunConfig, run: RunDir, script: Path, *, index_first: bool) -> tuple[str, str]:
    """Submit the first job of a chain; returns it, and the log of the job that makes the index before it."""
    if not index_first:
        return submit(script), ""
    index = _submit_index(config, run)
    log = str(run.slurm / f"index-{index}.log")
    try:
        job = submit(script, f"--dependency=afterok:{index}", "--kill-on-invalid-dep=yes")
    except EarwitnessError:
        cluster.cancel(index)
        raise
    print(f"job {index} indexes the shards; its log: {log}")
    return job, log


def _remarks_on_queue(config: RunConfig, script: Path, job: str) -> Iterator[str]:
    """Whether the job can start, and whether the chain may queue another one beside it."""
    with contextlib.suppress(EarwitnessError):  # `status` says it, too
        for waiting in cluster.queued([job], seconds=cluster.LOOK_SECONDS):
            if what := advice(waiting.reason):
                yield f"NOTE: job {job} waits: {waiting.reason}: {what}"
    if config.slurm.resubmit == "chain":
        refusal = look_ahead(script, f"--dependency=afterany:{job}")
        if refusal and IMPOSSIBLE not in refusal:
            yield f"NOTE: Slurm would not take the next attempt beside this one:\n{refusal}"


def examine_model(config: RunConfig, run: RunDir) -> Pretrained | None:
    """Look over the model as the first start of a run will, and bring it from its hub: compute nodes need no
    network. None for a run that goes on from a checkpoint. Raises ConfigError."""
    if run.has_checkpoint:  # and so a base of its own
        return None
    # Takes seconds, and a run that goes on is submitted without it.
    from trainer.examine import asked_by
    from trainer.hub import fetch, is_hub_name
    from trainer.model import examine_base
    from trainer.weights import examine_source

    name = config.model.name_or_path
    if is_hub_name(name):
        with asked_by("model.name_or_path"):
            fetch(name, run.fetched(name))
    base = examine_base(config.model, config.run.seed, run)
    if config.model.init_from:
        examine_source(Path(config.model.init_from), base.config)
    return base


def _check_scores(config: RunConfig) -> None:
    """Refuse captions to be scored by what is not there; say so where the job may have it nevertheless, by
    `slurm.setup` or in `slurm.python`."""
    try:
        parts.check(config.evaluate.parts, config.evaluate.best_metric)
    except ConfigError as error:
        if not (config.slurm.setup or config.slurm.python):
            raise
        print(f"NOTE: here, though perhaps not in the job: {error}", file=sys.stderr)


def _check_size(config: RunConfig) -> None:
    """Refuse more processes than a step has samples."""
    size = config.batch.global_size
    _, most = config.slurm.processes
    if most > size:
        raise ConfigError(
            f"slurm.nodes={config.slurm.nodes}: up to {most} processes, but a step has {size} samples"
            " (batch.global_size); some would be idle"
        )


def _check_idle(run: RunDir) -> None:
    """Refuse a run that is at work, or in the queue."""
    active = cluster.queued(chain_jobs(run)) if cluster.can_submit() else []
    if active:
        jobs = ", ".join(f"{job.job} ({job.state.lower()})" for job in active)
        raise ConfigError(
            f"{run.path}: its chain is still there: {jobs}. `python -m launch status {run.path}` shows it,"
            f" `python -m launch stop {run.path}` ends it"
        )
    now = holder(run)
    if now is None:
        return
    if now.job and cluster.can_submit():  # Slurm knows that it has ended
        Lease(run, now.attempt).release()
    elif now.alive:
        raise ConfigError(
            f"{run.path}: attempt {now.attempt} is at work on it on {now.host}; stop that one first"
        )


def _check_finished(config: RunConfig, run: RunDir) -> None:
    """Refuse a run that is finished and is asked for no more steps."""
    history = run.ledger.read()
    ended = history.last(Ended)
    is_finished = ended is not None and ended.cause is Cause.FINISHED
    if is_finished and run.read_config().optim == config.optim:
        raise ConfigError(
            f"{run.path}: finished at step {history.saved_step}. More steps: optim.max_steps=N or"
            f" optim.epochs=N; another run: run.name=NAME; what came of it: python -m tools.export {run.path}"
            " captioner"
        )


def _check_credentials(config: RunConfig) -> None:
    """Refuse keys that only this shell has: a job would not have them, or not for long."""
    on_s3 = [url for source in config.data.sources for url in source.shards if url.startswith("s3://")]
    on_s3 += [url for url in [config.checkpoint.mirror or ""] if url.startswith("s3://")]
    if on_s3 and "AWS_SECRET_ACCESS_KEY" in os.environ and not config.slurm.setup:
        raise ConfigError(
            f"{on_s3[0]}: the keys for it are in this shell's environment ({SECRETS[0]}, ...), which is not"
            " handed on to jobs: they outlive keys. Put them into ~/.aws/credentials (and a profile into"
            " AWS_PROFILE or storage_options), or into a file that `slurm.setup` reads: [. ~/.config/s3.env]"
        )


def _check_trackers(config: RunConfig) -> None:
    """Refuse trackers that could not be of use; a Python of the nodes' own says itself what it lacks."""
    if config.slurm.python is None:
        check_packages(config.monitor.trackers)
    if not config.slurm.setup:  # it may set WANDB_MODE, a key, or a proxy
        check_keys(config.monitor.trackers)
        check_network(config.monitor.trackers)


def _look_at_shards(config: RunConfig, shards: Sequence[Shard]) -> int:
    """Read a little of each source, and count the shards without an index. Raises DataError for what cannot
    be read."""
    for source in config.data.sources:
        storage.taste(next(shard for shard in shards if shard.source is source).location)
    return load_sidecars(config, shards).count(None)


def _submit_index(config: RunConfig, run: RunDir) -> str:
    """A job that indexes all shards of a run, on one node without GPUs."""
    one_node = config.slurm.model_copy(
        update={
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": 0,
            "resubmit": "none",
            "sbatch": sbatch.for_one_node(config.slurm.sbatch),
            "srun_args": srun.without_gpus(config.slurm.srun_args),
        }
    )
    script = run.slurm.absolute() / "index.sh"
    script.write_text(
        index_script(config.model_copy(update={"slurm": one_node}), run, run.code), encoding="utf-8"
    )
    return submit(script)
