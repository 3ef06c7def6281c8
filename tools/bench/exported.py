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
TRANSFORMERS = ("pipeline", "batched", "generate")
FASTER_WHISPER = "faster-whisper"
FASTER_WHISPERS = tuple(f"{FASTER_WHISPER} {kind}" for kind in ("float32", "bfloat16", "int8"))
"""Ways to caption."""


def agreement(
    export: Path, clips: Sequence[Path], ways: Sequence[str]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Each way to caption, and how many of the clips have the same caption there as with tools.caption, by
    the command for that. All hear the same samples: programs resample clips of other rates than 16 kHz each
    in their own way."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [_at_16_khz(clip, folder / f"{number:05d}.wav") for number, clip in enumerate(clips)]
        ours = {
            command: by_earwitness(export, files, *options)
            for command, options in commands_of(export).items()
        }
        for way in ways:
            theirs = _captions(way, export, files, folder)
            yield way, {command: _same(theirs, captions) for command, captions in ours.items()}


def _captions(way: str, export: Path, files: Sequence[Path], folder: Path) -> list[str]:
    """Those of another program. folder: for what it makes of the export."""
    if way in TRANSFORMERS:
        return by_stranger(way, export, files)
    kind = way.removeprefix(f"{FASTER_WHISPER} ")
    return by_stranger(FASTER_WHISPER, convert(export, folder / kind, kind), files)


def commands_of(export: Path) -> dict[str, list[str]]:
    """How tools.caption is called with an export, and the options for it: other programs pad each clip to the
    whole window."""
    commands: dict[str, list[str]] = {"tools.caption": []}
    if json.loads((export / "config.json").read_text(encoding="utf-8")).get(AUDIO_WINDOW) == "own":
        commands["tools.caption --window full"] = ["--window", "full"]
    return commands


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
