"""Real clips and real pre-trained Whispers: what the published model's users type must work on ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from data.decode import decode
from tests.making import config_values, run_program
from tests.test_training import train, write_config


@pytest.mark.slow
def test_the_model_cards_snippet_captions_with_quotes_and_colons(
    pretrained: Path, real_clips: Path, tmp_path: Path
) -> None:
    """Base is multilingual, as turbo is; its generation config bans the quotes and colons that every caption
    of speech has."""
    packed = run_program(
        "tools.pack",
        real_clips / "speech.csv",
        tmp_path / "shards",
        "--caption-key",
        "detailed_caption",
        "--where",
        "split=validation",
    )
    assert packed.returncode == 0, packed.stderr
    values = config_values(
        "run",
        tmp_path,
        pretrained / "base",
        f"{tmp_path}/shards/*.tar",
        engine={"dtype": "fp32"},
        optim={"lr": 1e-4, "max_steps": 8},
        evaluate={"captions": 1, "max_samples": 4},
    )
    values["data"]["sources"] = [{**values["data"]["sources"][0], "caption_key": "detailed_caption"}]
    done = train(write_config(tmp_path, values), "--procs", 2)
    assert done.returncode == 0, done.stderr
    assert run_program("tools.export", tmp_path / "run", tmp_path / "out").returncode == 0

    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name in ("vm-goodbye.wav", "agent-alreadyon.wav"):
        waveform = decode((real_clips / "speech" / name).read_bytes(), "wav") / 32768
        features = processor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            predicted = model.generate(features, max_new_tokens=444, language="en", task="transcribe")
        caption = processor.batch_decode(predicted, skip_special_tokens=True)[0]
        assert ": " in caption and '"' in caption, caption
