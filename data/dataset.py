"""The data of a run: its shards, their indexes, and the merged index for training and for validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import DataError
from configs.run.events import SourceSamples
from configs.schema import RunConfig
from data import storage
from data.ffmpeg import ffmpeg_would_win, has_ffmpeg, needs_ffmpeg
from data.index import VERSION, Sidecar, index_shard, load_sidecar, origin, sidecar_location
from data.lengths import tell_lengths
from data.merged import LAYOUT, TRAINING, VALIDATION, Index, merge, read_metadata
from data.order import Order, cut_runs
from data.passes import passes, passes_in_words
from data.sources import Shard, expand
from data.tolerance import too_many_bad


@dataclass(frozen=True)
class Dataset:
    """Training and validation samples of a run."""

    training: Index
    validation: Index

    def order(self, config: RunConfig, base: tuple[int, int] = (0, 0)) -> Order:
        """The order of the training samples. base: global step at which it begins, and its first epoch."""
        size = self.training.column("audio_size") + self.training.column("text_size")
        runs = cut_runs(self.training.column("shard"), size, config.batch.global_size)
        base_step, base_epoch = base
        return Order(
            runs=runs,
            run_source=self.training.column("source")[runs[:-1]].astype(np.int64),
            weights=passes(config.data, self.training.samples_by_source()),
            seed=config.run.seed,
            global_batch=config.batch.global_size,
            shuffle_window=config.data.shuffle_window,
            base_step=base_step,
            base_epoch=base_epoch,
        )


def list_shards(config: RunConfig) -> list[Shard]:
    """All shards of all sources, in the order of the config."""
    return [shard for source in config.data.sources for shard in expand(source)]


def load_sidecars(config: RunConfig, shards: Sequence[Shard]) -> list[Sidecar | None]:
    """The index of each shard; None for one that has none, or changed since."""
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        return list(pool.map(lambda shard: load_sidecar(shard, config.data.index_dir), shards))


def index_missing(config: RunConfig, shards: Sequence[Shard]) -> list[Sidecar]:
    """The sidecars of all shards. Local ones without an index get a quick one; for a bucket that is a job of
    its own.

    Raises DataError for shards of a bucket that have no index, or changed since.
    """
    sidecars = load_sidecars(config, shards)
    missing = [shard for shard, sidecar in zip(shards, sidecars, strict=True) if sidecar is None]
    changed = [shard for shard in missing if storage.find(sidecar_location(shard, config.data.index_dir))]
    if remote := [shard for shard in missing if not shard.location.is_local]:
        stale = [shard for shard in changed if not shard.location.is_local]
        why = "changed since they were indexed" if stale else f"have no index in {config.data.index_dir}"
        raise DataError(
            f"{len(stale or remote)} of {len(shards)} shards {why}, e.g. {(stale or remote)[0].location.url}."
            " Index them once, on a machine without GPUs: python -m tools.index CONFIG"
        )
    for shard in changed:
        print(f"{shard.location.url}: changed since it was indexed; it is indexed anew", flush=True)
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        return list(
            pool.map(
                lambda shard, sidecar: sidecar or index_shard(shard, config.data.index_dir, full=False),
                shards,
                sidecars,
            )
        )


@dataclass(frozen=True)
class Overview:
    """What a run has to train on, and what it has not: said at each start."""

    lines: list[str]
    """What is left out or cut, and why."""
    sources: list[SourceSamples]
    passes: str
    """Over each source in an epoch, where its weight alone does not say it; else empty."""


def left_out(config: RunConfig, shards: Sequence[Shard], sidecars: Sequence[Sidecar]) -> list[str]:
    """A line for each shard of which something cannot be used. Raises DataError if it is more than
    `data.max_bad_fraction`."""
    lines, bad, total, for_ffmpeg = [], 0, 0, 0
    for shard, sidecar in zip(shards, sidecars, strict=True):
        problems = sidecar.table["problem"].filter(pc.not_equal(sidecar.table["problem"], ""))
        bad, total = bad + len(problems), total + len(sidecar.table)
        for_ffmpeg += sum(map(needs_ffmpeg, problems.to_pylist()))
        if sidecar.damage:
            lines.append(f"{shard.location.url}: {sidecar.loss()}")
        if len(problems):
            lines.append(
                f"{shard.location.url}: {len(problems)} of {len(sidecar.table)} samples are left out, e.g."
                f" because of this: {problems[0].as_py()}"
            )
    won = [_won_by_ffmpeg(for_ffmpeg)] if for_ffmpeg else []
    if too_many_bad(bad, total, config.data.max_bad_fraction, few=2):
        allowed = f"data.max_bad_fraction={config.data.max_bad_fraction:g}"
        summary = f"{bad} of {total} samples cannot be used, more than {allowed} allows"
        raise DataError("\n".join([*lines[:20], *won, summary]))
    return [*lines, *won]


def _won_by_ffmpeg(count: int) -> str:
    samples = "1 sample" if count == 1 else f"{count:,} samples"
    index = "`python -m tools.index CONFIG`"
    if has_ffmpeg():
        return f"{samples} needed FFmpeg when indexed, and it is here now: {index} wins them"
    return f"{samples} {ffmpeg_would_win(count)} and {index} after that"


def build(config: RunConfig, folder: Path, longest: float) -> Overview:
    """Write the merged indexes of a run into `folder`, unless those there are current; one rank does it.
    `longest`: seconds of the model's window."""
    for left in folder.glob(".index-*.tmp"):  # by an attempt that was killed
        left.unlink(missing_ok=True)
    shards = list_shards(config)
    used = min(longest, config.data.max_seconds or longest)
    limit = used if config.data.overlong == "skip" else float("inf")
    made = [read_metadata(folder / name) for name in (TRAINING, VALIDATION)]
    if all(made):
        now = _inputs(config, limit, shards, _origins(config, shards)).encode()
        if all(metadata.get(b"inputs") == now for metadata in made):
            return _overview(config, folder, json.loads(made[0][b"left_out"]))
    sidecars = index_missing(config, shards)
    lines = [
        *left_out(config, shards, sidecars),
        *tell_lengths(config.data, shards, sidecars, used),
        *_first_captions(config, shards, sidecars),
    ]
    notes = {
        "inputs": _inputs(config, limit, shards, [sidecar.origin for sidecar in sidecars]),
        "left_out": json.dumps({"lines": lines, "counts": _counts(config, shards, sidecars, limit)}),
    }
    try:
        merge(shards, sidecars, folder, longest=limit, notes=notes)
    except DataError as error:
        raise DataError("\n".join([*lines[:20], str(error)])) from None
    overview = _overview(config, folder, json.loads(notes["left_out"]))
    del sidecars
    pa.default_memory_pool().release_unused()  # 3.1 million samples: 0.6 GB, which the process would keep
    return overview


def _first_captions(config: RunConfig, shards: Sequence[Shard], sidecars: Sequence[Sidecar]) -> list[str]:
    """A line for each source of whose captions only the first are used, as far as its index counts them."""
    lines = []
    for source in config.data.sources:
        parts = zip(shards, sidecars, strict=True)
        of_source = [
            sidecar.table["captions"].to_numpy() for shard, sidecar in parts if shard.source is source
        ]
        counts = np.concatenate(of_source)
        if source.captions == "first" and (counts > 1).any():
            lines.append(
                f"source {source.name}: {(counts > 1).sum():,} of {len(counts):,} samples have several"
                f" captions (up to {counts.max()}), of which the first is used;"
                f" data.sources.{source.name}.captions=all (or random) would use the others, too"
            )
    return lines


def _counts(
    config: RunConfig, shards: Sequence[Shard], sidecars: Sequence[Sidecar], limit: float
) -> list[dict[str, int]]:
    """Samples of each source that the merged index leaves out."""
    counts = {source.name: {"unusable": 0, "too_long": 0} for source in config.data.sources}
    for shard, sidecar in zip(shards, sidecars, strict=True):
        sound = pc.equal(sidecar.table["problem"], "").to_numpy()
        of_source = counts[shard.source.name]
        of_source["unusable"] += int((~sound).sum())
        of_source["too_long"] += int((sound & (sidecar.table["seconds"].to_numpy() > limit)).sum())
    return list(counts.values())


def _overview(config: RunConfig, folder: Path, noted: dict[str, Any]) -> Overview:
    """What the merged indexes in a folder hold, and what was noted when they were made."""
    used = open_dataset(config, folder)
    by_part = (used.training.samples_by_source(), used.validation.samples_by_source())
    sources, lines = [], list(noted["lines"])
    in_epoch = passes(config.data, by_part[0])
    for source, counts, training, validation, of_epoch in zip(
        config.data.sources, noted["counts"], *by_part, in_epoch, strict=True
    ):
        samples = training + validation + sum(counts.values())
        sources.append(SourceSamples(source.name, samples, training, validation, **counts, passes=of_epoch))
        if source.validation.fraction and not validation:
            lines.append(
                f"source {source.name}: data.sources.{source.name}.validation="
                f"{source.validation.fraction:g} chooses none of its {samples:,} samples, so there is no"
                " validation loss of it; a larger share would"
            )
    return Overview(lines, sources, passes_in_words(config.data, by_part[0]))


def _origins(config: RunConfig, shards: Sequence[Shard]) -> list[str]:
    """The origin of each shard's sidecar, "" where there is none."""
    kept = storage.find_all([sidecar_location(shard, config.data.index_dir) for shard in shards])
    there = storage.find_all([shard.location for shard in shards])
    return [
        origin(shard, sidecar) if shard and sidecar else ""
        for shard, sidecar in zip(there, kept, strict=True)
    ]


def _inputs(config: RunConfig, limit: float, shards: Sequence[Shard], origins: Sequence[str]) -> str:
    """SHA-256 of all that merged indexes are made from."""
    listed = [
        (shard.location.url, shard.validation, origin) for shard, origin in zip(shards, origins, strict=True)
    ]
    settings = config.data.model_dump(mode="json", exclude={"sources": {"__all__": {"licence"}}})
    return hashlib.sha256(json.dumps([VERSION, LAYOUT, settings, limit, listed]).encode()).hexdigest()


def open_dataset(config: RunConfig, folder: Path) -> Dataset:
    """Map the merged indexes that `build` wrote."""
    return Dataset(
        Index(folder / TRAINING, config.data.sources), Index(folder / VALIDATION, config.data.sources)
    )
