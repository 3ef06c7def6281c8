"""Which shards a source has: braces and globs expanded."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from configs.errors import DataError
from configs.schema import Source, as_meant
from data.location import Location
from data.retry import advice
from data.storage import find, glob


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
    """Expand braces and globs to shard locations, sorted by file name, each once. What exists as it is
    written is no pattern."""
    options = json.dumps(source.storage_options, sort_keys=True)
    locations: dict[str, Location] = {}
    for pattern in patterns:
        for match in _matches(Location(pattern, options), source):
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
    """What a pattern stands for."""
    if location.is_local:
        location = replace(location, url=_absolute(location.url))
    folder = _existing(location, "/" if location.is_local else f"{location.protocol}://")
    urls = _braces(folder, location.url[len(folder) :], source)
    if urls == [location.url]:
        return _globbed(location, folder, source)
    found: list[Location] = []
    for one in (replace(location, url=url) for url in urls):
        found += _globbed(one, _existing(one, folder), source)
    return found


def _absolute(url: str) -> str:
    """The path of a local file, from the root."""
    return str(Path(as_meant(url)).absolute())


def _existing(location: Location, known: str) -> str:
    """The beginning of a URL that is there as it is written, whatever is in its names: folders, or all of it.
    known: what of it is known to be."""
    folder = known
    for part in location.url[len(known) :].split("/"):
        place = replace(location, url=f"{folder}{part}")
        is_last = place.url == location.url
        if not _is_there(place, is_last=is_last):
            return folder
        folder = place.url if is_last else f"{place.url}/"
    return folder


def _is_there(place: Location, *, is_last: bool) -> bool:
    if place.is_local:
        return os.path.lexists(place.url)
    name = place.url.rpartition("/")[2]
    if not re.search(r"[*\[{}]" if place.is_http else r"[*?\[{}]", name):
        return True  # no pattern; whether it is there, its reader sees
    if place.is_http and re.search(r"[{}]", name):  # many a web server has a page for every name
        return False
    try:
        there = find(place)
    except DataError:
        return False
    return there is not None and (not is_last or bool(there.size or there.tag))  # else it is a folder


def _braces(folder: str, pattern: str, source: Source) -> list[str]:
    """All that braces in a pattern stand for. folder: what stands before it, as it is."""
    if not re.search(r"[{}]", pattern):
        return [f"{folder}{pattern}"]
    try:
        # A backslash is one, but before a brace or a comma, which then is one, too.
        return [f"{folder}{name}" for name in braceexpand(re.sub(r"\\(?![{},])", r"\\\\", pattern))]
    except ValueError:
        raise DataError(
            f"source {source.name}: {folder}{pattern}: a brace is not closed; a range is written"
            " {000000..000099}"
        ) from None


def _globbed(location: Location, folder: str, source: Source) -> list[Location]:
    """What `*`, `?` and brackets after a folder stand for."""
    wildcards = "*[" if location.is_http else "*?["  # in a URL of http a query follows `?`
    if not any(character in location.url[len(folder) :] for character in wildcards):
        return [location]
    matches = glob(location, folder)
    if not matches:
        raise DataError(
            f"source {source.name}: {location.url} matches no shard. Quote the pattern in the shell."
            f" {advice(location)}"
        )
    return matches
