"""`python -m tools.caption MODEL PATH...`: caption audio files with an exported model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import GenerationConfig
from transformers.utils import logging

from configs.errors import ConfigError, DataError, run_command
from data.decode import AUDIO_ENDINGS, SAMPLE_RATE, BadSample, decode, in_words
from data.ffmpeg import ffmpeg_would_win, needs_ffmpeg
from data.windows import HOP, Windows
from trainer.captioning import Generator, Heard
from trainer.examine import examine, processor
from trainer.whisper import AUDIO_WINDOW

AT_ONCE = 8
"""Files that are captioned at the same time."""


class Window(StrEnum):
    """What a model hears of a clip: the clip alone, or padded to the whole window."""

    own = "own"
    full = "full"


def caption(
    model: Annotated[Path, typer.Argument(help="Folder made by tools.export.", metavar="MODEL")],
    paths: Annotated[list[Path], typer.Argument(help="Audio files, or folders of them.", metavar="PATH...")],
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="A JSON object per line: path, caption, seconds; error where a file could not be read.",
        ),
    ] = False,
    style: Annotated[
        str | None, typer.Option(help="The style prompt that the wanted source was trained with.")
    ] = None,
    window: Annotated[
        Window | None,
        typer.Option(
            help="The clip at its own length, or padded as other programs do; default: as it was trained."
        ),
    ] = None,
) -> None:
    """Print path and caption of each file. Of a file longer than the model's window, the beginning is
    captioned."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    captioner = _Captioner(model, style, window)
    files = _files(paths)
    failed = for_ffmpeg = 0
    for begin in range(0, len(files), AT_ONCE):
        for path, clip, text in _captioned(captioner, files[begin : begin + AT_ONCE]):
            if isinstance(clip, Exception):
                failed += 1
                for_ffmpeg += needs_ffmpeg(str(clip))
                if as_json:
                    _print_json(path=str(path), error=str(clip))
                else:
                    print(f"{path}: {clip}", file=sys.stderr)
                continue
            if clip.seconds > captioner.seconds:
                length = in_words(clip.seconds, captioner.seconds)
                notice = f"{path}: has {length} s; its first {captioner.seconds:g} s are captioned"
                print(notice, file=sys.stderr)
            if as_json:
                _print_json(path=str(path), caption=text, seconds=round(clip.seconds, 3))
            else:
                print(f"{path}\t{text}", flush=True)
    if failed:
        won = f"; {for_ffmpeg:,} of them {ffmpeg_would_win(for_ffmpeg)}" if for_ffmpeg else ""
        some = "1 file" if failed == 1 else f"{failed:,} files"
        raise DataError(f"{some} could not be captioned{won}")


class _Clip(NamedTuple):
    """The part of a file that a model takes, (n,) int16 at 16 kHz, and the seconds of the whole file."""

    waveform: torch.Tensor
    seconds: float


def _read(path: Path, most: float) -> _Clip:
    """Decode the first `most` seconds of a file. Raises BadSample, OSError."""
    lengths: list[float] = []

    def fit(seconds: float) -> tuple[float, float] | None:
        lengths.append(seconds)
        return (0.0, most) if seconds > most else None

    waveform = torch.from_numpy(decode(path.read_bytes(), _ending(path), fit))
    (stated,) = lengths
    return _Clip(waveform, stated if stated > most else len(waveform) / SAMPLE_RATE)


def _captioned(
    captioner: _Captioner, paths: list[Path]
) -> Iterator[tuple[Path, _Clip | BadSample | OSError, str]]:
    """Each file with its clip and caption, or with the reason why it cannot be read."""
    clips = [_try_to_read(path, captioner.seconds) for path in paths]
    captions = iter(captioner([clip.waveform for clip in clips if isinstance(clip, _Clip)]))
    for path, clip in zip(paths, clips, strict=True):
        yield path, clip, next(captions) if isinstance(clip, _Clip) else ""


def _try_to_read(path: Path, most: float) -> _Clip | BadSample | OSError:
    try:
        return _read(path, most)
    except (BadSample, OSError) as error:
        return error


def _print_json(**values: object) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)


class _Captioner:
    """An exported model that captions clips."""

    def __init__(self, folder: Path, style: str | None, window: Window | None) -> None:
        found = examine(str(folder), "MODEL", needs_weights=True)
        for remark in found.remarks:
            print(remark, file=sys.stderr)
        self.processor = processor(found.folder, found.config)
        model = found.whisper().eval()
        window = window or trained_window(model.config)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.windows = Windows(2 * model.config.max_source_positions, float(window == Window.full), seed=0)
        self.seconds = self.windows.whole * HOP / SAMPLE_RATE
        self.prompt = self.processor.get_prompt_ids(style).tolist() if style else []
        self.generator = Generator(model, GenerationConfig.from_dict(found.generation))
        if self.generator.beyond:
            asked = f"{found.folder / 'generation_config.json'}: asks for {', '.join(self.generator.beyond)}"
            print(f"{asked}: clips are captioned one at a time, which takes longer", file=sys.stderr)

    def __call__(self, waveforms: list[torch.Tensor]) -> list[str]:
        """(n,) int16 at 16 kHz of each clip -> their captions."""
        clips = [waveform[: self.windows.whole * HOP] for waveform in waveforms]
        frames = self.windows.frames([len(clip) for clip in clips], [0] * len(clips), 0).tolist()
        heard = [Heard(clip, wanted, self.prompt) for clip, wanted in zip(clips, frames, strict=True)]
        texts = [self.processor.decode(tokens, skip_special_tokens=True) for tokens in self.generator(heard)]
        return [text.strip() for text in texts]


def trained_window(config: Any) -> Window:
    """On which a model was trained. Raises ConfigError."""
    said = getattr(config, AUDIO_WINDOW, Window.full)
    if said not in list(Window):
        raise ConfigError(f"MODEL: config.json: {AUDIO_WINDOW}={said!r}: must be own or full")
    return Window(said)


def _files(paths: list[Path]) -> list[Path]:
    """The audio files among paths, and in folders among them. Raises ConfigError."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: does not exist")
        inside = (file for file in path.rglob("*") if _ending(file) in AUDIO_ENDINGS)
        files = sorted(inside) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{path}: holds no audio file")
        found += files
    return found


def _ending(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


if __name__ == "__main__":
    run_command(lambda: typer.run(caption))
