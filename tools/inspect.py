"""`python -m tools.inspect SHARDS...|CONFIG|RUN|CHECKPOINT`: shows what shards or checkpoints hold, and
whether they are sound."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow.compute as pc
import typer

from configs.errors import CheckpointError, ConfigError, run_command
from configs.run.folder import RunDir
from configs.schema import Source
from data import storage
from data.captions import find_captions
from data.decode import AudioInfo, BadSample, decode, probe
from data.index import Sidecar, ignored_in_words, index_shard, load_sidecar
from data.merged import training_samples
from data.passes import passes_in_words
from data.sources import Shard, expand
from tools.arguments import CaptionKeys, StorageOptions, named_data
from trainer import checkpoint

EXAMPLES = 3
WHISPER_SECONDS = 30.0
"""The window of a published Whisper: longer clips are not trained on."""
DECODED_SECONDS = 60.0
"""Seconds of each sample that are decoded: this bounds the memory for clips of hours."""


def inspect(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Shards (paths, URLs, globs, braces), a config, a run, or a checkpoint.",
            metavar="SHARDS...|CONFIG|RUN|CHECKPOINT",
        ),
    ],
    caption_key: CaptionKeys = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Model whose tokens are counted (for SHARDS); a config names its own."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples of each source to open, spread evenly over it; 0 opens all.")
    ] = 1000,
    index_dir: Annotated[
        str | None, typer.Option(help="Where the indexes are (for SHARDS).", show_default="index")
    ] = None,
    storage_options: StorageOptions = None,
) -> None:
    """Show what shards hold (their samples are opened and decoded), or verify every byte of a checkpoint."""
    folder = Path(names[0])
    if len(names) == 1 and folder.is_dir():
        _show_checkpoints(folder)
        return
    data, config = named_data(names, caption_key, index_dir, storage_options)
    if tokenizer is None and config is not None:
        tokenizer = config.model.name_or_path
    ruler = _caption_ruler(tokenizer)
    longest = data.max_seconds or WHISPER_SECONDS
    sizes = [
        _show_source(source, data.index_dir, samples, ruler, longest if data.overlong == "skip" else math.inf)
        for source in data.sources
    ]
    if data.temperature != 1:
        print(passes_in_words(data, sizes))


class _Ruler(NamedTuple):
    """Measures captions: a function from a caption to its length, and the unit of that length."""

    measure: Callable[[str], int]
    unit: str


def _caption_ruler(tokenizer: str | None) -> _Ruler:
    if tokenizer is None:
        return _Ruler(len, "characters")
    from trainer.examine import tokenizer_of

    encode = tokenizer_of(tokenizer, "the tokenizer").encode
    return _Ruler(lambda caption: len(encode(caption, add_special_tokens=False)), "tokens")


class _Row(NamedTuple):
    """One row of the index of a shard: a sample."""

    shard: Shard
    sidecar: Sidecar
    number: int


@dataclass(frozen=True)
class _Sound:
    """A sample that was opened, and its audio decoded."""

    key: str
    ending: str
    info: AudioInfo
    captions: list[str]


@dataclass(frozen=True)
class _Problem:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


def _show_source(source: Source, index_dir: str, limit: int, ruler: _Ruler, longest: float) -> int:
    """Print what a source holds; at most `limit` samples are opened, with 0 all. Returns how many there are
    to train on, without those that the index knows to be longer than `longest` seconds."""
    shards = expand(source)
    with ThreadPoolExecutor(8) as pool:
        sidecars = _sidecars(shards, index_dir, pool)
        rows: list[_Row] = []
        problems: list[_Problem] = []
        for shard, sidecar in zip(shards, sidecars, strict=True):
            rows += [_Row(shard, sidecar, number) for number in _usable_rows(sidecar)]
            problems += _indexed_problems(shard, sidecar)
        in_all = len(rows) + len(problems)
        opened = list(pool.map(_open, _spread_evenly(rows, limit)))
    sound = [sample for sample in opened if isinstance(sample, _Sound)]
    problems += [sample for sample in opened if isinstance(sample, _Problem)]

    validation = sum(shard.validation for shard in shards)
    held_out = f" ({validation} of them for validation)" if validation else ""
    megabytes = sum(storage.stat(shard.location).size for shard in shards) / 1e6
    print(f"source {source.name}: {len(shards)} shards{held_out}, {in_all:,} samples, {megabytes:,.1f} MB")
    for shard, sidecar in zip(shards, sidecars, strict=True):
        if sidecar.damage:
            _line("", f"{shard.location.url}: {sidecar.loss()}")
    _show_members(sidecars, sum(isinstance(sample, _Problem) for sample in opened))
    hint = "" if len(opened) == len(rows) else ", spread evenly (--samples 0 opens all)"
    _line("opened", f"{len(opened):,} of {len(rows):,} samples{hint}")
    if sound:
        _show_sound(sound, len(rows) / len(opened), ruler)
    _show_problems(problems)
    for sample in sound[:: max(1, len(sound) // EXAMPLES)][:EXAMPLES]:
        _line("example", f"{sample.key} ({sample.info.seconds:.1f} s): {sample.captions[0]}")
    return sum(map(training_samples, shards, sidecars, itertools.repeat(longest)))


def _sidecars(shards: Sequence[Shard], index_dir: str, pool: ThreadPoolExecutor) -> list[Sidecar]:
    """The indexes of shards. Those that are missing are made for this look only: a run would use what is left
    behind."""
    with tempfile.TemporaryDirectory() as passing:

        def sidecar_of(shard: Shard) -> Sidecar:
            return load_sidecar(shard, index_dir) or index_shard(shard, passing, full=False)

        return list(pool.map(sidecar_of, shards))


def _usable_rows(sidecar: Sidecar) -> list[int]:
    numbers: list[int] = np.flatnonzero(pc.equal(sidecar.table["problem"], "").to_numpy()).tolist()
    return numbers


def _indexed_problems(shard: Shard, sidecar: Sidecar) -> list[_Problem]:
    """The samples of which the index says that they cannot be used."""
    table = sidecar.table.select(["key", "problem"])
    rows = table.filter(pc.not_equal(table["problem"], "")).to_pylist()
    return [_Problem(f"{shard.location.name}/{row['key']}", row["problem"]) for row in rows]


def _show_members(sidecars: Sequence[Sidecar], found: int) -> None:
    """Print what became of every member of the archives. found: samples that have turned out to be no good
    when they were opened."""
    in_problems = 2 * found
    kinds: Counter[str] = Counter()
    for sidecar in sidecars:
        has_problem = pc.not_equal(sidecar.table["problem"], "")
        in_problems += pc.sum(sidecar.table["members"].filter(has_problem)).as_py() or 0
        kinds.update(sidecar.ignored)
    total = sum(sidecar.members for sidecar in sidecars)
    _line(
        "members",
        f"{total:,}: {total - in_problems - kinds.total():,} of samples, {in_problems:,} of those with a"
        f" problem, {ignored_in_words(kinds)}",
    )


def _spread_evenly(rows: list[_Row], limit: int) -> list[_Row]:
    """At most `limit` rows, spread evenly; with 0 all."""
    if limit == 0 or len(rows) <= limit:
        return rows
    return [rows[place] for place in np.linspace(0, len(rows) - 1, limit).astype(int)]


def _open(row: _Row) -> _Sound | _Problem:
    """Open one sample and decode it."""
    shard, sidecar, number = row
    (sample,) = sidecar.table.slice(number, 1).to_pylist()
    key = f"{shard.location.name}/{sample['key']}"

    def read(part: str) -> bytes:
        start = sample[f"{part}_offset"]
        return storage.read(shard.location, start, start + sample[f"{part}_size"])

    audio, text = read("audio"), read("text")
    try:
        captions = find_captions(text, shard.source.caption_keys)
        info = probe(audio, sample["ending"])
        decode(audio, sample["ending"], _part_to_decode)
    except BadSample as error:
        return _Problem(key, str(error))
    return _Sound(key, sample["ending"], info, captions)


def _part_to_decode(seconds: float) -> tuple[float, float] | None:
    return None if seconds <= DECODED_SECONDS else (0.0, DECODED_SECONDS)


def _show_sound(samples: Sequence[_Sound], share: float, ruler: _Ruler) -> None:
    """Print formats, lengths and captions. share: of the whole source, samples per sample that was opened."""
    channels = {1: "mono", 2: "stereo"}
    known = [sample.info for sample in samples if sample.info.rate]  # FFmpeg's formats do not say
    forms = [_counts([sample.ending for sample in samples])]
    if known:
        forms.append(_counts([f"{info.rate:,} Hz" for info in known]))
        forms.append(_counts([channels.get(info.channels, f"{info.channels} channels") for info in known]))
    _line("audio", "; ".join(forms))
    seconds = [sample.info.seconds for sample in samples]
    hours = sum(seconds) / 3600
    _line(
        "length",
        f"{hours:.2f} h opened, about {hours * share:.2f} h in all; {_quantiles(seconds, 's', '.1f')}",
    )
    lengths = [ruler.measure(caption) for sample in samples for caption in sample.captions]
    several = [len(sample.captions) for sample in samples if len(sample.captions) > 1]
    more = f"; {len(several):,} samples have several, up to {max(several)}" if several else ""
    _line("captions", _quantiles(lengths, ruler.unit, ".0f") + more)


def _show_problems(problems: Sequence[_Problem]) -> None:
    """Print how often each reason stands, the commonest first, with an example."""
    keys_of_reason: dict[str, list[str]] = {}
    for problem in problems:
        keys_of_reason.setdefault(problem.reason, []).append(problem.key)
    _line("problems", f"{len(problems):,}" if problems else "none")
    for reason, keys in sorted(keys_of_reason.items(), key=lambda item: -len(item[1])):
        _line("", f"{len(keys):,} x {reason}; e.g. {keys[0]}")


def _counts(values: Sequence[str]) -> str:
    return ", ".join(f"{value} x {count:,}" for value, count in Counter(values).most_common())


def _quantiles(values: Sequence[float], unit: str, form: str) -> str:
    low, middle, high, top = (f"{value:{form}}" for value in np.quantile(values, [0, 0.5, 0.95, 1]))
    return f"shortest {low}, median {middle}, 95 % up to {high}, longest {top} {unit}"


def _line(name: str, text: str) -> None:
    print(f"  {name:<10}{text}")


def _show_checkpoints(folder: Path) -> None:
    """Verify a checkpoint, or all of a run. Raises CheckpointError if one is damaged."""
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoints = [folder]
    else:
        checkpoints = checkpoint.find(RunDir(folder).checkpoints)
    if not checkpoints:
        raise ConfigError(
            f"{folder}: neither a checkpoint (no manifest.json) nor a run that has one; for shards, name the"
            " .tar files"
        )
    for (source, reason), keys in RunDir(folder).quarantine.read().by_reason().items():
        print(f"source {source}: {len(keys):,} x {reason}; e.g. {keys[0]}")
    damages = [damage for path in checkpoints for damage in _show_checkpoint(path)]
    if damages:
        advice = "A resume sets damaged checkpoints aside, and goes on from the newest sound one."
        raise CheckpointError("\n".join([*damages, advice]))


def _show_checkpoint(folder: Path) -> list[str]:
    """Print what a checkpoint is; returns what is damaged in it."""
    try:
        reader = checkpoint.Reader(folder)
    except CheckpointError as error:
        print(f"{folder}: DAMAGED")
        return [str(error)]
    manifest = reader.manifest
    megabytes = sum(file["size"] for file in manifest.files.values()) / 1e6
    weights = sum(int(np.prod(parameter["shape"])) for parameter in manifest.parameters.values())
    print(
        f"{folder}: step {manifest.step:,}, {manifest.updates:,} updates, {len(manifest.files)} files,"
        f" {megabytes:,.1f} MB"
    )
    _line(
        "weights",
        f"{weights:,} numbers in {len(manifest.parameters)} parameters, with AdamW's two moments, fp32",
    )
    _line("run", ", ".join(f"{key} {value}" for key, value in manifest.identity.items()))
    if manifest.metrics:
        _line("metrics", ", ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items()))
    damages = reader.verify()
    _line("digests", f"{len(damages)} blocks DAMAGED" if damages else "every byte verified (XXH3)")
    return damages


if __name__ == "__main__":
    run_command(lambda: typer.run(inspect))
