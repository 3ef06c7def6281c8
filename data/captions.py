"""Captions: found in a sample's text member, and turned into the decoder's tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from configs.errors import ConfigError
from data.decode import BadSample, Skipped

LANGUAGE, TASK = "en", "transcribe"
"""What the prompt tokens of a multilingual Whisper say; captioners are used with generate(language="en",
task="transcribe")."""
END, PROMPT = "<|endoftext|>", "<|startofprev|>"
"""Tokens that a caption ends with, and that a style begins with."""
IGNORED = -100
"""Label of positions that the loss leaves out."""


def find_caption(content: bytes, caption_key: str) -> str:
    """The caption in a JSON or text member. `caption_key`: a dotted path, or an ending as `.txt`. Raises
    BadSample."""
    try:
        text = content.decode()
        caption: Any = text if caption_key.startswith(".") else json.loads(text)
    except UnicodeDecodeError:
        raise BadSample("the caption's member is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the JSON is broken: {error}") from None
    if not caption_key.startswith("."):
        for part in caption_key.split("."):
            if not isinstance(caption, dict):
                raise BadSample(f"no caption under {caption_key!r} (there is {type(caption).__name__})")
            if part not in caption:
                keys = ", ".join(map(str, caption))
                raise BadSample(f"no caption under {caption_key!r} (keys there: {keys})")
            caption = caption[part]
    if not isinstance(caption, str):
        raise BadSample(f"the caption under {caption_key!r} is {type(caption).__name__}, not text")
    if not caption.strip():
        raise BadSample("the caption is empty")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise BadSample("the caption holds half a character (a lone surrogate)")
    return caption.strip()


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
