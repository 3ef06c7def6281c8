"""An export works wherever people take it: other programs read it without help and say what the run says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoFeatureExtractor, GenerationConfig, WhisperConfig, WhisperProcessor

from configs.errors import ConfigError
from configs.run.folder import RunDir
from tests.making import config_values, make_clips, make_model, run_program
from tests.test_training import train, write_config
from tools import caption
from tools.bench import exported
from tools.hub_files import run_generation, write_hub_files
from tools.model_card import why_not_in_faster_whisper
from trainer.examine import examine_beside

FILES = {
    "README.md",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


def base_of(folder: Path, model: Path, **generation: object) -> RunDir:
    """A run as it lies on disk before its first step, with other values in its generation config."""
    run = RunDir(folder / "run")
    WhisperProcessor.from_pretrained(model).save_pretrained(run.base)
    WhisperConfig.from_pretrained(model).save_pretrained(run.base)
    values = json.loads((model / "generation_config.json").read_text(encoding="utf-8")) | generation
    (run.base / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    config = config_values("run", folder, model, "none/*.tar")
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    return run


def add_empty_token(model: Path) -> None:
    """Let a vocabulary have the token by which CTranslate2 knows published Whispers for many languages, in
    the place of one that is never used."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[""] = vocabulary.pop("Ā")
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def written(run: RunDir, out: Path, learnt: list[int]) -> GenerationConfig:
    base = examine_beside(run.base, "the run's base")
    write_hub_files(base, out, torch.float32, run_generation(base, learnt), "own")
    return GenerationConfig.from_pretrained(out)


def test_a_multilingual_export_says_language_and_task_by_itself(model: Path, tmp_path: Path) -> None:
    stale = {"forced_decoder_ids": [[1, 5], [2, 6]], "max_new_tokens": 9, "language": "de"}
    generation = written(base_of(tmp_path, model, **stale), tmp_path / "out", [])
    assert (generation.language, generation.task, generation.num_beams) == ("en", "transcribe", 1)
    assert generation.max_length == 64 and generation.max_new_tokens is None
    assert not getattr(generation, "forced_decoder_ids", None)


def test_an_english_export_names_no_language(model: Path, tmp_path: Path) -> None:
    run = base_of(tmp_path, model, is_multilingual=False, language="en", task="transcribe")
    tokenizer = run.base / "tokenizer.json"
    content = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(content.replace("<|transcribe|>", "<|unused|>"), encoding="utf-8")
    generation = written(run, tmp_path / "out", [])
    assert getattr(generation, "language", None) is None and getattr(generation, "task", None) is None


def test_the_config_bans_what_the_generation_config_bans(model: Path, tmp_path: Path) -> None:
    run = base_of(tmp_path, model)
    banned = GenerationConfig.from_pretrained(model).suppress_tokens
    generation = written(run, tmp_path / "out", banned[:2])
    config = WhisperConfig.from_pretrained(tmp_path / "out")
    assert generation.suppress_tokens == config.suppress_tokens == banned[2:]
    assert config.begin_suppress_tokens == generation.begin_suppress_tokens


def test_transformers_4_finds_processor_and_vocabulary(model: Path, tmp_path: Path) -> None:
    written(base_of(tmp_path, model), tmp_path / "out", [])
    values = {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*.json")
    }
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    assert values["vocab.json"] | values["added_tokens.json"] == tokenizer.get_vocab()
    assert "extra_special_tokens" not in values["tokenizer_config.json"]
    assert "<|notimestamps|>" in values["special_tokens_map.json"]["additional_special_tokens"]
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").chunk_length == 2


def test_a_model_that_faster_whisper_would_ask_wrongly_is_not_told_to_go_there(tmp_path: Path) -> None:
    """It would take it for an English one, and leave language and task away."""
    small = make_model(tmp_path / "model", seconds=30)
    base = examine_beside(small, "the model")
    assert "the vocabulary has no empty token" in why_not_in_faster_whisper(base)
    add_empty_token(small)
    assert why_not_in_faster_whisper(examine_beside(small, "the model")) == ""
    english = replace(base, generation=base.generation | {"is_multilingual": False})
    assert why_not_in_faster_whisper(english) == ""


def test_an_export_with_an_audio_window_that_is_none_is_refused() -> None:
    config = WhisperConfig(audio_window="half")
    with pytest.raises(ConfigError, match="audio_window='half': must be own or full"):
        caption.trained_window(config)


def test_an_export_trained_at_own_lengths_is_compared_at_full_windows_too(
    model: Path, tmp_path: Path
) -> None:
    written(base_of(tmp_path, model), tmp_path / "out", [])
    commands = ["tools.caption", "tools.caption --window full"]
    assert list(exported.commands_of(tmp_path / "out")) == commands


@pytest.mark.slow
def test_an_export_of_turbos_shape_captions_in_transformers_and_faster_whisper(
    windows_of_30_seconds: Path, tmp_path: Path
) -> None:
    """128 mels and windows of 30 s; the captions are those of tools.caption."""
    done = run_program("tools.export", windows_of_30_seconds, tmp_path / "out")
    assert done.returncode == 0 and "asked for a caption" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| sounds | " in card and "| CC0 |" in card and "faster_whisper" in card
    clips = sorted((windows_of_30_seconds.parent / "clips").glob("*.flac"))[::2]
    same = dict(exported.agreement(tmp_path / "out", clips, exported.TRANSFORMERS + exported.FASTER_WHISPERS))
    # So early a model is sure of nothing: where BF16 and int8 round, other words follow.
    exact = [counts for way, counts in same.items() if not way.endswith(("bfloat16", "int8"))]
    assert len(same) == 6 and exact == 4 * [{"tools.caption": len(clips)}], same


@pytest.mark.slow
def test_a_bf16_export_captions_in_a_pipeline(windows_of_30_seconds: Path, tmp_path: Path) -> None:
    done = run_program("tools.export", windows_of_30_seconds, tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    clips = sorted((windows_of_30_seconds.parent / "clips").glob("*.flac"))
    by_pipeline = exported.by_stranger("pipeline", tmp_path / "out", clips)
    ours = exported.by_earwitness(tmp_path / "out", clips)
    # Captions that do not end part where BF16 rounds in another way.
    assert [text.split()[:5] for text in by_pipeline] == [text.split()[:5] for text in ours]


@pytest.fixture(scope="module")
def windows_of_30_seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small Whisper in turbo's shape, on full windows."""
    folder = tmp_path_factory.mktemp("turbo")
    small = make_model(folder / "model", mels=128, vocabulary=51_866, seconds=30, positions=448)
    add_empty_token(small)
    table = make_clips(folder / "clips", range(12), endings=("flac",))
    assert run_program("tools.pack", table, folder / "shards").returncode == 0
    values = config_values(
        "run", folder, small, f"{folder}/shards/*.tar", optim={"max_steps": 30, "lr": 3e-3}
    )
    values["data"] |= {"window": "full"}
    values["data"]["sources"][0] |= {"licence": "CC0"}
    values["evaluate"] |= {"captions": 0, "every_steps": 1000}
    done = train(write_config(folder, values))
    assert done.returncode == 0, done.stderr
    return folder / "run"
