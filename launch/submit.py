"""`launch submit`: look over everything that would waste an allocation, put the run's folder in order, and
hand the first job to Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

from configs import sbatch, srun
from configs.cores import remark_on_cores
from configs.errors import ConfigError, EarwitnessError
from configs.run.causes import Cause
from configs.run.events import CheckpointSaved, Ended, Submitted
from configs.run.folder import RunDir
from configs.run.lease import Lease, holder
from configs.schema import RunConfig, node_range
from data import storage
from data.balance import remark_on_balance
from data.dataset import list_shards, load_sidecars
from data.sources import Shard
from launch import snapshot
from slurm import cluster
from slurm.chain import chain_jobs
from slurm.sayings import IMPOSSIBLE, advice
from slurm.shell import SECRETS, heed
from slurm.submit import cores_per_task, index_script, look_ahead, submit, write_script

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: master weight and two moments."""
PROBE_BYTES = 64 << 20
LOCAL_SYSTEMS = {"tmpfs", "ramfs", "overlay", "ext4", "ext3", "xfs", "btrfs"}
"""File systems that other machines do not see."""


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
    shards = list_shards(config)
    missing = _look_at_shards(config, shards)

    run = RunDir.create(config)
    run.slurm.mkdir(exist_ok=True)
    remarks = examine_model(config, run)
    run.proposal.propose(config)
    (run.slurm / "stop").unlink(missing_ok=True)
    script = write_script(config, run, snapshot.take(run))
    for line in (*remarks, *said, *_remarks(config, run)):
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


def examine_model(config: RunConfig, run: RunDir) -> Sequence[str]:
    """Look over the model as the first start of a run will, and bring it from its hub: compute nodes need no
    network. Returns what is good to know. Raises ConfigError."""
    if any(run.checkpoints.iterdir()):  # the run goes on with its base
        return ()
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
    return base.remarks


def _rank_range(config: RunConfig) -> tuple[int, int]:
    """Fewest and most processes of an attempt."""
    fewest, most = node_range(config.slurm.nodes)
    return fewest * config.slurm.tasks, most * config.slurm.tasks


def _check_size(config: RunConfig) -> None:
    """Refuse more processes than a step has samples."""
    size = config.batch.global_size
    _, most = _rank_range(config)
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


def _remarks(config: RunConfig, run: RunDir) -> Iterator[str]:
    """What is good to know before a run is submitted."""
    yield from _remarks_on_samples(config)
    yield from _remarks_on_cores(config)
    yield from _remarks_on_checkpoints(config, run)
    yield from _remarks_on_folder(run)


def _remarks_on_samples(config: RunConfig) -> Iterator[str]:
    """How many samples each process gets, and whether they are enough to even out their work."""
    yield _samples_of_each(config)
    _, most = _rank_range(config)
    remark = remark_on_balance(config, most)
    if remark:
        yield f"note: {remark}"


def _remarks_on_cores(config: RunConfig) -> Iterator[str]:
    """How many cores each process gets, and whether they feed its GPU."""
    if not config.slurm.gpus_per_node:
        return
    cores = cores_per_task(config.slurm)
    if cores is None:
        yield (
            "note: Slurm does not say how many cores the nodes have, and each process gets the cluster's"
            " default, often one: set slurm.cpus_per_task"
        )
        return
    yield f"cores for each process: {cores} (slurm.cpus_per_task)"
    remark = remark_on_cores(config.data, cores)
    if remark:
        yield f"note: {remark}"


def _samples_of_each(config: RunConfig) -> str:
    size = config.batch.global_size
    fewest, most = _rank_range(config)
    processes, samples = f"{fewest}", f"{ceil(size / fewest)}"
    if most > fewest:
        processes += f" to {most}"
        samples += f" to {ceil(size / most)}"
    divides_evenly = size % fewest == 0 and size % most == 0
    uneven = "" if divides_evenly else ", some one less"
    return f"a step of {size} samples over {processes} processes: {samples} samples each{uneven}"


def _remarks_on_checkpoints(config: RunConfig, run: RunDir) -> Iterator[str]:
    """How large a checkpoint will be, and whether one can be written in the time that a signal leaves."""
    saved = run.ledger.read().last(CheckpointSaved)
    size = saved.bytes if saved else BYTES_PER_PARAMETER * parameters(config, run)
    if not size:
        return
    fewest, _ = _rank_range(config)
    yield (
        f"a checkpoint has {size / 1e9:.2f} GB in {fewest} or more files; kept: the last"
        f" {config.checkpoint.keep_last} and the best"
    )
    if saved:
        seconds, whose = saved.total_seconds, "the last one took"
    else:
        seconds, whose = size / _write_speed(run), "one process would take"
    took = f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    grace = config.slurm.signal_seconds
    is_slow = seconds > grace / 2
    advice = f". That is more than half of slurm.signal_seconds={grace}: raise it" if is_slow else ""
    yield f"saving: {whose} {took}{advice}"
    free = shutil.disk_usage(run.path).free
    if free < size * (config.checkpoint.keep_last + 2):
        yield f"only {free / 1e9:.1f} GB are free on the file system of {run.path}"


def parameters(config: RunConfig, run: RunDir) -> int:
    """How many parameters a Whisper has, by the dimensions in its config.json; 0 if there is none here."""
    name = config.model.name_or_path
    folders = (run.base, Path(name), run.fetched(name))
    files = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    if not files:
        return 0
    dimensions = json.loads(files[0].read_text(encoding="utf-8"))
    width = dimensions["d_model"]
    attention = 4 * width**2 + 3 * width  # the key has no bias
    norm = 2 * width
    encoder_ffn, decoder_ffn = dimensions["encoder_ffn_dim"], dimensions["decoder_ffn_dim"]
    encoder_layer = attention + 2 * width * encoder_ffn + encoder_ffn + width + 2 * norm
    decoder_layer = 2 * attention + 2 * width * decoder_ffn + decoder_ffn + width + 3 * norm
    convolutions = 3 * width * dimensions["num_mel_bins"] + width + 3 * width**2 + width
    embeddings = (dimensions["vocab_size"] + dimensions["max_target_positions"]) * width
    layers = dimensions["encoder_layers"] * encoder_layer + dimensions["decoder_layers"] * decoder_layer
    return int(convolutions + layers + 2 * norm + embeddings)


def _write_speed(run: RunDir) -> float:
    """Bytes per second that this machine writes into the run's folder."""
    probe, block = run.slurm / "probe", os.urandom(1 << 20)
    began = time.perf_counter()
    with contextlib.closing(probe.open("wb", buffering=0)) as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
    probe.unlink()
    return PROBE_BYTES / (time.perf_counter() - began)


def _remarks_on_folder(run: RunDir) -> Iterator[str]:
    """Say if other machines may not see the run's folder; each attempt looks before it starts."""
    path = run.path.absolute()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    system_at = {place: system for place, system in mounts if path.is_relative_to(place)}
    place = max(system_at, key=len)
    if system_at[place] in LOCAL_SYSTEMS:
        yield (
            f"{path} is on {system_at[place]} ({place}), which looks like this machine's own disk: all"
            " compute nodes must see it under this path"
        )
