"""Which shards and samples a run takes: braces and globs, the share that is held out, and the merged
index."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data.index import SCHEMA, Sidecar
from data.location import Location
from data.merged import TRAINING, VALIDATION, Index, is_held_out, merge
from data.sources import Shard, expand
from data.storage import Stat
from tests.shards import clip, keys, merged, shard, source, words


def test_a_key_is_on_the_same_side_in_every_shard_and_source(tmp_path: Path) -> None:
    numbers = {"one": range(20), "two": range(10, 30), "other": range(40)}
    one, two, other = (
        shard(
            tmp_path / f"{name}.tar", [(f"key{n}.{ending}", b"?") for n in part for ending in ("wav", "json")]
        )
        for name, part in numbers.items()
    )
    sources = [source(one, two, validation=0.5), source(other, name="other", validation=0.5)]
    training, held_out = (merged(tmp_path, *sources, full=False, held_out=side) for side in (False, True))
    assert not keys(training) & keys(held_out) and keys(training) | keys(held_out) == {
        f"key{n}" for n in range(40)
    }
    assert len(training) + len(held_out) == 20 + 20 + 40, "every sample is on one side"
    assert keys(merged(tmp_path, source(two, validation=0.5), full=False)) == keys(training) & {
        f"key{n}" for n in numbers["two"]
    }


def test_the_share_held_out_is_that_asked_for_and_grows_with_it() -> None:
    sides = [
        {key for key in map(str, range(5000)) if is_held_out(key, source("x", validation=share))}
        for share in (0.0, 0.01, 0.2)
    ]
    assert not sides[0] and sides[1] < sides[2]
    assert [len(side) for side in sides[1:]] == [pytest.approx(50, rel=0.4), pytest.approx(1000, rel=0.1)]


@pytest.mark.parametrize("group", [r"^(rec\d+)_", r"rec\d+"])
def test_segments_of_one_recording_stay_together(group: str) -> None:
    whole = source("x", validation={"fraction": 0.3, "group": group})
    sides = {
        recording: {is_held_out(f"rec{recording}_{segment}", whole) for segment in range(10)}
        for recording in range(50)
    }
    assert all(len(side) == 1 for side in sides.values()) and len(set.union(*sides.values())) == 2


@pytest.mark.parametrize(
    ("shards", "dev"),
    [("{}/*.tar", "{}/dev.tar"), ("*.tar", "dev.tar"), ("./*.tar", "{}/dev.tar"), ("{}/*.tar", "./d*.tar")],
)
def test_validation_shards_are_for_validation_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str, dev: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train-0", "train-1", "dev"):
        shard(tmp_path / f"{name}.tar", clip(name))
    whole = source(shards.format(tmp_path), validation={"shards": [dev.format(tmp_path)]})
    assert [one.location.name for one in expand(whole)] == ["train-0.tar", "train-1.tar", "dev.tar"]
    assert keys(merged(tmp_path, whole)) == {"train-0", "train-1"} and keys(
        merged(tmp_path, whole, held_out=True)
    ) == {"dev"}


def test_braces_and_globs_name_shards_once_and_sorted(tmp_path: Path) -> None:
    paths = [shard(tmp_path / f"a-{number:02d}.tar", clip("a")) for number in range(12)]
    for patterns in (["a-{00..11}.tar"], ["a-*.tar"], ["a-1?.tar", "a-0[0-9].tar", "a-{03,07}.tar"]):
        assert [
            one.location.url for one in expand(source(*(tmp_path / pattern for pattern in patterns)))
        ] == [str(path) for path in paths]


def test_shards_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for path in ("a.tar", "b/a.tar", "c.tar.gz", "d.tgz"):
        shard(tmp_path / path, clip("a"))
    with pytest.raises(DataError, match=r"two shards are called a\.tar .*rename one"):
        expand(source(tmp_path / "a.tar", tmp_path / "b/a.tar"))
    for compressed in ("c.tar.gz", "*.tgz"):
        with pytest.raises(DataError, match=r"unpack it to a plain \.tar"):
            expand(source(tmp_path / compressed))
    with pytest.raises(DataError, match=r"e-\*\.tar matches no shard"):
        expand(source(tmp_path / "e-*.tar"))
    with pytest.raises(DataError, match=r"f-1\.tar: .*does not exist"):
        merged(tmp_path, source(tmp_path / "f-{1..2}.tar"))


def test_a_source_without_a_sound_sample_is_named(tmp_path: Path) -> None:
    good, bad = shard(tmp_path / "a.tar", clip("a")), shard(tmp_path / "b.tar", [("b.json", words())])
    with pytest.raises(DataError, match=r"no sample to train on in source poor.*tools\.index"):
        merged(tmp_path, source(good), source(bad, name="poor"))


def test_a_validation_part_without_a_sound_sample_is_named(tmp_path: Path) -> None:
    good, bad = shard(tmp_path / "a.tar", clip("a")), shard(tmp_path / "b.tar", [("b.json", words())])
    with pytest.raises(DataError, match=r"no sample to validate with in source sounds.*tools\.index"):
        merged(tmp_path, source(good, validation={"shards": [str(bad)]}))


def rows_of(seed: int, samples: int) -> list[dict[str, object]]:
    """Rows of a sidecar, some with a problem, some long, some of unknown length."""
    random = np.random.default_rng(seed)
    return [
        {
            "key": f"rec{random.integers(9)}_ü{seed}.{n}",
            "ending": "wav",
            "audio_offset": 512 * n,
            "audio_size": int(random.integers(1, 1 << 40)),
            "text_offset": 7,
            "text_size": int(random.integers(99)),
            "crc32": int(random.integers(-1, 1 << 32)),
            "seconds": float(np.float32(random.choice([np.nan, 1.5, 30.0, 99.0]))),
            "caption_characters": n,
            "captions": int(random.integers(-1, 4)),
            "members": 2,
            "problem": str(random.choice(["", "", "bad"])),
        }
        for n in range(samples)
    ]


sides = st.sampled_from(
    [{}, {"fraction": 0.4}, {"fraction": 0.4, "group": r"^(rec\d+)_"}, {"fraction": 0.4, "group": r"5|7"}]
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(sides, st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=3)), max_size=3),
    st.sampled_from([30.0, math.inf]),
)
def test_merging_takes_the_usable_rows_in_turn(
    tmp_path_factory: pytest.TempPathFactory, given: list, longest: float
) -> None:
    folder = tmp_path_factory.mktemp("merged")
    sources = [source("x", name=f"s{n}", validation=side) for n, (side, _) in enumerate([({}, []), *given])]
    shards, tables, expected = [], [], {True: [], False: []}
    held_out_of: set[int] = set()
    for number, (one, parts) in enumerate(
        zip(sources, [[(40, False)], *(parts for _, parts in given)], strict=True)
    ):
        for samples, for_validation in [(40, False), *parts]:
            shards.append(Shard(one, Location(f"/{number}/{len(shards)}.tar"), for_validation))
            tables.append(rows_of(len(shards), samples))
            for row in tables[-1]:
                hashed = row["key"]
                if one.validation.group and (found := re.search(one.validation.group, row["key"])):
                    hashed = found[1] if found.re.groups else found[0]
                share = int.from_bytes(hashlib.sha256(hashed.encode()).digest()[:8], "big") / 2**64
                is_held_out = for_validation or share < one.validation.fraction
                if is_held_out:
                    held_out_of.add(number)
                if row["problem"] == "" and not row["seconds"] > longest:
                    kept = {
                        name: value
                        for name, value in row.items()
                        if name not in ("problem", "caption_characters", "captions", "members")
                    }
                    place = {"caption": -1, "source": number, "shard": len(shards) - 1}
                    expected[is_held_out].append({**kept, **place})
    sidecars = [
        Sidecar(pa.Table.from_pylist(table, SCHEMA), True, "", Stat(1, "tag"), "", 2 * len(table), {})
        for table in tables
    ]
    if without := held_out_of - {row["source"] for row in expected[True]}:
        with pytest.raises(DataError, match=f"validate with in source s{min(without)}"):
            merge(shards, sidecars, folder, longest=longest)
        return
    merge(shards, sidecars, folder, longest=longest)
    for held_out, name in ((False, TRAINING), (True, VALIDATION)):
        index, rows = Index(folder / name, sources), expected[held_out]
        assert repr(index.table.to_pylist()) == repr(rows), "NaN is NaN"
        digest = hashlib.sha256(json.dumps([[one.source.name, one.location.name] for one in shards]).encode())
        for column, kind in (("shard", np.int32), ("audio_size", np.int64), ("text_size", np.int64)):
            digest.update(np.array([row[column] for row in rows], kind).tobytes())
        digest.update("\n".join(row["key"] for row in rows).encode())
        assert index.digest == digest.hexdigest(), "checkpoints hold it"


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    def digest(folder: str, **options: str) -> str:
        return merged(tmp_path / folder / "index", source(tmp_path / folder / "*.tar", **options)).digest

    for name in ("a", "b"):
        shard(tmp_path / f"here/{name}.tar", clip(name))
    first = digest("here")
    for folder in ("copied", "changed", "renamed"):
        shutil.copytree(tmp_path / "here", tmp_path / folder)
    assert digest("copied") == first != digest("copied", name="other")
    (name, audio), _ = clip("a")
    shard(tmp_path / "changed/a.tar", [(name, audio), ("a.json", words("Another."))])
    assert digest("changed") != first
    assert merged(tmp_path / "full", source(tmp_path / "here/*.tar"), full=False).digest == first, (
        "a run that began on a quick index goes on"
    )
    (tmp_path / "renamed/a.tar").rename(tmp_path / "renamed/c.tar")
    assert digest("renamed") != first, "a shard's name is part of what the samples are called"
