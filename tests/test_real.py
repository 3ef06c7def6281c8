"""Real clips and real pre-trained Whispers: what the published model's users type must work on ours."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from data.decode import decode
from tests.making import config_values, run_program
from tests.test_training import train, write_config
from tools.bench import exported


def train_and_export(model: Path, clips: Path, folder: Path, steps: int) -> Path:
    """An export of a Whisper after some steps on the speech in `clips`, its encoder as it was."""
    options = ("--caption-key", "detailed_caption", "--where", "split=validation")
    packed = run_program("tools.pack", clips / "speech.csv", folder / "shards", *options)
    assert packed.returncode == 0, packed.stderr
    values = config_values(
        "run",
        folder,
        model,
        f"{folder}/shards/*.tar",
        engine={"dtype": "fp32"},
        optim={"lr": 1e-4, "max_steps": steps},
        evaluate={"captions": 0, "every_steps": 1000, "max_samples": 4},
    )
    values["model"] |= {"freeze": ["model.encoder"]}
    values["data"]["sources"] = [{**values["data"]["sources"][0], "caption_key": "detailed_caption"}]
    done = train(write_config(folder, values))
    assert done.returncode == 0, done.stderr
    done = run_program("tools.export", folder / "run", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def base(pretrained: Path, real_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base is multilingual, as turbo is; its generation config bans the quotes and colons that every caption
    of speech has."""
    return train_and_export(pretrained / "base", real_clips, tmp_path_factory.mktemp("base"), steps=8)


@pytest.mark.slow
def test_the_model_cards_snippet_captions_with_quotes_and_colons(base: Path, real_clips: Path) -> None:
    processor = WhisperProcessor.from_pretrained(base)
    model = WhisperForConditionalGeneration.from_pretrained(base)
    for name in ("vm-goodbye.wav", "agent-alreadyon.wav"):
        waveform = decode((real_clips / "speech" / name).read_bytes(), "wav") / 32768
        features = processor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            predicted = model.generate(features, max_new_tokens=444, language="en", task="transcribe")
        caption = processor.batch_decode(predicted, skip_special_tokens=True)[0]
        assert ": " in caption and '"' in caption, caption


@pytest.mark.slow
def test_base_says_in_faster_whisper_what_tools_caption_says_of_padded_clips(
    base: Path, real_clips: Path
) -> None:
    """Rounded to 8 bits it may choose other words where two are as good."""
    with (real_clips / "speech.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    clips = [real_clips / row["file"] for row in rows[::7]]
    same = dict(exported.agreement(base, clips, ["faster-whisper float32", "faster-whisper int8"]))
    padded = {way: counts["tools.caption --window full"] for way, counts in same.items()}
    assert padded["faster-whisper float32"] == len(clips), same
    assert padded["faster-whisper int8"] >= len(clips) // 2, same
