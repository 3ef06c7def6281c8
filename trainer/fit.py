"""Whether the tensors of a file are those of a config, and if not, what they look like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from configs.errors import ConfigError
from trainer.weight_files import Tensors, few
from trainer.whisper import Whisper

OUTPUT, EMBEDDING = "proj_out.weight", "model.decoder.embed_tokens.weight"
"""One tensor, which files hold under the second name, or under both."""
RENAME = "docs/models.md has the line that renames them"
WRAPPERS = {
    "module.": f"as DataParallel and DDP write them: {RENAME}, or save `model.module` with save_pretrained",
    "_orig_mod.": f"as torch.compile writes them: {RENAME}, or save `model._orig_mod` with save_pretrained",
    "_fsdp_wrapped_module.": f"as FSDP writes them: {RENAME}",
    "_checkpoint_wrapped_module.": f"as checkpointing of activations writes them: {RENAME}",
}
"""What wrappers put into names, and what to do."""
LOOKS: tuple[tuple[str, str], ...] = (
    (
        r"lora_|\.base_layer\.|ia3_|modules_to_save",
        "of PEFT, not merged: `model.merge_and_unload().save_pretrained(FOLDER)`",
    ),
    (
        r"(encoder|decoder)\.blocks\.\d",
        "of OpenAI's whisper: take openai/whisper-SIZE of the hub, or convert it (transformers 4:"
        " transformers.models.whisper.convert_openai_to_hf)",
    ),
    (
        r"\.(SCB|absmax|qweight|qzeros|scales|weight_scale|weight_format|quant_map)\b",
        "quantized: take the model in FP32, BF16 or FP16",
    ),
    (r"(^|\.)(classifier|projector)\.", "a classifier's: take the Whisper that it was made from"),
)
"""By what names hold, what their model is, and what to do."""
SHOWN_BY = {
    "model.encoder.conv1.weight": (1, "num_mel_bins"),
    "model.encoder.embed_positions.weight": (0, "max_source_positions"),
    "model.decoder.embed_positions.weight": (0, "max_target_positions"),
    EMBEDDING: (0, "vocab_size"),
    "model.encoder.layer_norm.weight": (0, "d_model"),
    "model.encoder.layers.0.fc1.weight": (0, "encoder_ffn_dim"),
    "model.decoder.layers.0.fc1.weight": (0, "decoder_ffn_dim"),
}
"""Sizes of the config by the tensors that show them: in which dimension, and the key."""
SAME_MODEL = "Take config.json and weights of one and the same model"
LAYER_TENSORS = {"encoder": 15, "decoder": 24}
"""Of a block."""


def shapes_of(config: Any) -> dict[str, list[int]]:
    """Those of the tensors of a config's Whisper, by name, without the output layer: it is the embedding."""
    with torch.device("meta"):
        model = Whisper(config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def fitted(weights: Tensors, config: Any) -> Tensors:
    """The same weights under the names that the model has. Raises ConfigError if they are not those of the
    config, one for one, or have an output layer of their own."""
    expected = shapes_of(config)
    if not any(name.startswith("model.") for name in weights.by_name):
        prefixed = weights.prefixed("model.")
        if expected.keys() <= prefixed.by_name.keys():  # saved as a WhisperModel
            weights = prefixed
    _check_names(weights, expected, config)
    _check_shapes(weights, expected, config)
    _check_tying(weights)
    return replace(weights, by_name={name: weights.by_name[name] for name in expected})


def _check_names(weights: Tensors, expected: Mapping[str, list[int]], config: Any) -> None:
    missing = expected.keys() - weights.by_name.keys()
    unexpected = weights.by_name.keys() - expected.keys() - {OUTPUT}
    if not missing and not unexpected:
        return
    said = [
        f"{len(names)} {what} ({few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise ConfigError(
        f"{weights.path}: of the {len(expected)} tensors by config.json, {', '.join(said)}:"
        f" {_look(missing, unexpected, expected, config)}"
    )


def _look(missing: set[str], unexpected: set[str], expected: Mapping[str, Any], config: Any) -> str:
    """What tensors look like that are not those of a config, and what to do."""
    for pattern, words in LOOKS:
        if any(re.search(pattern, name) for name in unexpected):
            return f"they are {words}"
    for part, words in WRAPPERS.items():
        if unexpected and all(name.replace(part, "") in expected for name in unexpected):
            return f"the names hold `{part}`, {words}"
    if prefix := _common_prefix(unexpected, expected):
        return f"all names begin with `{prefix}`, which a program put before them: {RENAME}"
    if layers := _other_layers(missing, unexpected, config):
        return f"{layers}. {SAME_MODEL}"
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if missing == {name for name in expected if name.startswith(f"model.{half}.")}:
            return f"it is the {other} alone: take the whole Whisper"
    return "the file was not wholly written, or is of another model: fetch it again, with its config.json"


def _common_prefix(names: set[str], expected: Mapping[str, Any]) -> str:
    """What stands before all names that are the model's otherwise; "" if it is not the same."""
    first = min(names, default="")
    dots = [place + 1 for place, letter in enumerate(first) if letter == "."]
    for dot in dots:
        prefix = first[:dot]
        if all(
            name.startswith(prefix) and name.removeprefix(prefix) in {*expected, OUTPUT} for name in names
        ):
            return prefix
    return ""


def _other_layers(missing: set[str], unexpected: set[str], config: Any) -> str:
    """Which layers there are, if the file has others than the config, and nothing else differs."""
    if missing and unexpected:
        return ""
    for half in ("encoder", "decoder"):
        layer = re.compile(rf"model\.{half}\.layers\.(\d+)\.")
        numbers = [int(found[1]) for name in missing | unexpected if (found := layer.match(name))]
        asked = getattr(config, f"{half}_layers")
        whole = LAYER_TENSORS[half] * len(set(numbers))
        if len(numbers) < len(missing | unexpected) or len(numbers) != whole:
            continue
        there = set(range(asked)) ^ set(numbers)
        return f"the file has {half} layers {_spans(there) or 'none'}, config.json says {half}_layers={asked}"
    return ""


def _spans(numbers: set[int]) -> str:
    """Numbers as people write them: 0-2, 5."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ", ".join(
        f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)
    )


def _check_shapes(weights: Tensors, expected: Mapping[str, list[int]], config: Any) -> None:
    shapes = weights.shapes
    others = {name: shape for name, shape in expected.items() if shapes[name] != shape}
    if not others:
        return
    keys = [
        f"{key} is {getattr(config, key)} there, {shapes[name][axis]} in the file"
        for name, (axis, key) in SHOWN_BY.items()
        if name in others and shapes[name][axis : axis + 1] != others[name][axis : axis + 1]
    ]
    first = min(others)
    raise ConfigError(
        f"{weights.path}: {len(others)} of its {len(expected)} tensors have another shape than config.json"
        f" says: {', '.join(keys) or f'{first} has {shapes[first]}, not {others[first]}'}. {SAME_MODEL}"
    )


def _check_tying(weights: Tensors) -> None:
    """Refuse an output layer that is not the embedding: it would be replaced by it in silence."""
    if OUTPUT not in weights.by_name or torch.equal(weights[OUTPUT].float(), weights[EMBEDDING].float()):
        return
    raise ConfigError(
        f"{weights.path}: {OUTPUT} differs from {EMBEDDING}. Here they are one tensor, as in Whisper as"
        f" published, and what was trained in {OUTPUT} would be lost: take a model whose output layer is tied"
    )
