from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from configs.schema import Source
from data.index import SCHEMA, TRAINING, VALIDATION, Index, Sidecar, index_shard, is_held_out, load_sidecar, merge, sidecar_location
from data.location import Location
from data.sources import Shard, expand
from data.storage import Stat
from tests.making import run_program, sound_of
from tools.index import index as index_command

Members = list[tuple[str, bytes]]


def sound(number: int = 0, ending: str = "wav") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound_of(number), 16_000, format=ending)
    return file.getvalue()


def words(caption: str = "A bell.", **others: object) -> bytes:
    return json.dumps({"caption": caption, **others}).encode()


def clip(key: str, number: int = 0) -> Members:
    return [(f"{key}.wav", sound(number)), (f"{key}.json", words(f"Clip {number}."))]


def shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def source(*shards: Path | str, name: str = "sounds", **options: object) -> Source:
    return Source(name=name, shards=[str(path) for path in shards], **options)


def rows(path: Path, *, full: bool = True, **options: object) -> dict[str, dict]:
    """The rows of a shard's sidecar by key."""
    (one,) = expand(source(path, **options))
    return {row["key"]: row for row in index_shard(one, path.parent / "index", full=full).table.to_pylist()}


def merged(folder: Path, *sources: Source, full: bool = True, held_out: bool = False) -> Index:
    shards = [shard for one in sources for shard in expand(one)]
    merge(shards, [index_shard(one, folder, full=full) for one in shards], folder)
    return Index(folder / (VALIDATION if held_out else TRAINING), sources)


def keys(index: Index) -> set[str]:
    return {index.text("key", row) for row in range(len(index))}


PEOPLES = {
    "plain": ("plain.wav", "plain.json"),
    "dotted": ("./dotted.wav", "./dotted.json"),
    "upper": ("upper.WAV", "upper.JSON"),
    "set.v2/night/owl": ("set.v2/night/owl.take2.Wav", "./set.v2/night/owl.json"),
    "ünï 漢": ("ünï 漢.wav", "ünï 漢.json"),
    "x" * 150: ("x" * 150 + ".wav", "x" * 150 + ".json"),
}
MEMBERS = [(name, sound(number) if name.lower().endswith("wav") else words(name)) for number, pair in enumerate(PEOPLES.values()) for name in pair]
STRAY = [("README.txt", b"of the set"), ("noending", b"?"), ("._plain.json", b"left by macOS")]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(order=st.permutations(MEMBERS + STRAY))
def test_samples_are_found_whatever_the_order_and_spelling_of_members(tmp_path_factory: pytest.TempPathFactory, order: Members) -> None:
    path = shard(tmp_path_factory.mktemp("any") / "a.tar", order)
    content = path.read_bytes()
    for found in (rows(path, full=False), rows(path, full=True)):
        assert set(PEOPLES) == {key for key, row in found.items() if not row["problem"]}
        for key, members in PEOPLES.items():
            for part, member in zip(("audio", "text"), members, strict=True):
                assert content[found[key][f"{part}_offset"] :][: found[key][f"{part}_size"]] == dict(MEMBERS)[member]


def test_names_that_are_not_utf_8_do_not_stop_the_index(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", clip("caf\udce9") + clip("tea"))  # é in Latin-1
    assert [row["problem"] for key, row in rows(path).items() if key == "tea"] == [""]


def test_several_audio_members_need_a_choice(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("a.16k.flac", sound(0, "flac")), ("a.44k.FLAC", sound(1, "flac")), ("a.json", words())])
    with pytest.raises(DataError, match=r"'a' has several audio members \(\.16k\.flac, \.44k\.flac\).*data\.sources\.sounds\.audio=16k\.flac"):
        rows(path)
    for choice, number in (("16k.flac", 0), (".44K.flac", 1)):
        assert rows(path, audio=choice)["a"]["crc32"] == zlib.crc32(words(), zlib.crc32(sound(number, "flac")))


@pytest.mark.parametrize("full", [True, False])
def test_incomplete_samples_are_rows_with_a_problem(tmp_path: Path, full: bool) -> None:
    twice = [("twice.wav", sound(1)), *clip("twice", 2)]
    path = shard(tmp_path / "a.tar", [("mute.json", words()), ("mute.png", b"?"), ("wordless.wav", sound()), *twice, *clip("sound")])
    found = {key: row["problem"] for key, row in rows(path, full=full).items()}
    assert found == {
        "mute": "no audio member (there are .json, .png)", "wordless": "no .json member", "twice": "the key occurs twice in this shard", "sound": "",
    }  # fmt: skip
    assert keys(merged(tmp_path, source(path), full=full)) == {"sound"}


def test_a_full_index_measures_the_sound_samples(tmp_path: Path) -> None:
    row = rows(shard(tmp_path / "a.tar", [("a.flac", sound(3, "flac")), ("a.json", words(" Drei Töne. "))]))["a"]
    assert (row["crc32"], row["caption_characters"], row["ending"]) == (
        zlib.crc32(words(" Drei Töne. "), zlib.crc32(sound(3, "flac"))),
        len("Drei Töne."),
        "flac",
    )
    assert row["seconds"] == pytest.approx(len(sound_of(3)) / 16_000)


PROBLEMS = {
    "broken": (sound(), b"{", "the JSON is broken"),
    "nested": (sound(), b'{"caption": ' + b"[" * 100_000, "the JSON is broken"),
    "latin": (sound(), b'{"caption": "caf\xe9"}', "not UTF-8"),
    "other key": (sound(), b'{"text": "A", "id": 1}', "no caption under 'caption' (keys there: text, id)"),
    "number": (sound(), b'{"caption": 3}', "is int, not text"),
    "blank": (sound(), words(" \n"), "the caption is empty"),
    "no bytes": (b"", words(), "the audio is empty (0 bytes)"),
    "header only": (sound()[:44], words(), "the audio is cut off: 44 of 16,044 bytes are there"),
    "no samples": (sound()[:4] + (36).to_bytes(4, "little") + sound()[8:40] + bytes(4), words(), "the audio has no samples (0 s)"),
    "half a FLAC": (sound(3, "flac")[:400], words(), "the audio cannot be decoded"),
    "page": (b"<html>404</html>", words(), "the audio cannot be decoded"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_full_index_says_what_is_wrong_with_a_sample(tmp_path: Path, case: str) -> None:
    audio, text, problem = PROBLEMS[case]
    path = shard(tmp_path / "a.tar", [("a.wav", audio), ("a.json", text), *clip("b")])
    found = rows(path)
    assert problem in found["a"]["problem"] and found["b"]["problem"] == ""
    assert keys(merged(tmp_path, source(path))) == {"b"}


def test_a_cut_off_shard_keeps_what_comes_before_and_says_so(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", clip("a") + clip("b") + clip("c"))
    path.write_bytes(path.read_bytes()[: rows(path)["c"]["audio_offset"] + 100])
    (one,) = expand(source(path))
    sidecar = index_shard(one, tmp_path, full=True)
    assert sidecar.table.column("key").to_pylist() == ["a", "b"] and "'c.wav'" in sidecar.damage
    assert (kept := load_sidecar(one, tmp_path)) is not None and kept.damage == sidecar.damage
    said = run_program("tools.index", path, "--index-dir", tmp_path / "index")
    assert said.returncode == 0, said.stderr
    assert f"{path}: DAMAGED: 'c.wav'" in said.stdout and "2 samples before that are kept" in said.stdout and "1 shards damaged" in said.stdout


@pytest.mark.parametrize(("content", "said"), [(b"", r"a\.tar: is empty, or a folder"), (b"<html>403 Forbidden</html>" * 100, r"a\.tar: not a tar archive")])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=said):
        rows(tmp_path / "a.tar")


def test_a_shard_that_cannot_be_read_does_not_keep_the_others_from_their_index(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    path = shard(tmp_path / "b.tar", clip("b"))
    said = run_program("tools.index", tmp_path / "a.tar", path, "--index-dir", tmp_path / "index")
    assert said.returncode == 3 and "a.tar: not a tar archive" in said.stderr and "2 shards, 1 samples" in said.stdout
    assert [file.name[:2] for file in (tmp_path / "index").glob("*.parquet")] == ["b-"]


def test_an_index_without_a_sample_is_an_error_with_its_reason_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", clip("a") + clip("b") + clip("c"))
    said = run_program("tools.index", path, "--caption-key", "words", "--index-dir", tmp_path / "index")
    assert said.returncode == 3 and "no sample can be used" in said.stderr and said.stdout.count("no caption under 'words'") == 1
    assert "; and 2 others" in said.stdout


def test_an_index_is_used_again_until_its_shard_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard(tmp_path / "a.tar", clip("a"))
    (one,) = expand(source(path))

    def made(**options: bool) -> tuple[int, str]:
        index_command([str(path)], caption_key="caption", index_dir=str(tmp_path / "index"), threads=2, **options)
        return Path(sidecar_location(one, tmp_path / "index").url).stat().st_ino, capsys.readouterr().out

    quick, _ = made(quick=True)
    full, said = made(quick=False)
    assert quick != full and "1 samples, 0.00 h, 0 with a problem" in said, "a quick index is no full one"
    assert made(quick=False) == (full, said) and made(quick=True)[0] == full, "what is there was done again"
    changed = path.stat().st_mtime + 5
    shard(path, [("a.wav", sound()), *clip("b")])
    os.utime(path, (changed, changed))
    assert load_sidecar(one, tmp_path / "index") is None
    renewed, said = made(quick=False)
    assert f"{path}: changed since it was indexed; it is indexed anew" in said
    assert renewed != full and f"{path}: a: no .json member" in said and "1 samples" in said


def test_the_jobs_of_a_slurm_array_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        shard(tmp_path / f"{number}.tar", clip("a"))
    for number, count in ((1, 3), (3, 2)):  # as of --array=1-3:2
        for name, value in (("MIN", 1), ("MAX", 3), ("STEP", 2), ("ID", number)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        index_command([f"{tmp_path}/*.tar"], caption_key="caption", index_dir=str(tmp_path / "index"), threads=1, quick=True)
        assert f"{count} shards, {count} samples" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")  # as of --array=1,2,3 with a step that is none
    with pytest.raises(ConfigError, match="evenly spaced"):
        index_command([f"{tmp_path}/*.tar"], caption_key="caption", index_dir=str(tmp_path / "index"), threads=1, quick=True)
    assert len(list((tmp_path / "index").iterdir())) == 5


def test_a_damaged_index_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = expand(source(shard(tmp_path / "a.tar", clip("a"))))
    index_shard(one, tmp_path / "index", full=True)
    for content in (b"", b"PAR1 and so on"):
        Path(sidecar_location(one, tmp_path / "index").url).write_bytes(content)
        assert load_sidecar(one, tmp_path / "index") is None
        assert "this index is damaged; it is made anew" in capsys.readouterr().out


@pytest.mark.parametrize(("caption_key", "member"), [("meta.en.text", ("a.json", b'{"meta": {"en": {"text": "A bell."}}}')), (".txt", ("a.TXT", b"A bell.\n"))])
def test_captions_at_a_dotted_path_or_in_text_members(tmp_path: Path, caption_key: str, member: tuple[str, bytes]) -> None:
    row = rows(shard(tmp_path / "a.tar", [("a.wav", sound()), member]), caption_key=caption_key)["a"]
    assert (row["problem"], row["caption_characters"]) == ("", len("A bell."))


def test_a_key_is_on_the_same_side_in_every_shard_and_source(tmp_path: Path) -> None:
    numbers = {"one": range(20), "two": range(10, 30), "other": range(40)}
    one, two, other = (
        shard(tmp_path / f"{name}.tar", [(f"key{n}.{ending}", b"?") for n in part for ending in ("wav", "json")]) for name, part in numbers.items()
    )
    sources = [source(one, two, validation=0.5), source(other, name="other", validation=0.5)]
    training, held_out = (merged(tmp_path, *sources, full=False, held_out=side) for side in (False, True))
    assert not keys(training) & keys(held_out) and keys(training) | keys(held_out) == {f"key{n}" for n in range(40)}
    assert len(training) + len(held_out) == 20 + 20 + 40, "every sample is on one side"
    assert keys(merged(tmp_path, source(two, validation=0.5), full=False)) == keys(training) & {f"key{n}" for n in numbers["two"]}


def test_the_share_held_out_is_that_asked_for_and_grows_with_it() -> None:
    sides = [{key for key in map(str, range(5000)) if is_held_out(key, source("x", validation=share))} for share in (0.0, 0.01, 0.2)]
    assert not sides[0] and sides[1] < sides[2]
    assert [len(side) for side in sides[1:]] == [pytest.approx(50, rel=0.4), pytest.approx(1000, rel=0.1)]


@pytest.mark.parametrize("group", [r"^(rec\d+)_", r"rec\d+"])
def test_segments_of_one_recording_stay_together(group: str) -> None:
    whole = source("x", validation={"fraction": 0.3, "group": group})
    sides = {recording: {is_held_out(f"rec{recording}_{segment}", whole) for segment in range(10)} for recording in range(50)}
    assert all(len(side) == 1 for side in sides.values()) and len(set.union(*sides.values())) == 2


@pytest.mark.parametrize(("shards", "dev"), [("{}/*.tar", "{}/dev.tar"), ("*.tar", "dev.tar"), ("./*.tar", "{}/dev.tar"), ("{}/*.tar", "./d*.tar")])
def test_validation_shards_are_for_validation_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str, dev: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train-0", "train-1", "dev"):
        shard(tmp_path / f"{name}.tar", clip(name))
    whole = source(shards.format(tmp_path), validation={"shards": [dev.format(tmp_path)]})
    assert [one.location.name for one in expand(whole)] == ["train-0.tar", "train-1.tar", "dev.tar"]
    assert keys(merged(tmp_path, whole)) == {"train-0", "train-1"} and keys(merged(tmp_path, whole, held_out=True)) == {"dev"}


def test_braces_and_globs_name_shards_once_and_sorted(tmp_path: Path) -> None:
    paths = [shard(tmp_path / f"a-{number:02d}.tar", clip("a")) for number in range(12)]
    for patterns in (["a-{00..11}.tar"], ["a-*.tar"], ["a-1?.tar", "a-0[0-9].tar", "a-{03,07}.tar"]):
        assert [one.location.url for one in expand(source(*(tmp_path / pattern for pattern in patterns)))] == [str(path) for path in paths]


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


def rows_of(seed: int, samples: int) -> list[dict[str, object]]:
    """Rows of a sidecar, some with a problem, some long, some of unknown length."""
    random = np.random.default_rng(seed)
    return [
        {
            "key": f"rec{random.integers(9)}_ü{seed}.{n}", "ending": "wav", "audio_offset": 512 * n, "audio_size": int(random.integers(1, 1 << 40)),
            "text_offset": 7, "text_size": int(random.integers(99)), "crc32": int(random.integers(-1, 1 << 32)),
            "seconds": float(np.float32(random.choice([np.nan, 1.5, 30.0, 99.0]))), "caption_characters": n, "problem": str(random.choice(["", "", "bad"])),
        }
        for n in range(samples)
    ]  # fmt: skip


sides = st.sampled_from([{}, {"fraction": 0.4}, {"fraction": 0.4, "group": r"^(rec\d+)_"}, {"fraction": 0.4, "group": r"5|7"}])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(sides, st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=3)), max_size=3), st.sampled_from([30.0, math.inf]))
def test_merging_takes_the_usable_rows_in_turn(tmp_path_factory: pytest.TempPathFactory, given: list, longest: float) -> None:
    folder = tmp_path_factory.mktemp("merged")
    sources = [source("x", name=f"s{n}", validation=side) for n, (side, _) in enumerate([({}, []), *given])]
    shards, tables, expected = [], [], {True: [], False: []}
    for number, (one, parts) in enumerate(zip(sources, [[(40, False)], *(parts for _, parts in given)], strict=True)):
        for samples, for_validation in [(40, False), *parts]:
            shards.append(Shard(one, Location(f"/{number}/{len(shards)}.tar"), for_validation))
            tables.append(rows_of(len(shards), samples))
            for row in tables[-1]:
                hashed = row["key"]
                if one.validation.group and (found := re.search(one.validation.group, row["key"])):
                    hashed = found[1] if found.re.groups else found[0]
                share = int.from_bytes(hashlib.sha256(hashed.encode()).digest()[:8], "big") / 2**64
                if row["problem"] == "" and not row["seconds"] > longest:
                    kept = {name: value for name, value in row.items() if name not in ("problem", "caption_characters")}
                    expected[for_validation or share < one.validation.fraction].append({**kept, "source": number, "shard": len(shards) - 1})
    merge(shards, [Sidecar(pa.Table.from_pylist(table, SCHEMA), True, "", Stat(1, "tag"), "") for table in tables], folder, longest=longest)
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
    assert merged(tmp_path / "full", source(tmp_path / "here/*.tar"), full=False).digest == first, "a run that began on a quick index goes on"
    (tmp_path / "renamed/a.tar").rename(tmp_path / "renamed/c.tar")
    assert digest("renamed") != first, "a shard's name is part of what the samples are called"
