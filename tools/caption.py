"""`python -m tools.caption MODEL PATH...`: caption audio files with an exported model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from configs.errors import ConfigError, DataError, run_command
from data.captions import LANGUAGE, TASK
from data.decode import AUDIO_ENDINGS, SAMPLE_RATE, BadSample, decode
from data.features import log_mel


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
) -> None:
    """Print path and caption of each file. Of files longer than the model's window the beginning is
    captioned."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    captioner = _Captioner(model, style)
    failed = 0
    for path in _files(paths):
        try:
            waveform = torch.from_numpy(decode(path.read_bytes(), path.suffix.lower().lstrip(".")))
        except (BadSample, OSError) as error:
            failed += 1
            print(
                json.dumps({"path": str(path), "error": str(error)}) if as_json else f"{path}: {error}",
                file=sys.stdout if as_json else sys.stderr,
            )
            continue
        seconds = len(waveform) / SAMPLE_RATE
        if seconds > captioner.seconds:
            print(
                f"{path}: has {seconds:.1f} s; its first {captioner.seconds:g} s are captioned",
                file=sys.stderr,
            )
        text = captioner(waveform)
        print(
            (
                json.dumps(
                    {"path": str(path), "caption": text, "seconds": round(seconds, 3)}, ensure_ascii=False
                )
                if as_json
                else f"{path}\t{text}"
            ),
            flush=True,
        )
    if failed:
        raise DataError(f"{failed} files could not be captioned")


class _Captioner:
    def __init__(self, folder: Path, style: str | None) -> None:
        try:
            self.model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
            self.processor = WhisperProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: not a model that transformers loads: {error}") from None
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.frames = 2 * self.model.config.max_source_positions
        self.seconds = self.frames / 100
        prompt = (
            self.processor.get_prompt_ids(style, return_tensors="pt").to(self.model.device) if style else None
        )
        self.options = {"prompt_ids": prompt} if prompt is not None else {}
        if getattr(self.model.generation_config, "is_multilingual", False):
            self.options |= {"language": LANGUAGE, "task": TASK}

    @torch.no_grad()
    def __call__(self, waveform: torch.Tensor) -> str:
        """(n,) int16 at 16 kHz -> caption."""
        clip = waveform[None, : self.frames * 160].to(self.model.device)
        features = log_mel(
            clip,
            torch.tensor([clip.shape[1]], device=clip.device),
            self.frames,
            self.model.config.num_mel_bins,
        )
        tokens = self.model.generate(features.to(self.model.dtype), **self.options)
        text: str = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        return text.strip()


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: does not exist")
        if path.is_dir():
            found = sorted(
                file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in AUDIO_ENDINGS
            )
            if not found:
                raise ConfigError(f"{path}: holds no audio file")
            yield from found
        else:
            yield path


if __name__ == "__main__":
    run_command(lambda: typer.run(caption))
