"""Members of an archive become samples whatever their spelling, and every member is accounted for."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.index import Sidecar, index_shard
from data.sources import expand
from tests.making import run_program
from tests.shards import Members, clip, rows, shard, sound, source, words

NFC, NFD = (unicodedata.normalize(form, "Übung für Flöte") for form in ("NFC", "NFD"))
DOTTED = {
    "a dot in a title": (["Song 2.0 (live).wav", "Song 2.0 (live).json"], {"Song 2.0 (live)"}),
    "two takes": (
        ["take 1.1.wav", "take 1.1.json", "take 1.2.wav", "take 1.2.json"],
        {"take 1.1", "take 1.2"},
    ),
    "a version beside the first one": (["a.wav", "a.json", "a.v2.wav", "a.v2.json"], {"a", "a.v2"}),
    "a date": (["night.2024.05.01.wav", "night.2024.05.01.json"], {"night.2024.05.01"}),
    "a rate before the ending": (["Vol. 3.16k.wav", "Vol. 3.json"], {"Vol. 3"}),
    "WebDataset's way": (["a.16k.wav", "a.json", "a.more.json"], {"a"}),
    "in folders": (["v1.0/a.b.wav", "v1.0/a.b.json"], {"v1.0/a.b"}),
}


@pytest.mark.parametrize("case", DOTTED)
def test_names_may_hold_dots(tmp_path: Path, case: str) -> None:
    names, wanted = DOTTED[case]
    path = shard(
        tmp_path / "a.tar", [(name, words(name) if name.endswith("json") else sound()) for name in names]
    )
    found = rows(path)
    assert {key for key, row in found.items() if not row["problem"]} == wanted
    content = path.read_bytes()
    for key in wanted:
        text = content[found[key]["text_offset"] :][: found[key]["text_size"]]
        assert json.loads(text)["caption"] == f"{key}.json", "a caption of another clip"


@pytest.mark.parametrize("names", [("a", "b"), ("Song 2.0", "Song 2.1 (live)")])
@pytest.mark.parametrize("key", ["caption", ".txt"])
def test_a_caption_may_be_called_after_the_whole_name_of_its_audio(
    tmp_path: Path, names: tuple[str, str], key: str
) -> None:
    ending, content = ("txt", b"A bell.") if key == ".txt" else ("json", words())
    members = [
        part for name in names for part in [(f"{name}.wav", sound()), (f"{name}.wav.{ending}", content)]
    ]
    found = rows(shard(tmp_path / "a.tar", members), caption_key=key)
    assert {name: row["problem"] for name, row in found.items()} == dict.fromkeys(names, "")


def test_a_name_that_would_break_a_line_is_shown_in_one(tmp_path: Path) -> None:
    found = rows(shard(tmp_path / "a.tar", [("a\nb\t.wav", sound()), ("a\nb\t.json", words())]))
    assert {key: row["problem"] for key, row in found.items()} == {"a\\nb\\t": ""}


def test_thousands_of_names_that_begin_alike_are_found_at_once(tmp_path: Path) -> None:
    names = [f"fma.{number:06d}" for number in range(3000)]
    members = [(f"{name}.{ending}", b"x") for name in names for ending in ("wav", "json")]
    assert set(rows(shard(tmp_path / "a.tar", members), full=False)) == set(names)


@pytest.mark.parametrize(("audio", "text"), [(NFD, NFC), (NFC, NFD)])
def test_names_in_two_unicode_forms_are_one_sample(tmp_path: Path, audio: str, text: str) -> None:
    path = shard(tmp_path / "a.tar", [(f"{audio}.wav", sound()), (f"{text}.json", words()), *clip("b")])
    assert {unicodedata.normalize("NFC", key): row["problem"] for key, row in rows(path).items()} == {
        NFC: "",
        "b": "",
    }


def test_names_that_are_as_they_were_keep_their_keys(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [*clip(NFD), *clip("x.16k"), *clip("b")])
    assert {NFD, "b"} <= set(rows(path))


def linked(folder: Path, make: str) -> Path:
    """An archive that GNU tar makes of a folder after a few commands of the shell."""
    folder.mkdir()
    for key in "ab":
        (folder / f"{key}.wav").write_bytes(sound(ord(key)))
        (folder / f"{key}.json").write_bytes(words(f"Clip {key}."))
    subprocess.run(["sh", "-ec", make], cwd=folder, check=True)
    names = sorted(path.name for path in folder.iterdir())
    subprocess.run(["tar", "-cf", folder.parent / "a.tar", *names], cwd=folder, check=True)
    return folder.parent / "a.tar"


LINKS = {
    "hard": "ln a.wav c.wav; cp b.json c.json",
    "symbolic": "ln -s a.wav c.wav; cp b.json c.json",
    "both members": "ln -s a.wav c.wav; ln b.json c.json",
    "to what comes later": "mv a.wav z.flac; ln -s z.flac c.wav; cp b.json c.json; cp b.wav a.wav",
    "one after the other": "ln -s d.wav c.wav; ln -s e.wav d.wav; ln -s a.wav e.wav; cp b.json c.json",
    "from a folder": "mkdir sub; mv a.wav sub/x.wav; ln -s sub/x.wav c.wav; cp b.json c.json; cp b.wav a.wav",
    "through a folder that is one": "mkdir sub; mv a.wav sub/x.wav; ln -s sub now; ln -s now/x.wav c.wav;"
    " cp b.json c.json; cp b.wav a.wav",
    "from the root": "mkdir sub; mv a.wav sub/x.wav; ln -s /sub/x.wav c.wav; cp b.json c.json;"
    " cp b.wav a.wav",
    "up and down": "mkdir sub; cd sub; ln -s ../a.wav c.wav; cp ../b.json c.json",
}


@pytest.mark.parametrize("case", LINKS)
def test_links_have_the_content_of_what_they_point_to(tmp_path: Path, case: str) -> None:
    path = linked(tmp_path / "files", LINKS[case])
    found = {key.removeprefix("sub/"): row for key, row in rows(path).items() if not row["problem"]}
    content = path.read_bytes()

    def member(key: str, part: str) -> bytes:
        return content[found[key][f"{part}_offset"] :][: found[key][f"{part}_size"]]

    assert (member("c", "audio"), member("c", "text")) == (sound(ord("a")), words("Clip b."))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("ln -s /data/x.wav c.wav", "its .wav is a link to '/data/x.wav', which is no file of this archive"),
        ("ln -s ../x.wav c.wav", "a link to '../x.wav', which is no file of this archive"),
        ("ln -s d.wav c.wav; ln -s c.wav d.wav", "a link to 'd.wav', which leads to itself"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, make: str, said: str) -> None:
    found = rows(linked(tmp_path / "files", f"{make}; cp b.json c.json"))
    assert said in found["c"]["problem"]
    assert [found[key]["problem"] for key in "ab"] == ["", ""]


@pytest.mark.parametrize(
    ("audio", "text", "where"),
    [("audio/a.wav", "text/a.json", "in another folder"), ("A.WAV", "a.json", "in other capitals")],
)
def test_members_that_may_belong_together_are_told(tmp_path: Path, audio: str, text: str, where: str) -> None:
    found = rows(shard(tmp_path / "a.tar", [(audio, sound()), (text, words()), *clip("b")]))
    assert found.pop("b")["problem"] == ""
    assert all(f"one of that name is there {where}" in row["problem"] for row in found.values())


STEMS = st.sampled_from(["a", "b", "b.1", "b.2", NFC, NFD, "A", "sub/a", "._a", ".x", "__MACOSX/a", "n"])
ENDINGS = st.sampled_from([".wav", ".json", ".png", ".v2.wav", ".v2.json", ".txt", ""])
KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
)
ENTRIES = st.lists(st.tuples(STEMS, ENDINGS, KINDS, STEMS, ENDINGS), max_size=14)


def archive(path: Path, entries: list[tuple[str, str, bytes, str, str]]) -> Path:
    with tarfile.open(path, "w", encoding="utf-8") as tar:
        for stem, ending, kind, other, other_ending in entries:
            info = tarfile.TarInfo(stem + ending)
            info.type, content = kind, words(stem) if ending.endswith("json") else sound()
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = other + other_ending
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return path


def counted(sidecar: Sidecar) -> tuple[int, int, int]:
    """Members of samples, of those with a problem, and ignored ones."""
    table = sidecar.table.to_pylist()
    return (
        sum(row["members"] for row in table if not row["problem"]),
        sum(row["members"] for row in table if row["problem"]),
        sum(sidecar.ignored.values()),
    )


@settings(max_examples=150, derandomize=True, deadline=None)
@given(entries=ENTRIES)
def test_every_member_of_an_archive_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str, bytes, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = archive(folder / "a.tar", entries)
    with tarfile.open(path) as tar:
        members = len(tar.getmembers())
    (one,) = expand(source(path, audio="wav"))
    for full in (False, True):
        assert sum(counted(index_shard(one, folder, full=full))) == members


def test_inspect_accounts_for_every_member(tmp_path: Path) -> None:
    stray: Members = [("README", b"?"), ("._a.wav", b"?"), ("a.png", b"?"), ("LICENSE.txt", b"?")]
    bad: Members = [("mute.json", words()), ("page.wav", b"<html>"), ("page.json", words())]
    said = run_program(
        "tools.inspect", shard(tmp_path / "a.tar", [*clip("a"), *clip("b"), *stray, *bad])
    ).stdout
    assert "members   11: 4 of samples, 3 of those with a problem, 4 ignored" in said, said
    kinds = re.search(r"ignored \((.*)\)", said)
    assert kinds and set(kinds[1].split(", ")) == {
        "names without an ending x 1",
        "left by macOS x 1",
        ".png beside samples x 1",
        "neither audio nor caption (.txt) x 1",
    }
