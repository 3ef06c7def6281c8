"""Captions: found in a sample's text member, and turned into the decoder's tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from configs.errors import ConfigError
from data.decode import BadSample, Skipped
from data.kinds import what_it_is, what_it_stands_for
from data.texts import EMPTY, bare, sound_caption

LANGUAGE, TASK = "en", "transcribe"
"""What the prompt tokens of a multilingual Whisper say; captioners are used with generate(language="en",
task="transcribe")."""
END, PROMPT = "<|endoftext|>", "<|startofprev|>"
"""Tokens that a caption ends with, and that a style begins with."""
IGNORED = -100
"""Label of positions that the loss leaves out."""
OF_OBJECTS = ("caption", "text")
"""What objects call a caption that they hold."""


class _Missing(BadSample):
    """There is nothing under a path. there: what is in its place."""

    def __init__(self, key: str, there: str) -> None:
        super().__init__(f"no caption under {key!r} ({there})")
        self.there = there


def find_captions(content: bytes, keys: Sequence[str]) -> list[str]:
    """The captions in a JSON or text member, at least one.

    keys: of `Source.caption_keys`, in order of preference: the first under which there is text counts. Raises
    BadSample.
    """
    text = _decoded(content)
    if keys[0].startswith("."):
        return [sound_caption(_plain(text))]
    document = _parsed(text)
    problems: list[BadSample] = []
    for key in keys:
        try:
            return _texts(document, key)
        except BadSample as problem:
            problems.append(problem)
    missing = [problem for problem in problems if isinstance(problem, _Missing)]
    if len(missing) == len(keys) > 1:
        raise BadSample(f"no caption under {' or '.join(map(repr, keys))} ({missing[0].there})")
    raise BadSample("; ".join(map(str, problems)))


def _decoded(content: bytes) -> str:
    """The text of a member, also as Windows programs write it: with a byte order mark, in UTF-16."""
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadSample(f"the caption's member is {what_it_is(content) or 'not UTF-8'}")
    if stand_in := what_it_stands_for(content):
        raise BadSample(f"the caption's member is {stand_in}")
    return text


def _plain(text: str) -> str:
    """A caption that is a whole member. Raises BadSample for JSON, which would be learnt with its
    brackets."""
    if text.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            raise BadSample(
                f"the caption's member is JSON, {json_type(json.loads(text))}, not text: give it the ending"
                " .json, and name the key of the caption (caption_key)"
            )
    return text


def _parsed(text: str) -> Any:
    try:
        return STRICTLY.decode(text)
    except (ValueError, RecursionError) as error:
        what = what_it_is(text.encode())
        if what.startswith("empty"):
            raise BadSample(f"the caption's member is {what}") from None
        if what.startswith("text") and not text.lstrip().startswith(("{", "[")):
            raise BadSample(f"the caption's member is {what}, not JSON") from None
        raise BadSample(f"the JSON is broken: {error}") from None


class _Twice:
    """In the place of values that differ, and have one name in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found |= {name: _Twice() for name, value in pairs if found[name] != value}
    return found


STRICTLY = json.JSONDecoder(object_pairs_hook=_object)


def _texts(document: Any, key: str) -> list[str]:
    """The captions under a dotted path; in arrays, nulls and empty texts are passed over."""
    found = _under(document, key, key)
    values = [_of_object(value) for each in found for value in (each if isinstance(each, list) else [each])]
    wrong = [value for value in values if not isinstance(value, str | None)]
    if wrong:
        advice = ""
        if isinstance(wrong[0], dict) and wrong[0]:
            advice = f" (its keys: {', '.join(wrong[0])}); name one of them, as {key}.{next(iter(wrong[0]))}"
        raise BadSample(f"the caption under {key!r} is {json_type(wrong[0])}, not text{advice}")
    captions = [sound_caption(value) for value in values if value and bare(value)]
    if not values or (None in values and not captions):
        raise BadSample(f"the caption under {key!r} is {'null' if values else 'an empty array'}")
    if not captions:
        raise BadSample(EMPTY)
    return captions


def _of_object(value: Any) -> Any:
    """The text of an object that is a caption, as `{"text": "A bell.", "start": 0}`, where it is clear which
    one that is; anything else as it is."""
    names = [name for name in OF_OBJECTS if isinstance(value, dict) and isinstance(value.get(name), str)]
    return value[names[0]] if len(names) == 1 else value


def _under(value: Any, path: str, key: str) -> list[Any]:
    """What is under a path in JSON: of an array the element of that number, or what is under it in each
    element. Raises _Missing. key: the whole path."""
    if not path:
        return [value]
    if isinstance(value, list):
        number, _, rest = path.partition(".")
        if number.isdecimal():
            if int(number) >= len(value):
                raise _Missing(key, f"the array there has {len(value)}, counted from 0")
            return _under(value[int(number)], rest, key)
        tries = [(each, path) for each in value]
    elif isinstance(value, dict):
        # Names may hold dots: the longest that is there counts.
        ends = [len(path), *(place for place in range(len(path) - 1, 0, -1) if path[place] == ".")]
        tries = [(value[path[:end]], path[end + 1 :]) for end in ends if path[:end] in value]
        if not tries:
            raise _Missing(key, f"keys there: {', '.join(value)}")
    else:
        raise _Missing(key, f"there is {json_type(value)}")
    found: list[Any] = []
    missing = _Missing(key, "the array there is empty")
    for each, rest in tries:
        try:
            found += _under(each, rest, key)
        except _Missing as problem:
            missing = problem
            continue
        if isinstance(value, dict):
            break
    if not found:
        raise missing
    return found


def json_type(value: Any) -> str:
    """What JSON calls a value that was read from it."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    names[_Twice] = "there twice with different values"
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class Tokens:
    """Decoder input and labels of one caption, equally long; labels of prompt and prefix are IGNORED."""

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    """Tokens of the caption that did not fit and were cut off."""


class CaptionEncoder:
    """Caption -> `[<|startofprev|> style] <|startoftranscript|> [<|en|> <|transcribe|>] <|notimestamps|>
    caption <|endoftext|>`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix: Sequence[int],
        *,
        positions: int,
        long_caption: Literal["truncate", "skip"],
        styles: Sequence[str | None] = (),
    ) -> None:
        """`prefix`: the tokens that generation starts from; `positions`: the decoder's (448), prompt and
        prefix included."""
        self.tokenizer, self.prefix, self.end = tokenizer, list(prefix), _id(tokenizer, END)
        self.positions, self.long_caption = positions, long_caption
        tokenizer.encode_special_tokens = True  # written in a caption, they are text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.prompts = {
            style: [_id(tokenizer, PROMPT), *self._ids(f" {style.strip()}")] if style else []
            for style in {None, *styles}
        }

        longest_prompt = max(map(len, self.prompts.values()))
        if longest_prompt + len(self.prefix) >= positions:
            raise ConfigError(
                f"data.sources: a style is longer than the {positions} positions of the decoder; say it in a"
                " few words"
            )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, caption: str, style: str | None = None) -> Tokens:
        """Raises Skipped for a caption that does not fit, where the configuration says so."""
        before = self.prompts[style] + self.prefix
        ids = self._ids(caption)
        room = self.positions - len(before)
        if len(ids) > room and self.long_caption == "skip":
            raise Skipped(f"the caption has {len(ids)} tokens, there is room for {room}")
        sequence = [*before, *ids[:room], self.end]
        labels = [IGNORED] * (len(before) - 1) + sequence[len(before) :]
        return Tokens(sequence[:-1], labels, cut=max(0, len(ids) - room))


def _id(tokenizer: Tokenizer, token: str) -> int:
    """Raises ConfigError if there is no such token."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(f"the tokenizer of the model knows no {token}: it is none of a Whisper")
    return number


def prefix_tokens(tokenizer: Tokenizer, generation_config: dict[str, Any]) -> list[int]:
    """The tokens that `generate(language="en", task="transcribe")` starts from: start, for a multilingual
    model language and task, no time stamps."""
    names = ["<|notimestamps|>"]
    if generation_config.get("is_multilingual"):
        names = [f"<|{LANGUAGE}|>", f"<|{TASK}|>", *names]
    known = [tokenizer.token_to_id(name) for name in names]
    return [generation_config["decoder_start_token_id"], *(token for token in known if token is not None)]
