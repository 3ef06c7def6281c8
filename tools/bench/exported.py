"""How many captions of an export are the same in other programs as in tools.caption."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile

from configs.errors import EarwitnessError
from data.decode import SAMPLE_RATE, decode
from tools.bench.report import ROOT
from trainer.whisper import AUDIO_WINDOW

TO_CTRANSLATE2 = "import sys; from ctranslate2.converters.transformers import main; sys.exit(main())"
COPIED = ("tokenizer.json", "preprocessor_config.json")
QUANTIZATIONS = ("float32", "bfloat16", "int8")


def agreement(
    export: Path, clips: Sequence[Path], faster_whisper: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    """Ways to caption, and how many of the clips have the same caption there as with tools.caption, by what
    is typed there: all other programs pad clips to the whole window. All hear the same samples: programs
    resample clips of other rates than 16 kHz each in their own way."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [_at_16_khz(clip, folder / f"{number:05d}.wav") for number, clip in enumerate(clips)]
        ours = {command: by_earwitness(export, files, *options) for command, options in _ours(export)}
        ways = {way: (way, export) for way in ("pipeline", "batched", "generate")}
        if faster_whisper:
            for kind in QUANTIZATIONS:
                converted = convert(export, folder / kind, kind)
                ways[f"faster-whisper {kind}"] = ("faster-whisper", converted)
        for name, (way, model) in ways.items():
            theirs = by_stranger(way, model, files)
            yield name, {command: _same(theirs, captions) for command, captions in ours.items()}


def _ours(export: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is typed to caption with an export, and the options in it."""
    yield "tools.caption", ()
    if json.loads((export / "config.json").read_text(encoding="utf-8")).get(AUDIO_WINDOW) == "own":
        yield "tools.caption --window full", ("--window", "full")


def _same(theirs: list[str], ours: list[str]) -> int:
    return sum(there == here for there, here in zip(theirs, ours, strict=True))


def by_earwitness(export: Path, files: Sequence[Path], *options: str) -> list[str]:
    """The captions of tools.caption."""
    lines = _run("-m", "tools.caption", export, *files, "--json", *options).splitlines()
    return [json.loads(line)["caption"] for line in lines]


def by_stranger(way: str, model: Path, files: Sequence[Path]) -> list[str]:
    """The captions that a program gives which knows nothing of Earwitness (tools/bench/strangers.py)."""
    listed = json.dumps([str(file) for file in files])
    captions: list[str] = json.loads(_run("tools/bench/strangers.py", way, model, given=listed))
    return captions


def convert(export: Path, out: Path, quantization: str) -> Path:
    """The export, as CTranslate2 has it."""
    options = ("--output_dir", out, "--quantization", quantization, "--copy_files", *COPIED)
    _run("-c", TO_CTRANSLATE2, "--model", export, *options)
    return out


def _at_16_khz(clip: Path, path: Path) -> Path:
    soundfile.write(path, decode(clip.read_bytes(), clip.suffix.lower().lstrip(".")), SAMPLE_RATE)
    return path


def _run(*arguments: object, given: str = "") -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, input=given, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise EarwitnessError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {done.stderr}")
    return done.stdout
