"""Clips are found however their names are spelled, and all captions of a clip are kept."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tar import walk
from tests.test_interop import jsons, packed, table, write  # noqa: F401

Packed = Callable[..., str]


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("there", "named", "key"),
    [
        ("train/a.wav", "train\\a.wav", "train_a"),
        ("train\\a.wav", "train/a.wav", "train_a"),
        ("a.wav", " a.wav\xa0", "a"),
        ("a.wav", "\u202aa.wav\ufeff", "a"),
        (" a.wav", " a.wav", " a"),
        ("a.wav", "./a.wav", "a"),
        ("a.wav", ".\\a.wav", "a"),
        (decomposed("Flöte.wav"), composed("Flöte.wav"), decomposed("Flöte")),
        (composed("Flöte.wav"), decomposed("Flöte.wav"), composed("Flöte")),
        (
            f"{decomposed('Töne')}/{composed('Flöte')}.wav",
            f" {composed('Töne')}\\{decomposed('Flöte')}.wav",
            f"{decomposed('Töne')}_{composed('Flöte')}",
        ),
        ("Köln 1.wav", "file://{folder}/K%C3%B6ln%201.wav", "{key}_Köln 1"),
        ("a.wav", "{folder}/a.wav", "{key}_a"),
    ],
)
def test_a_file_is_found_in_another_spelling(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
    there: str,
    named: str,
    key: str,
) -> None:
    write(tmp_path / there)
    clips = table(tmp_path / "clips.csv", {"file": named.format(folder=tmp_path), "caption": "A bell."})
    assert "1 samples in 1 shard, 0 rows rejected" in packed(clips, tmp_path / "out")
    key = key.format(key=str(tmp_path).replace("/", "_").replace(".", "_"))
    assert jsons(tmp_path / "out/shard-000000.tar") == {key: {"caption": "A bell."}}


def test_a_file_that_is_there_as_written_is_taken_before_all_others(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
) -> None:
    names = [" a.wav", "a.wav", "b\\c.wav", "b/c.wav", composed("é.wav"), decomposed("é.wav")]
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    rows = [{"file": name, "caption": f"Number {number}"} for number, name in enumerate(names)]
    said = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    assert "line 5: b/c.wav: its key 'b_c' is that of b\\c.wav" in said
    assert jsons(tmp_path / "out/shard-000000.tar") == {
        " a": {"caption": "Number 0"},
        "a": {"caption": "Number 1"},
        "b_c": {"caption": "Number 2"},
        composed("é"): {"caption": "Number 4"},
        decomposed("é"): {"caption": "Number 5"},
    }


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("wavs/A.WAV", "No such file or directory; wavs/a.wav is there"),
        ("WAVS/a.wav", "No such file or directory; wavs/a.wav is there"),
        ("wavs/a.flac", "No such file or directory; wavs/a.wav is there"),
        ("wavs/a", "it has no ending of an audio format that"),
        ("wavs/a", "; wavs/a.wav is there"),
        ("a.wav", "No such file or directory; wavs/a.wav is there"),
        ("C:\\Users\\me\\b.wav", "No such file or directory; b.wav is there"),
        ("/elsewhere/b.wav", "No such file or directory; b.wav is there"),
        ("wavs/Großer Hund.wav", "No such file or directory; wavs/grosser  hund.wav is there"),
        ("https://example.org/b.wav", "No such file or directory; clips are read from the disk: download it"),
        ("grosser%20%20hund.wav", "No such file or directory; wavs/grosser  hund.wav is there"),
        ("wavs/grosser&#32; hund.wav", "No such file or directory; wavs/grosser  hund.wav is there"),
        ("'b.wav'", "; b.wav is there"),
        ("c.wav", "cannot be read: No such file or directory\n"),
    ],
)
def test_a_file_that_is_not_there_is_told_with_what_is(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
    named: str,
    said: str,
) -> None:
    for name in ("wavs/a.wav", "wavs/grosser  hund.wav", "b.wav", "good.wav"):
        write(tmp_path / name)
    rows = [{"file": named, "caption": "A bell."}, {"file": "good.wav", "caption": "A bell."}]
    message = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    assert f"line 2: {named}: " in message and said in message


def test_rows_of_one_clip_are_its_captions(packed: Packed, tmp_path: Path) -> None:  # noqa: F811
    for number, name in enumerate(("a.wav", "b.wav", "c.wav", "d/e.wav")):
        write(tmp_path / name, number)
    (tmp_path / "link.wav").symlink_to("c.wav")
    rows = [
        ("a.wav", "A bell.", "Ann", "CC0"),
        ("b.wav", "A dog.", "Ann", "CC0"),
        (" a.wav", "A loud bell.", "Bob", "CC0"),
        ("a.wav", "A bell.", "Ann", "CC0"),
        (f"{tmp_path}/a.wav", "Ding.", "Ann", "CC0"),
        (f"../{tmp_path.name}/a.wav", "Dong.", "Ann", "CC0"),
        ("b.wav", "A dog.", "Ann", "CC0"),
        ("d\\e.wav", "A cat.", "Ann", "CC0"),
        ("d/e.wav", "", "Bob", "CC0"),
        ("d/e.wav", "A cat.", "Bob", "CC0"),
        ("c.wav", "A hen.", "Ann", "CC0"),
        ("link.wav", "A cock.", "Ann", "CC0"),
        ("gone.wav", "A car.", "Ann", "CC0"),
        ("gone.wav", "A bus.", "Ann", "CC0"),
    ]
    columns = ("file", "caption", "by", "licence")
    clips = table(
        tmp_path / "clips.csv",
        *(dict(zip(columns, row, strict=True)) for row in rows),
        columns=("by", "licence"),
    )
    said = packed(clips, tmp_path / "out", "--caption-key", "Flash 2.5 Annotation")
    assert jsons(tmp_path / "out/shard-000000.tar") == {
        "a": {
            "by": ["Ann", "Bob", "Ann", "Ann"],
            "licence": "CC0",
            "Flash 2.5 Annotation": ["A bell.", "A loud bell.", "Ding.", "Dong."],
        },
        "b": {"by": "Ann", "licence": "CC0", "Flash 2.5 Annotation": "A dog."},
        "d_e": {"by": ["Ann", "Bob"], "licence": "CC0", "Flash 2.5 Annotation": "A cat."},
        "c": {"by": "Ann", "licence": "CC0", "Flash 2.5 Annotation": "A hen."},
        "link": {"by": "Ann", "licence": "CC0", "Flash 2.5 Annotation": "A cock."},
    }
    assert "line 10: d/e.wav: the caption is empty" in said
    assert "line 14: gone.wav: cannot be read" in said and "line 15: gone.wav: cannot be read" in said
    assert "5 samples in 1 shard, 3 rows rejected" in said
    assert "1 clip has several captions (up to 4): training takes the first of them, unless" in said
    assert "`captions: all` or `captions: random`" in said


def test_nothing_is_packed_of_a_table_in_which_many_rows_are_odd(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.wav")
    clips = tmp_path / "clips.csv"
    clips.write_text("file,caption\na.wav,A tone\nb.wav,A dog, loud\nc.wav,A bell, far\n", encoding="utf-8")
    said = packed(clips, tmp_path / "out", code=3)
    assert "2 of 3 rows cannot be right, so nothing is packed:" in said
    assert "line 3: b.wav: it has 3 fields, the header has 2: is a ',' in a field without" in said
    assert "Captions with a ',', quotation marks or a line break need quotation marks around them" in said
    assert not (tmp_path / "out").exists()


def test_a_row_that_cannot_be_right_is_in_the_table_of_rejected_ones(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name)
    clips = tmp_path / "clips.csv"
    clips.write_text("file,caption\na.wav,A dog, barking\nb.wav,A tone\nc.wav,A car\n", encoding="utf-8")
    packed(clips, tmp_path / "out")
    rejected = (tmp_path / "out/rejected.csv").read_text(encoding="utf-8").splitlines()
    assert rejected[0] == "line,file,reason" and len(rejected) == 3
    assert rejected[1].startswith('2,a.wav,"it has 3 fields') and rejected[2].startswith("4,c.wav,cannot be")
    assert jsons(tmp_path / "out/shard-000000.tar") == {"b": {"caption": "A tone"}}


@pytest.mark.parametrize(("option", "delimiter"), [(";", ";"), ("tab", "\t"), ("|", "|")])
def test_another_delimiter_is_named(packed: Packed, tmp_path: Path, option: str, delimiter: str) -> None:  # noqa: F811
    write(tmp_path / "a.wav")
    clips = tmp_path / "clips.csv"
    clips.write_text(f"file{delimiter}caption\na.wav{delimiter}A dog, barking\n", encoding="utf-16")
    assert f"add --delimiter {option}" in packed(clips, tmp_path / "out", code=3).replace("'", "")
    packed(clips, tmp_path / "out", "--delimiter", option)
    assert jsons(tmp_path / "out/shard-000000.tar") == {"a": {"caption": "A dog, barking"}}
    assert "is one character" in packed(clips, tmp_path / "no", "--delimiter", "::", code=2)


def test_a_column_is_not_lost_to_the_caption(packed: Packed, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "a.wav")
    clips = table(tmp_path / "clips.csv", {"file": "a.wav", "caption": "A.", "text": "B."}, columns=("text",))
    said = packed(clips, tmp_path / "out", "--caption-key", "text", code=2)
    assert "--caption-key text" in said and "has a column of that name; choose another" in said


def test_a_value_that_no_row_has_is_told_with_those_that_are_there(
    packed: Packed,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [{"file": "a.wav", "caption": "A.", "split": split} for split in ("train", " test")]
    clips = table(tmp_path / "clips.csv", *rows, columns=("split",))
    said = packed(clips, tmp_path / "out", "--where", "split=trian", code=3)
    assert "no row could be packed: none has split=trian; there is split=test, train" in said


def test_a_caption_that_is_none_is_not_packed(packed: Packed, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "a.wav")
    captions = ["nan", "-", "\u200b", "['A bell.', 'A gong.']", "\ufeffA bell.\u200b"]
    rows = [{"file": "a.wav", "caption": caption} for caption in captions]
    message = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    assert "1 samples in 1 shard, 4 rows rejected" in message
    for said in ("'nan', which programs write", "'-', without a letter", "is empty", "a list or an object"):
        assert said in message
    assert jsons(tmp_path / "out/shard-000000.tar") == {"a": {"caption": "A bell."}}


def test_what_macos_keeps_beside_a_file_is_told(packed: Packed, tmp_path: Path) -> None:  # noqa: F811
    write(tmp_path / "a.wav")
    double = bytes.fromhex("00051607") + bytes(4) + b"Mac OS X        " + bytes(60)
    (tmp_path / "._a.wav").write_bytes(double)
    rows = [{"file": file, "caption": "A."} for file in ("a.wav", "._a.wav")]
    said = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    assert "line 3: ._a.wav: it is what macOS keeps beside a file (AppleDouble), not the file itself" in said
    assert "not the file itself, which is a.wav\n" in said
    assert jsons(tmp_path / "out/shard-000000.tar") == {"a": {"caption": "A."}}


def test_names_of_250_bytes_are_written_whole(packed: Packed, tmp_path: Path) -> None:  # noqa: F811
    names = ["n" * 246, "漢" * 82]
    for name in names:
        write(tmp_path / f"{name}.wav")
    rows = [{"file": f"{name}.wav", "caption": name[0]} for name in names]
    packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    shard = (tmp_path / "out/shard-000000.tar").read_bytes()
    members = [member.name for member in walk(lambda start, end: shard[start:end], len(shard))]
    assert members == [f"{name}.{ending}" for name in names for ending in ("json", "wav")]
    assert jsons(tmp_path / "out/shard-000000.tar") == {name: {"caption": name[0]} for name in names}
