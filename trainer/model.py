"""Whisper from a name, a folder or a config, and what has to lie beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from configs.errors import ConfigError
from configs.run.folder import RunDir
from configs.schema import Model
from data.captions import prefix_tokens
from trainer.weights import UNTRAINED, base_missing, take_weights
from trainer.whisper import Whisper, from_transformers

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

RANDOM_PARTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "apply_spec_augment",
)


@dataclass(frozen=True)
class Captioner:
    """A Whisper with its tokenizer, the values of its generation config, and the tokens that captions start
    from. source: where transformers finds all of that."""

    model: Whisper
    source: str
    tokenizer: Tokenizer
    generation: dict[str, Any]
    prefix: Sequence[int]

    @property
    def config(self) -> WhisperConfig:
        """The model's config: its values alone where the run goes on."""
        config: WhisperConfig = self.model.config
        return config

    def decode(self, tokens: torch.Tensor) -> str:
        """The caption that (n,) tokens say, without what it was asked with."""
        return str(self._reader.decode(tokens, skip_special_tokens=True)).strip()

    @cached_property
    def _reader(self) -> WhisperTokenizer:
        from transformers import WhisperTokenizer

        tokenizer: WhisperTokenizer = WhisperTokenizer.from_pretrained(self.source)
        return tokenizer

    @property
    def frames(self) -> int:
        """Mel frames of its audio window."""
        return 2 * int(self.config.max_source_positions)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load(
    settings: Model, seed: int, pretrained: Path | None = None, init_from: Path | None = None
) -> Captioner:
    """The model to start from, in float32.

    pretrained: a folder with what the hub has under its name, if that was fetched before; init_from: a run,
    checkpoint or export whose weights it takes instead of its own. Raises ConfigError if it cannot be had or
    cannot be trained exactly.
    """
    # Takes more than a second, and a run that goes on does without it.
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer

    name = settings.name_or_path
    if pretrained and pretrained.is_dir():
        name = str(pretrained)
    try:
        tokenizer = WhisperTokenizer.from_pretrained(name).backend_tokenizer
        if _is_without_weights(Path(name)):
            model = _with_random_weights(Path(name), seed)
        else:
            model = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name_or_path: {name}: cannot load a Whisper from there: {error}") from error
    ours = _as_ours(model, name)
    if init_from:
        take_weights(ours, init_from)
    return _prepare(ours, name, tokenizer, model.generation_config.to_dict(), settings)


def _as_ours(model: WhisperForConditionalGeneration, name: str) -> Whisper:
    random = [part for part in RANDOM_PARTS if getattr(model.config, part, 0)]
    if random:
        raise ConfigError(
            f"{name}: its config sets {', '.join(random)}. A step must not depend on how many ranks take it,"
            " so set them to 0 (false), as in Whisper as published."
        )
    try:
        return from_transformers(model)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _is_without_weights(folder: Path) -> bool:
    """Whether this is a folder, and holds a model's config alone."""
    weights = [file for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}*")]
    return folder.is_dir() and not weights


def _with_random_weights(folder: Path, seed: int) -> WhisperForConditionalGeneration:
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(folder))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_base(run: RunDir, settings: Model) -> Captioner:
    """The model of a run that has started: its shape and its untrained tensors; the trained ones come from a
    checkpoint. Raises CheckpointError."""
    try:
        config, generation = (
            json.loads((run.base / file).read_text(encoding="utf-8"))
            for file in ("config.json", "generation_config.json")
        )
        tokenizer = Tokenizer.from_buffer((run.base / "tokenizer.json").read_bytes())
        with torch.device("meta"):
            model = Whisper(SimpleNamespace(**config))
        model.to_empty(device="cpu")
        model.tie_weights()
        model.load_state_dict(load_file(run.base / UNTRAINED), strict=False)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: the config lacks a value
        raise base_missing(run, error) from error
    return _prepare(model, str(run.base), tokenizer, generation, settings)


def save_base(run: RunDir, captioner: Captioner) -> None:
    """Write `base/`: all that export and offline nodes need besides a checkpoint. Call before training
    changes anything."""
    from transformers import GenerationConfig, WhisperProcessor

    run.base.mkdir(parents=True, exist_ok=True)
    processor = WhisperProcessor.from_pretrained(captioner.source)
    processor.save_pretrained(run.base)
    processor.tokenizer.save_vocabulary(run.base)  # with normalizer.json, which save_pretrained leaves out
    GenerationConfig.from_dict(captioner.generation).save_pretrained(run.base)
    untrained = {
        **{name: p.detach() for name, p in captioner.model.named_parameters() if not p.requires_grad},
        **dict(captioner.model.named_buffers()),
    }
    weights = run.base / UNTRAINED
    save_file({name: tensor.contiguous() for name, tensor in untrained.items()}, weights)
    # safetensors writes 0600
    weights.chmod((run.base / "generation_config.json").stat().st_mode)
    captioner.config.save_pretrained(run.base)  # the last one: its presence says that base/ is complete


def _prepare(
    model: Whisper, source: str, tokenizer: Tokenizer, generation: dict[str, Any], settings: Model
) -> Captioner:
    """Set up for training what was loaded."""
    model.train()  # from_pretrained hands it out for use, and nothing is computed again then
    model.requires_grad_(True)
    model.encoder.embed_positions.requires_grad_(False)  # from_pretrained leaves it True
    for prefix in settings.freeze:
        frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ConfigError(
                f"model.freeze: no parameter's name starts with {prefix!r}; names look like"
                f" {next(iter(model.state_dict()))!r}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    model.encoder.checkpointing = model.decoder.checkpointing = settings.gradient_checkpointing
    if settings.compile:
        for block in model.blocks:  # alike, so that the first one is compiled, and the others take its code
            block.compile(dynamic=True)
    return Captioner(model, source, tokenizer, generation, prefix_tokens(tokenizer, generation))
