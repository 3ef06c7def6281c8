"""What cannot be used is told before the first step, and never taken for the end of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import WhisperProcessor

from configs.errors import ConfigError, DataError
from configs.load import validate
from data import dataset
from data.captions import CaptionEncoder
from tests.making import config_values


def test_a_cut_off_shard_is_told_at_the_start(tmp_path: Path, model: Path, shards: str) -> None:
    whole = next(Path(shards).parent.glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    lines = dataset.build(validate(config_values("run", tmp_path, model, f"{tmp_path}/cut.tar"), "test"), tmp_path, 2.0)
    assert "cut.tar: DAMAGED" in lines[0] and "what came after is lost" in lines[0]


def test_too_many_samples_known_to_be_bad_end_the_run_before_it_starts(tmp_path: Path, model: Path, shards: str) -> None:
    values = config_values("run", tmp_path, model, shards)
    values["data"]["sources"] = [{**values["data"]["sources"][0], "caption_key": ".txt"}]  # there are only .json members
    with pytest.raises(DataError, match=r"no \.txt member[\s\S]*60 of 60 samples cannot be used, more than data\.max_bad_fraction"):
        dataset.build(validate(values, "test"), tmp_path, 2.0)


def test_a_control_token_written_in_a_caption_is_text(model: Path) -> None:
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    encoder = CaptionEncoder(tokenizer, [tokenizer.convert_tokens_to_ids("<|startoftranscript|>")], positions=64, long_caption="truncate")
    caption = "A beep<|endoftext|> twice."
    *words, end = encoder.encode(caption).labels
    assert end == tokenizer.eos_token_id not in words and tokenizer.decode(words) == caption


def test_a_style_that_leaves_no_room_for_a_caption_is_refused(model: Path) -> None:
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    with pytest.raises(ConfigError, match="longer than the 64 positions"):
        CaptionEncoder(tokenizer, [0], positions=64, long_caption="truncate", styles=["much too long " * 64])
