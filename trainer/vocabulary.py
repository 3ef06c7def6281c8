"""A model's tokenizer and the values of its generation config: whether they are of one model, and what can
be completed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.errors import ConfigError
from data.captions import END, LANGUAGE, TASK
from data.kinds import what_it_stands_for
from trainer.weight_files import few, read_json

START, NO_TIMESTAMPS = "<|startoftranscript|>", "<|notimestamps|>"
ENGLISH_END = 50_256
"""Id of the end in the vocabulary of English-only Whispers (GPT-2's). It has the tokens of languages, too."""
PUBLISHED = {51_864: 50_362, 51_865: 50_363, 51_866: 50_364}
"""Rows of the embedding of published Whispers, and the id of <|notimestamps|> in the tokenizer of each."""
LANGUAGES = re.compile(r"<\|[a-z]{2,3}\|>")
TASKS = ("transcribe", "translate")
BANS = ("suppress_tokens", "begin_suppress_tokens")
CHECKED = ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id", "is_multilingual")
"""What a generation config must say as the tokenizer does, if it says it."""
KINDS = {
    **dict.fromkeys(BANS, list),
    **dict.fromkeys(("lang_to_id", "task_to_id"), dict),
    **dict.fromkeys(("max_length", "max_new_tokens"), int),
}
"""Types of values."""
SAMPLING: dict[str, object] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
BEAMS: dict[str, object] = {"early_stopping": False, "length_penalty": 1.0}
"""What captions are not generated with, the second without num_beams, and the values that ask for nothing.
transformers does not save a config with others."""
SPOKEN = {"language": LANGUAGE, "task": TASK}
"""Of a multilingual model: what captions are asked for with."""
OTHER = "it is of another model: take tokenizer, config.json and weights of one and the same model"
OTHERWISE = f"{OTHER}, or remove this file: what it must say is then taken from the others"
"""Of a generation config."""


def read_tokenizer(folder: Path, config: Any) -> Tokenizer:
    """The tokenizer of a folder. Raises ConfigError if it is missing or not the model's."""
    from transformers import WhisperTokenizer

    files = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ConfigError(
            f"{folder}: its tokenizer is missing (tokenizer.json, or vocab.json and merges.txt): copy it from"
            " the model that this one was made from"
        )
    for file in (*files, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        if file.endswith(".json") and (folder / file).exists():
            read_json(folder / file)
    if "merges.txt" in files:
        _check_merges(folder)
    try:
        tokenizer: Tokenizer = WhisperTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers has no class of its own
        beside = [*files, *(["tokenizer_config.json"] if (folder / "tokenizer_config.json").exists() else [])]
        raise ConfigError(
            f"{folder}: its tokenizer ({', '.join(beside)}) cannot be read: {error}; fetch it again"
        ) from None
    _check_tokenizer(folder / files[0], tokenizer, config)
    return tokenizer


def _check_merges(folder: Path) -> None:
    """Raise ConfigError if merges do not make up the tokens: captions would be taken apart into bytes."""
    file = folder / "merges.txt"
    content = file.read_bytes()
    if what := what_it_stands_for(content):
        raise ConfigError(f"{file}: is {what}; fetch it again")
    made = {"".join(line.split()) for line in content.decode("utf-8", "replace").split("\n")}
    vocab = read_json(folder / "vocab.json")
    tokens = [token for token in vocab if len(token) > 1 and not token.startswith("<|")]
    unmade = [token for token in tokens if token not in made]
    if len(unmade) > len(tokens) // 100:  # some are added without merges
        raise ConfigError(
            f"{file}: is cut off or of another model: {len(unmade)} of the {len(tokens)} tokens in vocab.json"
            " are not made by it; fetch both again"
        )


def _check_tokenizer(file: Path, tokenizer: Tokenizer, config: Any) -> None:
    ids = tokenizer.get_vocab()
    missing = [token for token in (START, END, NO_TIMESTAMPS) if token not in ids]
    if missing:
        raise ConfigError(
            f"{file}: has no {', '.join(missing)}: it is none of a Whisper's, or added_tokens.json is missing"
        )
    rows = config.vocab_size
    beyond = [token for token, number in ids.items() if number >= rows]
    if beyond:
        raise ConfigError(
            f"{file}: {few(beyond)}: have no row in the embedding (vocab_size={rows}, the tokenizer needs"
            f" {max(ids.values()) + 1}): {OTHER}. If you added tokens, save the model after"
            " resize_token_embeddings"
        )
    expected = {START: config.decoder_start_token_id, END: config.eos_token_id}
    # Tokens that fill all rows are of this embedding: with one added, it has the rows of the next Whisper.
    if rows in PUBLISHED and max(ids.values()) + 1 < rows and len(ids) > min(PUBLISHED.values()) - 1000:
        expected[NO_TIMESTAMPS] = PUBLISHED[rows]
    for token, number in expected.items():
        if ids[token] != number:
            raise ConfigError(
                f"{file}: {token} is {ids[token]}, the model's is {number} (config.json): {OTHER}"
            )


def read_generation(folder: Path, config: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """The values of a folder's generation config, and what was completed or left out in them, as remarks. The
    tokenizer and the config say what is missing. Raises ConfigError if they contradict it."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    given = read_json(file) if file.exists() else {key: getattr(config, key) for key in BANS}
    if forced := getattr(config, "forced_decoder_ids", None):
        given.setdefault("forced_decoder_ids", forced)
    certain = _certain(config, tokenizer)
    try:
        values, remarks = _completed(file, given, certain, config.vocab_size)
        generation = GenerationConfig.from_dict(values)
        generation.validate(strict=True)
    except (ValueError, TypeError) as error:  # transformers would not save it
        words = " ".join(str(error).split())
        raise ConfigError(f"{file}: {words}; mend it, or remove this file: it is made anew") from None
    return dict(generation.to_dict()), [f"{file}: {'; '.join(remarks)}"] if remarks else []


def _completed(
    file: Path, given: dict[str, Any], certain: dict[str, Any], rows: int
) -> tuple[dict[str, Any], list[str]]:
    """The values of a generation config in which nothing is missing or does not fit, and what was done."""
    _check_generation(file, given, certain, rows)
    replaced = _unfit(given, certain)
    missing = {key: value for key, value in certain.items() if given.get(key) is None}
    if certain["is_multilingual"] and f"<|{LANGUAGE}|>" not in (given.get("lang_to_id") or {}):
        missing["lang_to_id"] = {**certain["lang_to_id"], **(given.get("lang_to_id") or {})}
    if given.get("max_new_tokens") and "max_new_tokens" not in replaced:
        missing.pop("max_length", None)
    values = {**given, **missing, **replaced}
    if certain["is_multilingual"]:
        values |= SPOKEN
    remarks = []
    if missing:
        remarks.append(f"completed from tokenizer and config.json: {', '.join(missing)}")
    if replaced:
        changes = (f"{key}={given[key]!r} is now {value!r}" for key, value in replaced.items())
        remarks.append(f"{', '.join(changes)}: so captions are trained")
    return values, remarks


def _certain(config: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a generation config must say, by key."""
    ids: dict[str, int] = tokenizer.get_vocab()
    spoken = {f"<|{LANGUAGE}|>", f"<|{TASK}|>"}
    certain: dict[str, Any] = {
        "decoder_start_token_id": ids[START],
        "eos_token_id": ids[END],
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "no_timestamps_token_id": ids[NO_TIMESTAMPS],
        "is_multilingual": ids[END] != ENGLISH_END and spoken <= ids.keys(),
        "max_length": config.max_target_positions,
    }
    if certain["is_multilingual"]:
        certain["lang_to_id"] = {token: ids[token] for token in sorted(ids) if LANGUAGES.fullmatch(token)}
        certain["task_to_id"] = {task: ids[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in ids}
    return certain


def _check_generation(file: Path, given: dict[str, Any], certain: dict[str, Any], rows: int) -> None:
    """Raise ConfigError for what is given, and contradicts the tokenizer or the embedding."""
    for key, kind in KINDS.items():
        if not isinstance(given.get(key), kind | None):
            raise ConfigError(f"{file}: {key}={given[key]!r}: must be {kind.__name__}: {OTHERWISE}")
    for key in CHECKED:
        there, here = given.get(key), certain[key]
        if there not in (None, here, [here]):
            raise ConfigError(
                f"{file}: {key}={there!r}, by tokenizer and config.json it is {here!r}: {OTHERWISE}"
            )
    for key in ("lang_to_id", "task_to_id"):
        there, here = given.get(key) or {}, certain.get(key, {})
        wrong = [name for name, number in there.items() if here.get(name, number) != number]
        if wrong:
            raise ConfigError(f"{file}: {key}: {few(wrong)}: another token than the tokenizer's: {OTHERWISE}")
    for key in (*BANS, "lang_to_id", "task_to_id"):
        ids = given.get(key) or []
        beyond = [
            str(number)
            for number in (ids.values() if isinstance(ids, dict) else ids)
            if not isinstance(number, int) or not 0 <= number < rows
        ]
        if beyond:
            raise ConfigError(f"{file}: {key}: {few(beyond)}: beyond vocab_size={rows}: {OTHERWISE}")


def _unfit(given: dict[str, Any], certain: dict[str, Any]) -> dict[str, Any]:
    """What is given, and captions are not trained so, or do not fit the decoder: what it is replaced by."""
    positions, prefix = certain["max_length"], 4 if certain["is_multilingual"] else 2
    unfit: dict[str, Any] = {}
    if (given.get("max_length") or 0) > positions:
        unfit["max_length"] = positions
    if (given.get("max_new_tokens") or 0) > positions - prefix:
        unfit["max_new_tokens"] = None
    if given.get("return_timestamps"):
        unfit["return_timestamps"] = False
    if given.get("forced_decoder_ids"):
        unfit["forced_decoder_ids"] = None
    idle = SAMPLING if (given.get("num_beams") or 1) > 1 else SAMPLING | BEAMS
    unfit |= {key: None for key, nothing in idle.items() if given.get(key) not in (None, nothing)}
    for key, ours in SPOKEN.items():
        theirs = given.get(key)
        if theirs and not certain["is_multilingual"]:
            unfit[key] = None
        elif theirs and theirs not in (ours, f"<|{ours}|>", "english"):
            unfit[key] = ours
    return unfit
