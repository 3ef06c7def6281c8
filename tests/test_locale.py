"""Text is UTF-8 in every file and pipe, whatever the locale is."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import yaml
from webdataset import WebDataset

from tests.making import ROOT, config_values, run_program, sound_of
from tests.shards import clip, shard
from tests.test_imports import FILES

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLACE_OF_MODE = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
"""Functions that open a file, and the place of the mode among their arguments."""
BINARY_BY_DEFAULT = ("NamedTemporaryFile", "TemporaryFile")
OPENS_NO_TEXT = ("os", "tarfile", "self", "_trouble")
"""Objects with an `open` that opens no text file; all others count as paths."""
RUNS_A_PROCESS = ("run", "Popen", "check_output", "check_call", "call")
FAULTY = """
path.read_text()
path.write_text(text)
open(path)
open(path, "w")
path.open()
path.open(mode="a")
os.fdopen(descriptor, "w")
NamedTemporaryFile("w")
subprocess.run(command, text=True)
subprocess.Popen(command, universal_newlines=True)
"""
SOUND = """
path.read_text("utf-8")
path.write_text(text, encoding="utf-8")
open(path, "wb")
path.open("rb")
path.open("w", encoding="utf-8")
os.open(path, os.O_RDONLY)
tarfile.open(path)
NamedTemporaryFile()
subprocess.run(command, capture_output=True)
subprocess.run(command, encoding="utf-8")
"""


def text_in_the_encoding_of_the_locale(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text without saying in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and is_text_without_encoding(node):
            yield node


def is_text_without_encoding(call: ast.Call) -> bool:
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in options:
        return False
    *owners, name = ast.unparse(call.func).split(".")
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) == 1
    if name in RUNS_A_PROCESS:
        return "text" in options or "universal_newlines" in options
    if name not in PLACE_OF_MODE:
        return False
    place = PLACE_OF_MODE[name]
    if name == "open" and owners:
        if owners[-1] in OPENS_NO_TEXT:
            return False
        place = 0  # path.open("w")
    mode = call.args[place] if len(call.args) > place else options.get("mode")
    if mode is None:
        return name not in BINARY_BY_DEFAULT
    return "b" not in ast.unparse(mode)


def test_every_file_and_every_process_is_read_and_written_in_a_stated_encoding() -> None:
    assert len(list(text_in_the_encoding_of_the_locale(FAULTY))) == len(FAULTY.split("\n")) - 2
    assert not list(text_in_the_encoding_of_the_locale(SOUND))
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")]
    assert not [
        f"{path}:{call.lineno} {ast.unparse(call)}"
        for path in [*FILES, *tests]
        for call in text_in_the_encoding_of_the_locale((ROOT / path).read_text(encoding="utf-8"))
    ]


def test_captions_and_file_names_pass_through_commands_in_an_ascii_locale(tmp_path: Path) -> None:
    captions = {
        "Glocken/schön.wav": "Glocken läuten über Köln: 鐘が鳴る.",
        "鐘.flac": "Une cloche, très près.",
    }
    for number, file in enumerate(captions):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / file, sound_of(number), 16_000)
    rows = [*captions.items(), ("fehlt-ü.wav", "Not there."), ("鐘.ogg", "Twice.")]
    with (tmp_path / "clips.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("file", "caption"), *rows])
    shards = tmp_path / "Töne"

    packed = run_program("tools.pack", tmp_path / "clips.csv", shards, env=ASCII_LOCALE)
    assert packed.returncode == 0, packed.stderr
    assert "fehlt-ü.wav: cannot be read: No such file" in packed.stdout
    assert "its key '鐘' is that of 鐘.flac" in packed.stdout
    assert "fehlt-ü.wav" in (shards / "rejected.csv").read_text(encoding="utf-8")
    samples = list(WebDataset(str(shards / "shard-000000.tar"), shardshuffle=False))
    assert {sample["__key__"]: json.loads(sample["json"])["caption"] for sample in samples} == {
        "Glocken_schön": captions["Glocken/schön.wav"],
        "鐘": captions["鐘.flac"],
    }
    assert samples[0]["wav"] == (tmp_path / "Glocken/schön.wav").read_bytes()

    shown = run_program("tools.inspect", shards / "*.tar", "--index-dir", tmp_path, env=ASCII_LOCALE)
    assert shown.returncode == 0, shown.stderr
    assert all(caption in shown.stdout for caption in captions.values()) and "problems  none" in shown.stdout


def test_a_config_is_shown_in_an_ascii_locale(tmp_path: Path) -> None:
    source = "{name: birds, shards: Vögel-*.tar, style: 鳥の声}"
    (tmp_path / "größer.yaml").write_text(
        f"run: {{name: Vögel}}\nmodel: {{name_or_path: none}}\ndata: {{sources: [{source}]}}\n"
        "optim: {max_steps: 1}\n",
        encoding="utf-8",
    )
    done = run_program("launch", "config", tmp_path / "größer.yaml", env=ASCII_LOCALE)
    assert done.returncode == 0, done.stderr
    assert "name: Vögel" in done.stdout and "style: 鳥の声" in done.stdout and "Vögel-*.tar" in done.stdout


@pytest.mark.parametrize("more", [{}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX"}])
def test_a_config_in_an_ascii_locale_can_name_any_file(tmp_path: Path, more: dict[str, str]) -> None:
    clips = shard(tmp_path / "Vögel.tar", clip("a"))
    values = config_values("birds", tmp_path, tmp_path / "model", str(clips))
    values["data"]["index_dir"] = str(tmp_path / "鐘")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run_program("tools.index", tmp_path / "mine.yaml", env=ASCII_LOCALE | more)
    assert done.returncode == 0 and str(tmp_path / "鐘") in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "鐘").glob("Vögel-*.parquet"))
