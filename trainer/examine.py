"""A model is examined before it is used: the one door through which training, submission, the next phase,
captions, exports and the doctor read a folder, or what the hub has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from configs.errors import ConfigError
from trainer import fit, vocabulary, weight_files
from trainer.hub import is_hub_name, locate
from trainer.other_weights import refuse_adapter, refuse_dangling, refuse_others
from trainer.weight_files import Tensors, read_json
from trainer.whisper import USUAL, Whisper

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperProcessor

CLASSES = ("WhisperForConditionalGeneration", "WhisperModel")
"""Of transformers, whose tensors make up a whole Whisper."""
SIZES = (
    "vocab_size",
    "num_mel_bins",
    "d_model",
    "max_source_positions",
    "max_target_positions",
    *(
        f"{half}_{part}"
        for half in ("encoder", "decoder")
        for part in ("layers", "attention_heads", "ffn_dim")
    ),
)
"""Keys that a config.json must have: a size that transformers fills in would be taken for the model's."""
RANDOM_PARTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "apply_spec_augment",
)
EXTRACTOR = {"sampling_rate": 16_000, "hop_length": 160, "n_fft": 400}
"""Of a feature extractor, and the same in every Whisper."""
NO_WEIGHTS = "holds a config, but no weights (model.safetensors): fetch them, too"


@dataclass(frozen=True)
class Pretrained:
    """A model that was examined, and can be trained and used. weights: None if it has none; remarks: what was
    completed, and what else is good to know."""

    folder: Path
    config: WhisperConfig
    tokenizer: Tokenizer
    generation: dict[str, Any]
    weights: Tensors | None
    remarks: list[str]

    def whisper(self, dtype: torch.dtype | None = None) -> Whisper:
        """The model with its weights, unless told otherwise in the precision of the file."""
        assert self.weights
        tensors = {name: self.weights[name] for name in self.weights.by_name}
        dtype = dtype or tensors[fit.EMBEDDING].dtype
        with torch.device("meta"):
            model = Whisper(self.config)
        # Those of the files themselves, as long as nothing is written into them: no copy.
        model.load_state_dict(
            # Converted from Flax, they lie transposed, which DeepSpeed does not send to the other ranks.
            {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
            strict=False,
            assign=True,
        )
        model.tie_weights()
        return model


def examine(name: str, asked: str, fetched: Path | None = None, *, needs_weights: bool = False) -> Pretrained:
    """Look over a model, and read all of its weights once.

    name: a folder, or a name on the hub; asked: the setting that names it; fetched: where the hub's model was
    put before. Raises ConfigError for what cannot be used as it is meant.
    """
    with asked_by(asked):
        folder = locate(name, fetched)
        config, weights = _weights(folder)
        of_hub = is_hub_name(name) or folder.absolute().parent.name == "snapshots"  # in its cache
        if weights is None and (needs_weights or of_hub):
            raise ConfigError(f"{folder}: {NO_WEIGHTS}")
        return _pretrained(folder, config, weights)


def examine_beside(folder: Path, asked: str) -> Pretrained:
    """Look over what lies beside a model's weights, wherever those are. Raises ConfigError."""
    with asked_by(asked):
        return _pretrained(folder, read_config(folder), None)


def _pretrained(folder: Path, config: WhisperConfig, weights: Tensors | None) -> Pretrained:
    tokenizer = vocabulary.read_tokenizer(folder, config)
    generation, remarks = vocabulary.read_generation(folder, config, tokenizer)
    if getattr(config, "forced_decoder_ids", None):
        config.forced_decoder_ids = None  # generation would obey it where it is not told a language
    remarks += _check_extractor(folder, config)
    return Pretrained(folder, config, tokenizer, generation, weights, remarks)


@contextlib.contextmanager
def asked_by(setting: str) -> Iterator[None]:
    """Let errors name the setting that asked for a model."""
    try:
        yield
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from None


def examine_weights(folder: Path) -> Tensors:
    """Look over a model of which the weights alone are wanted. Raises ConfigError."""
    _, weights = _weights(folder)
    if weights is None:
        raise ConfigError(f"{folder}: {NO_WEIGHTS}")
    return weights


def _weights(folder: Path) -> tuple[WhisperConfig, Tensors | None]:
    """The config of a folder and its weights, if it holds any."""
    refuse_dangling(folder)
    weights = weight_files.find(folder)
    refuse_adapter(folder, has_weights=weights is not None)
    if weights is None:
        _refuse_what_holds_models(folder)
        refuse_others(folder)
    config = read_config(folder)
    if weights:
        weights = fit.fitted(weights, config)
        weights.check_values()
    return config, weights


def tokenizer_of(name: str, asked: str) -> Tokenizer:
    """The tokenizer of a model of which nothing else is wanted. Raises ConfigError."""
    with asked_by(asked):
        folder = locate(name, weights=False)
        return vocabulary.read_tokenizer(folder, read_config(folder))


def read_config(folder: Path) -> WhisperConfig:
    """The config of a Whisper that is computed here. Raises ConfigError."""
    from transformers import WhisperConfig

    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(
            f"{folder}: not a model's folder: it holds no config.json. Fetch it, with the tokenizer's files,"
            " from where the weights are"
        )
    values = read_json(file)
    _check_kind(file, values)
    _check_sizes(file, values)
    try:
        config: WhisperConfig = WhisperConfig.from_dict(values)
    except Exception as error:  # huggingface_hub's, by its version
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    pad, rows = config.pad_token_id, config.vocab_size
    if pad is not None and not 0 <= pad < rows:
        raise ConfigError(f"{file}: pad_token_id={pad} is beyond vocab_size={rows}; take the model's own")
    random = [part for part in RANDOM_PARTS if getattr(config, part, 0)]
    if random:
        raise ConfigError(
            f"{file}: sets {', '.join(random)}. A step must not depend on how many ranks take it, so set them"
            " to 0 (false), as in Whisper as published"
        )
    for key, usual in USUAL.items():
        if getattr(config, key, usual) != usual:
            raise ConfigError(
                f"{file}: sets {key}={getattr(config, key)!r}; Whisper as published has {usual!r}, and"
                " nothing else is computed here. Set it so if the model was not trained otherwise"
            )
    return config


def processor(folder: str | Path, config: Any) -> WhisperProcessor:
    """The processor of a model; its feature extractor is made anew where it is missing."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    if _extractor(Path(folder)) is not None:
        whole: WhisperProcessor = WhisperProcessor.from_pretrained(folder)
        return whole
    seconds = config.max_source_positions // 50
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    return WhisperProcessor(extractor, WhisperTokenizer.from_pretrained(folder))


def _refuse_what_holds_models(folder: Path) -> None:
    """Raise ConfigError for a run, or a folder of models, in the place of a model."""
    if (folder / "config.json").exists():
        return
    if (folder / "base").is_dir() and (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder}: is a run: model.init_from takes its weights, `python -m tools.export` a model of it"
        )
    places = ("*/config.json", "snapshots/*/config.json")  # the second: in the cache of the hub
    below = [str(file.parent.relative_to(folder)) for place in places for file in folder.glob(place)]
    if below:
        raise ConfigError(
            f"{folder}: holds no config.json, but {weight_files.few(below)} does: name that folder"
        )


def _check_kind(file: Path, values: dict[str, Any]) -> None:
    classes = values.get("architectures") or [CLASSES[0]]
    classes = classes if isinstance(classes, list) else [str(classes)]
    kind = values.get("model_type", "whisper")
    if kind != "whisper" or not set(classes) & set(CLASSES):
        what = f"model_type {kind!r}" if kind != "whisper" else f"architectures {', '.join(classes)}"
        raise ConfigError(
            f"{file}: {what}: not a Whisper that writes text (WhisperForConditionalGeneration); take one, as"
            " openai/whisper-small"
        )
    if values.get("quantization_config"):
        settings = values["quantization_config"]
        method = settings.get("quant_method", "") if isinstance(settings, dict) else settings
        raise ConfigError(
            f"{file}: quantized ({method}, quantization_config), which cannot be trained: take the model in"
            " FP32, BF16 or FP16"
        )


def _check_sizes(file: Path, values: dict[str, Any]) -> None:
    wrong = [key for key in SIZES if not isinstance(values.get(key), int) or values[key] < 1]
    if wrong:
        said = ", ".join(f"{key}={values.get(key)}" for key in wrong[: weight_files.FEW])
        raise ConfigError(
            f"{file}: {said}: must be whole numbers above 0; take a Whisper's config.json of transformers"
        )
    for half in ("encoder", "decoder"):
        width, heads = values["d_model"], values[f"{half}_attention_heads"]
        if width % heads:
            raise ConfigError(f"{file}: d_model={width} is no multiple of {half}_attention_heads={heads}")


def _extractor(folder: Path) -> dict[str, Any] | None:
    """The values of a folder's feature extractor, if it is there."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            values = read_json(folder / name)
            values = values.get("feature_extractor") or values
            if "feature_size" in values:
                return values
    return None


def _check_extractor(folder: Path, config: Any) -> list[str]:
    """Remarks on a model's feature extractor. Raises ConfigError if it is of another model: an export would
    hear something else than was trained."""
    values = _extractor(folder)
    if values is None:
        return [f"{folder}: has no preprocessor_config.json: made from config.json"]
    seconds = config.max_source_positions / 50
    expected = EXTRACTOR | {"feature_size": config.num_mel_bins, "chunk_length": seconds}
    wrong = {key: value for key, value in expected.items() if values.get(key, value) != value}
    if wrong:
        said = ", ".join(f"{key}={values[key]} there, {value:g} in the model" for key, value in wrong.items())
        raise ConfigError(f"{folder}: its preprocessor_config.json is of another model: {said}")
    return []
