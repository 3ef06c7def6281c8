"""What `bench compare` trains on and judges by: clips with captions in a folder, a table of them for each
source."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from configs.errors import ConfigError, DataError
from data.captions import IGNORED, CaptionEncoder, prefix_tokens
from data.decode import SAMPLE_RATE
from tools.bench.report import Figures


@dataclass(frozen=True)
class Clip:
    """A clip with its caption."""

    source: str
    file: Path
    caption: str

    def audio(self) -> npt.NDArray[np.float32]:
        """(n,) at 16 kHz."""
        audio, rate = soundfile.read(self.file, dtype="float32", always_2d=True)
        mono = audio.mean(1)
        if rate != SAMPLE_RATE:
            mono = soxr.resample(mono, rate, SAMPLE_RATE)
        return np.asarray(mono, np.float32)


def tables_of(folder: Path) -> dict[str, Path]:
    """The CSV of each source, by its name. Raises ConfigError if there is none."""
    tables = {table.stem: table for table in sorted(folder.glob("*.csv"))}
    if not tables:
        raise ConfigError(f"{folder}: has no SOURCE.csv (columns file, caption, split)")
    return tables


def clips_of(folder: Path, split: str) -> list[Clip]:
    """The clips of a split, `train` or `validation`, source by source. Raises DataError if there are none."""
    clips = []
    for source, table in tables_of(folder).items():
        with table.open(newline="", encoding="utf-8-sig") as file:
            clips += [
                Clip(source, folder / row["file"], row["caption"])
                for row in csv.DictReader(file)
                if row["split"] == split
            ]
    if not clips:
        raise DataError(f"{folder}: its tables have no row with split={split}")
    return clips


@torch.no_grad()
def judge(folder: Path, clips: list[Clip]) -> Figures:
    """Mean cross-entropy of a caption token, in fp32 at full windows, by transformers alone: `loss` of all
    clips, and `loss/SOURCE`.

    folder: a model as `from_pretrained` loads it. Each caption counts with its end, and without the tokens
    that generation starts from.
    """
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    torch.nn.Module.to(model, device)
    processor = WhisperProcessor.from_pretrained(folder)
    encoder = CaptionEncoder(
        processor.tokenizer.backend_tokenizer,
        prefix_tokens(processor.tokenizer.backend_tokenizer, model.generation_config.to_dict()),
        positions=model.config.max_target_positions,
        long_caption="truncate",
    )
    losses: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    for clip in clips:
        features = processor.feature_extractor(clip.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        caption = encoder.encode(clip.caption.strip())
        labels = torch.tensor(caption.labels, device=device)
        logits = model(
            input_features=features.input_features.to(device),
            decoder_input_ids=torch.tensor([caption.input_ids], device=device),
        ).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        for name in ("loss", f"loss/{clip.source}"):
            losses[name] += float(loss)
            tokens[name] += int((labels != IGNORED).sum())
    return {name: losses[name] / tokens[name] for name in losses}
