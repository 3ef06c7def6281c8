"""Which shards a source has: braces and globs expanded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand
from fsspec.core import split_protocol

from configs.errors import DataError
from configs.schema import Source
from data.location import Location
from data.retry import advice
from data.storage import glob


@dataclass(frozen=True)
class Shard:
    """A shard of a source. `validation` marks shards that hold validation samples only."""

    source: Source
    location: Location
    validation: bool = False


def expand(source: Source) -> list[Shard]:
    """All shards of a source, training shards first, sorted by name.

    Raises DataError for a glob without a match, a compressed shard, and two shards of one file name (names
    identify samples).
    """
    held_out = locate(source.validation.shards, source)
    training = [location for location in locate(source.shards, source) if location not in held_out]
    for locations in (training, held_out):
        for shard, following in itertools.pairwise(locations):
            if shard.name == following.name:
                raise DataError(
                    f"source {source.name}: two shards are called {shard.name} ({shard.url} and"
                    f" {following.url}). "
                    "File names identify samples: rename one, or make two sources of them."
                )
    return [Shard(source, location) for location in training] + [
        Shard(source, location, validation=True) for location in held_out
    ]


def locate(patterns: Sequence[str], source: Source) -> list[Location]:
    """Expand braces and globs to shard locations, sorted by file name, each once."""
    options = json.dumps(source.storage_options, sort_keys=True)
    locations: dict[str, Location] = {}
    for pattern in patterns:
        try:
            urls = list(braceexpand(pattern))
        except ValueError:
            raise DataError(
                f"source {source.name}: {pattern}: a brace is not closed; a range is written"
                " {000000..000099}"
            ) from None
        for url in urls:
            for match in _matches(Location(url, options), source):
                locations[match.url] = match
    for location in locations.values():
        suffixes = PurePosixPath(location.name).suffixes
        if suffixes and suffixes[-1] in (".gz", ".tgz", ".zst", ".xz", ".bz2"):
            raise DataError(
                f"{location.url}: compressed shards cannot be read at any position; unpack it to a plain .tar"
                " (audio gains nothing from it)"
            )
    return sorted(locations.values(), key=lambda location: (location.name, location.url))


def _matches(location: Location, source: Source) -> list[Location]:
    if location.is_local:
        location = replace(location, url=str(Path(split_protocol(location.url)[1]).absolute()))
    wildcards = "*[" if location.url.startswith("http") else "*?["
    if not any(character in location.url for character in wildcards):
        return [location]
    matches = glob(location)
    if not matches:
        raise DataError(
            f"source {source.name}: {location.url} matches no shard. Quote the pattern in the shell."
            f" {advice(location)}"
        )
    return matches
