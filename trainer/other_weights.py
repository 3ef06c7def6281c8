"""Weights in forms that are not read: what each is, and what to do. Nothing starts at random where any of
them lies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from configs.errors import ConfigError
from trainer.weight_files import few, read_json

DEPTH = 3
"""Folders one below the other that are looked into: `checkpoint-500/`, `.cache/huggingface/download/`."""
LARGE = 1 << 20
"""Bytes from which on a file is taken for weights, whatever its name."""
TEXTS = {".json", ".jsonl", ".txt", ".md", ".py", ".yaml", ".yml", ".csv", ".log"}
SAVE = "load it in the program that wrote it, and save the model with save_pretrained"
MERGE = (
    "merge it with peft:"
    " `PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER)`, and copy the"
    " tokenizer's files there"
)
BY_OLDER = (
    "transformers 4 converts them:"
    " `WhisperForConditionalGeneration.from_pretrained(FOLDER, {}=True).save_pretrained(NEW)`"
)
TO_RUN = "made to be run, not to be trained; take the model that it was made from"
FORMS = (
    (r"(^|/)\._", "what macOS keeps beside a file, not the file itself: copy that, too"),
    (r"/(pytorch_)?model\.(safetensors|bin)(\.index\.json)?$", "weights in a folder below: name that one"),
    (r"\.(incomplete|part|partial|crdownload|tmp|aria2)$", "a download that was broken off: fetch it again"),
    (
        r"(^|/)((optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|training_args\.bin)$",
        "what a Trainer keeps beside the weights; copy those, too (model.safetensors)",
    ),
    (r"(^|/)adapter", f"an adapter of PEFT, no model: {MERGE}"),
    (r"\.distcp$", f"a distributed checkpoint of PyTorch: {SAVE}"),
    (r"(model|optim)_states\.pt$", f"a checkpoint of DeepSpeed: {SAVE}"),
    (r"\.(h5|keras)$", f"weights of TensorFlow; {BY_OLDER.format('from_tf')}"),
    (r"\.msgpack$", f"weights of Flax; {BY_OLDER.format('from_flax')}"),
    (r"\.ckpt(\.|$)", f"a checkpoint of Lightning or TensorFlow: {SAVE}"),
    (r"\.(gguf|ggml)$|(^|/)ggml-.*\.bin$", f"a model of whisper.cpp, {TO_RUN}"),
    (r"\.(onnx|ort)([._]data)?$", f"a model of ONNX, {TO_RUN}"),
    (
        r"(^|/)openvino_.*\.bin$|\.(tflite|engine|plan|mlmodel)$|\.ml(package|modelc)/",
        f"a compiled model, {TO_RUN}",
    ),
    (r"\.npz$|(^|/)weights\.safetensors$", f"weights of MLX, {TO_RUN}"),
    (r"(^|/)model\.bin$", f"a model of CTranslate2 (faster-whisper), {TO_RUN}"),
    (
        r"\.pth?$",
        "weights as OpenAI's whisper or another program keeps them. OpenAI's own are on the hub as"
        " openai/whisper-SIZE; others are converted by transformers 4: `python -m"
        " transformers.models.whisper.convert_openai_to_hf --checkpoint_path FILE --pytorch_dump_folder_path"
        " NEW`",
    ),
    (
        r"-\d+-of-\d+\.(safetensors|bin)$",
        "parts of a model without their index (as model.safetensors.index.json): fetch that, too",
    ),
    (
        r"\.safetensors",
        "if this is the whole model, rename it to model.safetensors",
    ),
    (r"\.bin(\.|$)", "if this is the whole model, rename it to pytorch_model.bin"),
    (r"\.(pkl|pickle|pdparams|params|npy|nemo|mar|pack)$", f"weights in a form that is not read: {SAVE}"),
    (r"\.(zip|tar|t?gz|zst|xz|7z)$", "an archive: unpack it"),
)
"""By what a path holds, what that is, and what to do. The first counts."""


def refuse_adapter(folder: Path, *, has_weights: bool) -> None:
    """Raise ConfigError if a folder holds an adapter of PEFT."""
    file = folder / "adapter_config.json"
    if not file.exists():
        return
    base = read_json(file).get("base_model_name_or_path")
    advice = f"{MERGE} (MODEL: {base})" if base else MERGE
    if has_weights:
        advice = f"if the weights beside it have it in them already, remove {file.name}; if not, {advice}"
    raise ConfigError(f"{file}: an adapter of PEFT, no model: {advice}")


def refuse_others(folder: Path) -> None:
    """Raise ConfigError if a folder holds weights in a form that is not read."""
    refuse(str(folder), {str(file.relative_to(folder)): _what(file, folder) for file in _files(folder)})


def refuse_dangling(folder: Path) -> None:
    """Raise ConfigError for a link to a file beside the weights that is gone: what it had said would be made
    up from the others, or asked for as if it had never been fetched."""
    gone = [file for file in folder.iterdir() if file.suffix in (".json", ".txt") and not file.exists()]
    if gone:
        raise ConfigError(
            f"{folder}: {few(file.name for file in gone)}: a link whose file is gone ({gone[0].readlink()}):"
            " fetch it again"
        )


def form(path: str) -> str:
    """What weights at this path of a model's folder are, and what to do; "" if none are called so."""
    return next((words for pattern, words in FORMS if re.search(pattern, path, re.IGNORECASE)), "")


def refuse(where: str, forms: Mapping[str, str]) -> None:
    """Raise ConfigError for the files that are weights. forms: what each is, by its path; "" for others."""
    found = [path for path, words in forms.items() if words]
    if not found:
        return
    first = min(found, key=lambda path: (path.count("/"), path))
    alike = few(path for path in found if forms[path] == forms[first])
    raise ConfigError(
        f"{where}: holds no weights that are read (model.safetensors, pytorch_model.bin), but {alike}:"
        f" {forms[first]}"
    )


def _files(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    for place in sorted(folder.iterdir()):
        if not place.is_dir():
            yield place
        elif depth and place.name != ".git":
            yield from _files(place, depth - 1)


def _what(file: Path, folder: Path) -> str:
    words = form(str(file.relative_to(folder)))
    if not file.exists():
        return f"a link whose file is gone ({file.readlink()}): fetch it again" if words else ""
    if not words and file.suffix.lower() not in TEXTS and file.stat().st_size >= LARGE:
        return "large, and nothing that is known. Move it elsewhere if it is no model"
    return words
