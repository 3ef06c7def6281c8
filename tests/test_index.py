"""What an index says of a shard: where each sample lies, and what is wrong with it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from data.index import index_shard, load_sidecar, sidecar_location
from data.sources import expand
from tests.making import run_program, sound_of
from tests.shards import Members, clip, keys, merged, rows, shard, sound, source, words
from tools.index import index as index_command

PEOPLES = {
    "plain": ("plain.wav", "plain.json"),
    "dotted": ("./dotted.wav", "./dotted.json"),
    "upper": ("upper.WAV", "upper.JSON"),
    "set.v2/night/owl": ("set.v2/night/owl.take2.Wav", "./set.v2/night/owl.json"),
    "ünï 漢": ("ünï 漢.wav", "ünï 漢.json"),
    "x" * 150: ("x" * 150 + ".wav", "x" * 150 + ".json"),
}
MEMBERS = [
    (name, sound(number) if name.lower().endswith("wav") else words(name))
    for number, pair in enumerate(PEOPLES.values())
    for name in pair
]
STRAY = [("README.txt", b"of the set"), ("noending", b"?"), ("._plain.json", b"left by macOS")]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(order=st.permutations(MEMBERS + STRAY))
def test_samples_are_found_whatever_the_order_and_spelling_of_members(
    tmp_path_factory: pytest.TempPathFactory, order: Members
) -> None:
    path = shard(tmp_path_factory.mktemp("any") / "a.tar", order)
    content = path.read_bytes()
    for found in (rows(path, full=False), rows(path, full=True)):
        assert set(PEOPLES) == {key for key, row in found.items() if not row["problem"]}
        for key, members in PEOPLES.items():
            for part, member in zip(("audio", "text"), members, strict=True):
                assert (
                    content[found[key][f"{part}_offset"] :][: found[key][f"{part}_size"]]
                    == dict(MEMBERS)[member]
                )


def test_names_that_are_not_utf_8_do_not_stop_the_index(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", clip("caf\udce9") + clip("tea"))  # é in Latin-1
    assert [row["problem"] for key, row in rows(path).items() if key == "tea"] == [""]


def test_several_audio_members_need_a_choice(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [("a.16k.flac", sound(0, "flac")), ("a.44k.FLAC", sound(1, "flac")), ("a.json", words())],
    )
    with pytest.raises(
        DataError,
        match=(
            r"'a' has several audio members \(\.16k\.flac,"
            r" \.44k\.flac\).*data\.sources\.sounds\.audio=16k\.flac"
        ),
    ):
        rows(path)
    for choice, number in (("16k.flac", 0), (".44K.flac", 1)):
        assert rows(path, audio=choice)["a"]["crc32"] == zlib.crc32(
            words(), zlib.crc32(sound(number, "flac"))
        )


@pytest.mark.parametrize("full", [True, False])
def test_incomplete_samples_are_rows_with_a_problem(tmp_path: Path, full: bool) -> None:
    twice = [("twice.wav", sound(1)), *clip("twice", 2)]
    path = shard(
        tmp_path / "a.tar",
        [("mute.json", words()), ("mute.png", b"?"), ("wordless.wav", sound()), *twice, *clip("sound")],
    )
    found = {key: row["problem"] for key, row in rows(path, full=full).items()}
    assert found == {
        "mute": "no audio member (there are .json, .png)",
        "wordless": "no .json member",
        "twice": "the key occurs twice in this shard",
        "sound": "",
    }
    assert keys(merged(tmp_path, source(path), full=full)) == {"sound"}


def test_a_full_index_measures_the_sound_samples(tmp_path: Path) -> None:
    row = rows(shard(tmp_path / "a.tar", [("a.flac", sound(3, "flac")), ("a.json", words(" Drei Töne. "))]))[
        "a"
    ]
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
    "number": (sound(), b'{"caption": 3}', "is a number, not text"),
    "blank": (sound(), words(" \n"), "the caption is empty"),
    "no bytes": (b"", words(), "the audio is empty (0 bytes)"),
    "header only": (sound()[:44], words(), "the audio is cut off: 44 of 16,044 bytes are there"),
    "no samples": (
        sound()[:4] + (36).to_bytes(4, "little") + sound()[8:40] + bytes(4),
        words(),
        "the audio has no samples (0 s)",
    ),
    "half a FLAC": (sound(3, "flac")[:400], words(), "the audio cannot be decoded"),
    "page": (b"<html>404</html>", words(), "the audio is a web page"),
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
    assert (
        f"{path}: DAMAGED: 'c.wav'" in said.stdout
        and "2 samples before that are kept" in said.stdout
        and "1 shards damaged" in said.stdout
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"a\.tar: is empty, or a folder"),
        (b"<html>403 Forbidden</html>" * 100, r"a\.tar: not a tar archive"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=said):
        rows(tmp_path / "a.tar")


def test_a_shard_that_cannot_be_read_does_not_keep_the_others_from_their_index(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    path = shard(tmp_path / "b.tar", clip("b"))
    said = run_program("tools.index", tmp_path / "a.tar", path, "--index-dir", tmp_path / "index")
    assert (
        said.returncode == 3
        and "a.tar: not a tar archive" in said.stderr
        and "2 shards, 1 samples" in said.stdout
    )
    assert [file.name[:2] for file in (tmp_path / "index").glob("*.parquet")] == ["b-"]


def test_an_index_without_a_sample_is_an_error_with_its_reason_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", clip("a") + clip("b") + clip("c"))
    said = run_program("tools.index", path, "--caption-key", "words", "--index-dir", tmp_path / "index")
    assert (
        said.returncode == 3
        and "no sample can be used" in said.stderr
        and said.stdout.count("no caption under 'words'") == 1
    )
    assert "; and 2 others" in said.stdout


def test_an_index_is_used_again_until_its_shard_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path / "a.tar", clip("a"))
    (one,) = expand(source(path))

    def made(**options: bool) -> tuple[int, str]:
        index_command([str(path)], caption_key=None, index_dir=str(tmp_path / "index"), threads=2, **options)
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


def test_the_jobs_of_a_slurm_array_share_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        shard(tmp_path / f"{number}.tar", clip("a"))
    for number, count in ((1, 3), (3, 2)):  # as of --array=1-3:2
        for name, value in (("MIN", 1), ("MAX", 3), ("STEP", 2), ("ID", number)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        index_command(
            [f"{tmp_path}/*.tar"],
            caption_key=None,
            index_dir=str(tmp_path / "index"),
            threads=1,
            quick=True,
        )
        assert f"{count} shards, {count} samples" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")  # as of --array=1,2,3 with a step that is none
    with pytest.raises(ConfigError, match="evenly spaced"):
        index_command(
            [f"{tmp_path}/*.tar"],
            caption_key=None,
            index_dir=str(tmp_path / "index"),
            threads=1,
            quick=True,
        )
    assert len(list((tmp_path / "index").iterdir())) == 5


def test_a_damaged_index_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = expand(source(shard(tmp_path / "a.tar", clip("a"))))
    index_shard(one, tmp_path / "index", full=True)
    for content in (b"", b"PAR1 and so on"):
        Path(sidecar_location(one, tmp_path / "index").url).write_bytes(content)
        assert load_sidecar(one, tmp_path / "index") is None
        assert "this index is damaged; it is made anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("caption_key", "member"),
    [
        ("meta.en.text", ("a.json", b'{"meta": {"en": {"text": "A bell."}}}')),
        (".txt", ("a.TXT", b"A bell.\n")),
    ],
)
def test_captions_at_a_dotted_path_or_in_text_members(
    tmp_path: Path, caption_key: str, member: tuple[str, bytes]
) -> None:
    row = rows(shard(tmp_path / "a.tar", [("a.wav", sound()), member]), caption_key=caption_key)["a"]
    assert (row["problem"], row["caption_characters"]) == ("", len("A bell."))
