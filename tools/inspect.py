"""`python -m tools.inspect SHARDS...|CONFIG|RUN|CHECKPOINT`: what is in these shards, or in this checkpoint,
and is it sound."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.compute as pc
import typer

from configs.errors import CheckpointError, ConfigError, run_command
from configs.run.folder import RunDir
from configs.schema import Source
from data import storage
from data.captions import find_caption
from data.decode import AudioInfo, BadSample, decode, probe
from data.index import Sidecar, index_shard, load_sidecar
from data.sources import Shard, expand
from tools.arguments import named_data
from trainer import checkpoint

EXAMPLES = 3
DECODED = 60.0
"""Seconds of each sample that are decoded; of clips of hours that bounds the memory."""
UNREAD = AudioInfo(0.0, 0, 0)


def inspect(
    what: Annotated[
        list[str],
        typer.Argument(
            help="Shards (paths, URLs, globs, braces), a config, a run, or a checkpoint.",
            metavar="SHARDS...|CONFIG|RUN|CHECKPOINT",
        ),
    ],
    caption_key: Annotated[str, typer.Option(help="Where the caption is (for SHARDS).")] = "caption",
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
) -> None:
    """Show what shards hold (their samples are opened and decoded), or verify every byte of a checkpoint."""
    place = Path(what[0])
    if len(what) == 1 and place.is_dir():
        return _show_checkpoints(place)
    data, config = named_data(what, caption_key, index_dir)
    if config:
        tokenizer = tokenizer or config.model.name_or_path
    measure, unit = _length_of_captions(tokenizer)
    for source in data.sources:
        _show_source(source, data.index_dir, samples, measure, unit)


def _length_of_captions(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    """How captions are measured, and in what."""
    if tokenizer is None:
        return len, "characters"
    from transformers import WhisperProcessor

    try:
        words = WhisperProcessor.from_pretrained(tokenizer).tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"{tokenizer}: cannot load a tokenizer from there: {error}") from None
    return lambda caption: len(words(caption, add_special_tokens=False)["input_ids"]), "tokens"


@dataclass(frozen=True)
class _Look:
    """What was found in one sample. `problem` is "" for a sound one."""

    key: str
    problem: str
    ending: str = ""
    info: AudioInfo = UNREAD
    caption: str = ""


def _show_source(
    source: Source, index_dir: str, wanted: int, measure: Callable[[str], int], unit: str
) -> None:
    shards = expand(source)
    with ThreadPoolExecutor(8) as pool:
        with (
            tempfile.TemporaryDirectory() as passing
        ):  # looking leaves no index behind, which a run would then use
            sidecars = list(
                pool.map(
                    lambda shard: load_sidecar(shard, index_dir) or index_shard(shard, passing, full=False),
                    shards,
                )
            )
        known = [
            look
            for shard, sidecar in zip(shards, sidecars, strict=True)
            for look in _problems(shard, sidecar)
        ]
        sound = [(number, row) for number, sidecar in enumerate(sidecars) for row in _sound_rows(sidecar)]
        chosen = (
            sound
            if not wanted or not sound
            else [sound[i] for i in np.linspace(0, len(sound) - 1, min(wanted, len(sound))).astype(int)]
        )
        looks = list(pool.map(lambda place: _look(shards[place[0]], sidecars[place[0]], place[1]), chosen))
    validation = sum(shard.validation for shard in shards)
    megabytes = sum(storage.stat(shard.location).size for shard in shards) / 1e6
    held_out = f" ({validation} of them for validation)" if validation else ""
    print(
        f"source {source.name}: {len(shards)} shards{held_out}, {len(sound) + len(known):,} samples,"
        f" {megabytes:,.1f} MB"
    )
    for shard, sidecar in zip(shards, sidecars, strict=True):
        if sidecar.damage:
            _line("", f"{shard.location.url}: {sidecar.loss()}")
    _line(
        "opened",
        f"{len(looks):,} of {len(sound):,} samples"
        + ("" if len(looks) == len(sound) else ", spread evenly (--samples 0 opens all)"),
    )
    good = [look for look in looks if not look.problem]
    if good:
        _line("audio", "; ".join(_counts(values) for values in _forms(good) if values))
        seconds = [look.info.seconds for look in good]
        hours = sum(seconds) / 3600
        _line(
            "length",
            f"{hours:.2f} h opened, about {hours * len(sound) / len(looks):.2f} h in all;"
            f" {_spread(seconds, 's', '.1f')}",
        )
        _line("captions", _spread([measure(look.caption) for look in good], unit, ".0f"))
    problems: dict[str, list[_Look]] = {}
    for look in [*known, *(look for look in looks if look.problem)]:
        problems.setdefault(look.problem, []).append(look)
    _line("problems", f"{sum(map(len, problems.values())):,}" if problems else "none")
    for problem, where in sorted(problems.items(), key=lambda item: -len(item[1])):
        _line("", f"{len(where):,} x {problem}; e.g. {where[0].key}")
    for look in good[:: max(1, len(good) // EXAMPLES)][:EXAMPLES]:
        _line("example", f"{look.key} ({look.info.seconds:.1f} s): {look.caption}")


def _problems(shard: Shard, sidecar: Sidecar) -> list[_Look]:
    """The samples of which the index says that something is wrong."""
    table = sidecar.table.select(["key", "problem"])
    return [
        _Look(f"{shard.location.name}/{row['key']}", row["problem"])
        for row in table.filter(pc.not_equal(table["problem"], "")).to_pylist()
    ]


def _sound_rows(sidecar: Sidecar) -> list[int]:
    found: list[int] = np.flatnonzero(pc.equal(sidecar.table["problem"], "").to_numpy()).tolist()
    return found


def _look(shard: Shard, sidecar: Sidecar, number: int) -> _Look:
    """Open one sample and decode it."""
    (row,) = sidecar.table.slice(number, 1).to_pylist()
    key = f"{shard.location.name}/{row['key']}"
    audio, text = (
        storage.read(shard.location, row[f"{part}_offset"], row[f"{part}_offset"] + row[f"{part}_size"])
        for part in ("audio", "text")
    )
    try:
        caption, info = find_caption(text, shard.source.caption_key), probe(audio, row["ending"])
        decode(audio, row["ending"], lambda seconds: None if seconds <= DECODED else (0.0, DECODED))
    except BadSample as error:
        return _Look(key, str(error))
    return _Look(key, "", row["ending"], info, caption)


def _forms(looks: Sequence[_Look]) -> tuple[list[str], list[str], list[str]]:
    """Formats, sample rates and channels of samples, in words."""
    channels = {1: "mono", 2: "stereo"}
    infos = [look.info for look in looks if look.info.rate]  # FFmpeg's formats do not say
    rates, forms = (
        [f"{info.rate:,} Hz" for info in infos],
        [channels.get(info.channels, f"{info.channels} channels") for info in infos],
    )
    return [look.ending for look in looks], rates, forms


def _counts(values: Sequence[str]) -> str:
    return ", ".join(f"{value} x {count:,}" for value, count in Counter(values).most_common())


def _spread(values: Sequence[float], unit: str, form: str) -> str:
    low, middle, high, top = np.quantile(values, [0, 0.5, 0.95, 1])
    return (
        f"shortest {low:{form}}, median {middle:{form}}, 95 % up to {high:{form}}, longest {top:{form}}"
        f" {unit}"
    )


def _line(name: str, text: str) -> None:
    print(f"  {name:<10}{text}")


def _show_checkpoints(folder: Path) -> None:
    """Verify a checkpoint, or all of a run. Raises CheckpointError if one is damaged."""
    found = (
        [folder] if (folder / checkpoint.MANIFEST).is_file() else checkpoint.find(RunDir(folder).checkpoints)
    )
    if not found:
        raise ConfigError(
            f"{folder}: neither a checkpoint (no manifest.json) nor a run that has one; for shards, name the"
            " .tar files"
        )
    for (source, reason), keys in RunDir(folder).quarantine.read().by_reason().items():
        print(f"source {source}: {len(keys):,} x {reason}; e.g. {keys[0]}")
    damaged = [problem for one in found for problem in _show_checkpoint(one)]
    if damaged:
        raise CheckpointError(
            "\n".join(
                [*damaged, "A resume sets damaged checkpoints aside, and goes on from the newest sound one."]
            )
        )


def _show_checkpoint(folder: Path) -> list[str]:
    """Print what a checkpoint is; returns what is damaged in it."""
    try:
        reader = checkpoint.Reader(folder)
    except CheckpointError as error:
        print(f"{folder}: DAMAGED")
        return [str(error)]
    about = reader.manifest
    size = sum(file["size"] for file in about.files.values())
    numbers = sum(int(np.prod(entry["shape"])) for entry in about.parameters.values())
    print(
        f"{folder}: step {about.step:,}, {about.updates:,} updates, {len(about.files)} files,"
        f" {size / 1e6:,.1f} MB"
    )
    _line(
        "weights",
        f"{numbers:,} numbers in {len(about.parameters)} parameters, with AdamW's two moments, fp32",
    )
    _line("run", ", ".join(f"{key} {value}" for key, value in about.identity.items()))
    if about.metrics:
        _line("metrics", ", ".join(f"{name} {value:.4f}" for name, value in about.metrics.items()))
    problems = reader.verify()
    _line("digests", f"{len(problems)} blocks DAMAGED" if problems else "every byte verified (XXH3)")
    return problems


if __name__ == "__main__":
    run_command(lambda: typer.run(inspect))
