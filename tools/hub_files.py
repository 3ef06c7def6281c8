"""What lies beside the weights of an export, as all programs that take Whispers read it: transformers 4 and
5, CTranslate2, faster-whisper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig, WhisperTokenizer

from trainer.examine import Pretrained, processor
from trainer.whisper import AUDIO_WINDOW

PIPELINE: Final = "automatic-speech-recognition"
"""What transformers' pipelines and the hub call what Whispers do."""
OF_THIS_MACHINE = ("is_local", "local_files_only", "extra_special_tokens")
"""What transformers 5 writes into tokenizer_config.json, and transformers 4 stumbles over."""


def run_generation(base: Pretrained, learnt: list[int]) -> dict[str, Any]:
    """What a run generates with. learnt: the tokens of its captions that Whisper bans, as quotes, colons and
    brackets."""
    banned = sorted(set(base.generation.get("suppress_tokens") or []) - set(learnt))
    return {**base.generation, "suppress_tokens": banned or None}


def write_hub_files(
    base: Pretrained, folder: Path, dtype: torch.dtype, generation: dict[str, Any], window: str
) -> None:
    """Write processor, config and generation config. generation: what the run generates with; window: on
    which it was trained (`data.window`)."""
    whole = processor(base.folder, base.config)
    whole.save_pretrained(folder)
    whole.feature_extractor.save_pretrained(folder)  # preprocessor_config.json
    whole.tokenizer.save_vocabulary(folder)
    _complete_tokenizer(whole.tokenizer, folder)
    config = base.config
    generation = _for_anybody(generation, config.max_target_positions)
    GenerationConfig.from_dict(generation).save_pretrained(folder)
    config.dtype = dtype
    config.architectures = ["WhisperForConditionalGeneration"]
    config.use_cache = True
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        setattr(config, name, generation.get(name))
    # The pipeline of transformers 4 searches with five beams, whatever the generation config says.
    config.task_specific_params = {PIPELINE: {"num_beams": generation["num_beams"]}}
    setattr(config, AUDIO_WINDOW, window)
    config.save_pretrained(folder)


def _for_anybody(values: dict[str, Any], positions: int) -> dict[str, Any]:
    """The values of a generation config with which `generate`, without arguments, does what a run does.
    positions: the decoder's."""
    beams = values.get("num_beams") or 1  # written down, as a pipeline's own default is five
    limits = {"max_length": positions, "max_new_tokens": None}  # those of the base are of an earlier use
    return {**values, **limits, "num_beams": beams, "return_timestamps": False}


def _complete_tokenizer(tokenizer: WhisperTokenizer, folder: Path) -> None:
    """Write what tokenizers of transformers 4 read of the tokens outside of the vocabulary."""
    added = tokenizer.added_tokens_decoder
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    special = [str(token) for token in added.values() if token.special]
    others = [token for token in special if token not in named.values()]
    tokens = {**named, "additional_special_tokens": others}
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {name: value for name, value in values.items() if name not in OF_THIS_MACHINE}
    decoder = {str(number): _described(token) for number, token in added.items()}
    _write_json(path, {**values, **tokens, "added_tokens_decoder": decoder})
    _write_json(folder / "special_tokens_map.json", tokens)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    numbers = {str(token): number for number, token in added.items() if str(token) not in vocabulary}
    _write_json(folder / "added_tokens.json", numbers)


def _described(token: Any) -> dict[str, Any]:
    """A token of tokenizers.AddedToken, as tokenizer_config.json has it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
