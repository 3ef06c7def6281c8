"""Whisper from a name, a folder or a config, and what has to lie beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from configs.disk import naming
from configs.errors import ConfigError
from configs.run.folder import RunDir
from configs.schema import Model
from data.captions import prefix_tokens
from trainer.examine import Pretrained, examine, processor
from trainer.weights import UNTRAINED, base_missing, take_weights
from trainer.whisper import Whisper, from_transformers

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperTokenizer


@dataclass(frozen=True)
class Captioner:
    """A Whisper with its tokenizer, the values of its generation config, and the tokens that captions start
    from. source: where transformers finds all of that; remarks: what is good to know about it at a start."""

    model: Whisper
    source: str
    tokenizer: Tokenizer
    generation: dict[str, Any]
    prefix: Sequence[int]
    remarks: Sequence[str] = ()

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


def load(settings: Model, seed: int, run: RunDir | None = None, init_from: Path | None = None) -> Captioner:
    """The model to start from, in float32.

    run: whose submission may have fetched it from the hub; init_from: a run, checkpoint or export
    whose weights it takes instead of its own. Raises ConfigError if it cannot be had or cannot be trained
    exactly.
    """
    base = examine_base(settings, seed, run)
    model = base.whisper(torch.float32) if base.weights else _with_random_weights(base.config, seed)
    model.config.dtype = torch.float32
    if init_from:
        take_weights(model, init_from)
    captioner = _prepare(model, str(base.folder), base.tokenizer, base.generation, settings)
    return replace(captioner, remarks=base.remarks)


def examine_base(settings: Model, seed: int, run: RunDir | None = None) -> Pretrained:
    """Look over the model to start from, as a start and a submission do. Raises ConfigError."""
    name = settings.name_or_path
    base = examine(name, "model.name_or_path", run.fetched(name) if run else None)
    with torch.device("meta"):
        freeze(Whisper(base.config), settings.freeze)
    if base.weights is None and settings.init_from is None:
        random = f"{base.folder}: holds no weights: training starts at random (run.seed={seed})"
        return replace(base, remarks=[*base.remarks, random])
    return base


def _with_random_weights(config: WhisperConfig, seed: int) -> Whisper:
    # Takes a second, and nothing else needs it at a start.
    from transformers import WhisperForConditionalGeneration

    torch.manual_seed(seed)
    return from_transformers(WhisperForConditionalGeneration(config))


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
    # AttributeError: the config lacks a value
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise base_missing(run, error) from error
    return _prepare(model, str(run.base), tokenizer, generation, settings)


def save_base(run: RunDir, captioner: Captioner) -> None:
    """Write `base/`: all that export and offline nodes need besides a checkpoint. Call before training
    changes anything."""
    run.base.mkdir(parents=True, exist_ok=True)
    with naming(run.base):
        _write_base(run, captioner)


def _write_base(run: RunDir, captioner: Captioner) -> None:
    from transformers import GenerationConfig

    whole = processor(captioner.source, captioner.config)
    whole.save_pretrained(run.base)
    whole.tokenizer.save_vocabulary(run.base)  # with normalizer.json, which save_pretrained leaves out
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


def freeze(model: Whisper, prefixes: Sequence[str]) -> None:
    """Let all be trained but the encoder's positions and the parameters whose names start so. Raises
    ConfigError."""
    model.requires_grad_(True)
    model.encoder.embed_positions.requires_grad_(False)
    for prefix in prefixes:
        frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ConfigError(
                f"model.freeze: no parameter's name starts with {prefix!r}; names look like"
                f" {next(iter(model.state_dict()))!r}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.freeze: {', '.join(prefixes)}: nothing is left to be trained; name less")


def _prepare(
    model: Whisper, source: str, tokenizer: Tokenizer, generation: dict[str, Any], settings: Model
) -> Captioner:
    """Set up for training what was loaded."""
    model.train()  # gradient checkpointing works in training alone
    freeze(model, settings.freeze)
    model.encoder.checkpointing = model.decoder.checkpointing = settings.gradient_checkpointing
    if settings.compile:
        for block in model.blocks:  # alike, so that the first one is compiled, and the others take its code
            block.compile(dynamic=True)
    return Captioner(model, source, tokenizer, generation, prefix_tokens(tokenizer, generation))
