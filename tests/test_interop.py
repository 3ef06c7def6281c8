"""Shards go both ways: webdataset writes and Earwitness reads, `tools.pack` writes and webdataset reads."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import typer
from webdataset import ShardWriter, TarWriter, WebDataset

from configs.errors import run_command
from configs.schema import Source
from data import storage
from data.captions import find_captions
from data.decode import decode
from data.index import index_shard
from data.sources import expand
from tests.making import ROOT, caption_of, sound_of
from tools.pack import pack


class Read(NamedTuple):
    """A sample as training reads it."""

    caption: str
    audio: np.ndarray


def read_all(pattern: str, folder: Path, **options: object) -> dict[str, Read]:
    """Every sample of the shards, by key."""
    samples: dict[str, Read] = {}
    for shard in expand(Source(name="sounds", shards=[pattern], **options)):
        for row in index_shard(shard, folder / "index", full=True).table.to_pylist():
            assert row["problem"] == "" and row["key"] not in samples
            start, text_start = row["audio_offset"], row["text_offset"]
            audio = storage.read(shard.location, start, start + row["audio_size"])
            text = storage.read(shard.location, text_start, text_start + row["text_size"])
            caption = find_captions(text, shard.source.caption_keys)[0]
            samples[row["key"]] = Read(caption, decode(audio, row["ending"]))
    return samples


def table(path: Path, *rows: dict[str, str], columns: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file", "caption", *columns])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(path: Path, number: int = 0, seconds: float = 0) -> Path:
    """Clip `number`, or as much noise as asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).uniform(-0.5, 0.5, int(16_000 * seconds))
    soundfile.write(path, noise if seconds else sound_of(number), 16_000)
    return path


def jsons(*shards: Path) -> dict[str, dict]:
    return {sample["__key__"]: json.loads(sample["json"]) for sample in webdataset(*shards)}


def webdataset(*shards: Path) -> list[dict]:
    return list(WebDataset([str(shard) for shard in sorted(shards)], shardshuffle=False, empty_check=False))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line of `tools.pack` in this process; gives what it says. It must end with `code`."""

    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tools.pack", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: typer.run(pack))
        said = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, said
        return said

    return run


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_reads_what_webdataset_writes(tmp_path: Path, ending: str) -> None:
    contents = [write(tmp_path / f"{number}.{ending}", number).read_bytes() for number in range(10)]
    with ShardWriter(f"{tmp_path}/set-%04d.tar", maxcount=4, verbose=0) as writer:
        for number, content in enumerate(contents):
            writer.write(
                {
                    "__key__": f"part{number % 2}/clip-{number:03d}",
                    ending: content,
                    "json": {"caption": caption_of(number)},
                }
            )
    samples = read_all(f"{tmp_path}/set-{{0000..0002}}.tar", tmp_path)
    assert list(samples) == [f"part{number % 2}/clip-{number:03d}" for number in range(10)]
    for number, sample in enumerate(samples.values()):
        assert sample.caption == caption_of(number)
        assert np.array_equal(sample.audio, decode(contents[number], ending))
        assert abs(len(sample.audio) - len(sound_of(number))) <= 1


def test_reads_text_members_and_several_audio_members_of_webdataset(tmp_path: Path) -> None:
    contents = [write(tmp_path / f"{number}.flac", number).read_bytes() for number in range(2)]
    with TarWriter(str(tmp_path / "set.tar")) as writer:
        writer.write(
            {"__key__": "a", "near.flac": contents[0], "far.flac": contents[1], "txt": "A bell.", "cls": 3}
        )
    sample = read_all(f"{tmp_path}/set.tar", tmp_path, caption_key=".txt", audio="far.flac")["a"]
    assert sample.caption == "A bell." and np.array_equal(sample.audio, decode(contents[1], "flac"))


def test_webdataset_reads_what_pack_writes(clips: Path, shards: str, tmp_path: Path) -> None:
    samples = webdataset(*Path(shards).parent.glob("*.tar"))
    with clips.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(samples) == len(rows) == 60
    for row, sample in zip(rows, samples, strict=True):
        stem, ending = row["file"].split(".")
        assert sample["__key__"] == stem and sample[ending] == (clips.parent / row["file"]).read_bytes()
        assert json.loads(sample["json"]) == {"caption": row["caption"], "licence": "CC0"}
    captions = {key: sample.caption for key, sample in read_all(shards, tmp_path).items()}
    assert captions == {Path(row["file"]).stem: row["caption"] for row in rows}


def test_pack_names_every_row_it_rejects(packed: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "good.wav")
    write(tmp_path / "good.flac")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "page.mp3").write_bytes(b"<html>404</html>")
    (tmp_path / "notes.doc").write_bytes(b"?")
    write(tmp_path / "mute.wav")
    reasons = {
        "missing.wav": "No such file or directory",
        "mute.wav": "the caption is empty",
        "good.flac": "its key 'good' is that of good.wav",
        "page.mp3": "the audio is a web page",
        "empty.wav": "the audio is empty (0 bytes)",
        "notes.doc": "'doc' is not an audio format",
        "": "no file is named",
    }
    rows = [
        {"file": "good.wav", "caption": "A bell."},
        *({"file": file, "caption": "" if file == "mute.wav" else "A bell."} for file in reasons),
    ]
    said = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out")
    with (tmp_path / "out/rejected.csv").open(newline="", encoding="utf-8") as file:
        rejected = list(csv.DictReader(file))
    assert [(row["file"], row["line"]) for row in rejected] == [
        (file, str(line)) for line, file in enumerate(reasons, 3)
    ]
    for row in rejected:
        assert reasons[row["file"]] in row["reason"]
        assert f"clips.csv, line {row['line']}: {row['file'] or '(no file)'}: {row['reason']}\n" in said
    assert "1 samples in 1 shard, 7 rows rejected" in said and "rejected.csv" in said
    assert jsons(tmp_path / "out/shard-000000.tar") == {"good": {"caption": "A bell."}}


@pytest.mark.parametrize("rows", [[{"file": "missing.wav", "caption": "A bell."}], []])
def test_pack_makes_nothing_where_nothing_could_be_packed(
    packed: Callable[..., str], tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    said = packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out", code=3)
    assert "no row could be packed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["clips.csv"]


def test_pack_leaves_no_half_of_a_set(packed: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    clips = table(tmp_path / "clips.csv", {"file": "a.wav", "caption": "A bell."})
    # So far behind that the first row is read before it turns out not to be UTF-8.
    clips.write_bytes(clips.read_bytes() + b" " * 100_000 + b"\nb.wav,caf\xe9\n")
    assert "UTF-8" in packed(clips, tmp_path / "out", code=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "clips.csv"]


def has_reader(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_a_killed_pack_leaves_no_half_of_a_set(packed: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "b.wav")
    rows = [{"file": file, "caption": "A bell."} for file in ("a.wav", "b.wav")]
    clips = table(tmp_path / "clips.csv", *rows)
    with subprocess.Popen([sys.executable, "-m", "tools.pack", clips, tmp_path / "out"], cwd=ROOT) as process:
        while not has_reader(tmp_path / "b.wav"):  # then a.wav is packed
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"tools.pack ended with {process.wait(0.05)}")
        process.kill()
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.wav").unlink()
    write(tmp_path / "b.wav")
    assert "2 samples in 1 shard" in packed(clips, tmp_path / "out"), "starting it again is enough"


def test_pack_refuses_what_is_there_already(packed: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    clips = table(tmp_path / "clips.csv", {"file": "a.wav", "caption": "A bell."})
    (tmp_path / "full").mkdir()
    for file, out in (("full/notes", "full"), ("file", "file")):
        (tmp_path / file).write_text("precious", encoding="utf-8")
        said = packed(clips, tmp_path / out, code=2)
        assert f"{tmp_path / out}: exists" in said and "choose another" in said
        assert (tmp_path / file).read_text(encoding="utf-8") == "precious"
    (tmp_path / "empty").mkdir()
    packed(clips, tmp_path / "empty")


def test_pack_takes_the_rows_and_columns_asked_for(packed: Callable[..., str], tmp_path: Path) -> None:
    rows = []
    splits = {"a.wav": "train", "deep/er/b.v2.WAV": "train", "./c d.wav": "train", "e.wav": "test"}
    for file, split in splits.items():
        write(tmp_path / "sounds" / file)
        rows.append({"file": file, "caption": f' "{file}", é ', "split": split, "licence": "CC0"})
    clips = table(tmp_path / "sounds/clips.csv", *rows, columns=("split", "licence"))
    packed(clips, tmp_path / "out", "--where", "split=train", "--caption-key", "words")
    rest = {"split": "train", "licence": "CC0"}
    assert jsons(tmp_path / "out/shard-000000.tar") == {
        "a": {**rest, "words": '"a.wav", é'},
        "deep_er_b_v2": {**rest, "words": '"deep/er/b.v2.WAV", é'},
        "c d": {**rest, "words": '"./c d.wav", é'},
    }
    samples = read_all(f"{tmp_path}/out/*.tar", tmp_path, caption_key="words")
    assert set(samples) == {"a", "deep_er_b_v2", "c d"}


def test_a_table_that_does_not_fit_is_explained(packed: Callable[..., str], tmp_path: Path) -> None:
    clips = tmp_path / "clips.csv"
    clips.write_text("path;caption\na.wav;A bell.\n", encoding="utf-8")
    assert "no column file, caption; it has path;caption" in packed(clips, tmp_path / "out", code=3)
    said = packed(table(clips), tmp_path / "out", "--where", "split=train", code=3)
    assert "no column split; it has file, caption" in said
    assert "missing.csv: cannot read it" in packed(tmp_path / "missing.csv", tmp_path / "out", code=3)


def test_pack_cuts_shards_by_size(packed: Callable[..., str], tmp_path: Path) -> None:
    clips = [write(tmp_path / f"{number:02d}.wav", number, seconds=12) for number in range(9)]  # 384 kB each
    rows = [{"file": clip.name, "caption": "Noise."} for clip in clips]
    packed(table(tmp_path / "clips.csv", *rows), tmp_path / "out", "--shard-mb", 1)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert all(shard.stat().st_size < 1.5 * 2**20 for shard in shards)
    assert [sample["__key__"] for sample in webdataset(*shards)] == [f"{number:02d}" for number in range(9)]
