"""What is compared when captions are scored: words, the same way for everybody."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from configs.run.predictions import Prediction

CONTRACTED = "(?:s|re|ve|ll|d|m)"
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
"""Letters of scripts that write no blanks between words: each, with its marks, is a word of its own."""
LETTER = rf"(?:(?!{UNSPACED})\w)"
WORD = regex.compile(  # whose \w has the marks above and below letters, as Hindi writes its vowels
    rf"(?=\w){UNSPACED}\p{{M}}*"
    rf"|{LETTER}+?(?=n't\b)|n't\b|'{CONTRACTED}\b"  # is n't, dog 's
    rf"|{LETTER}+(?:(?!'{CONTRACTED}\b)[-'.,:/]{LETTER}+)*"  # close-by, o'clock, 3.5, and/or
)
NO_WORD = "\N{REPLACEMENT CHARACTER}"
"""What a reference without a word is taken for; no caption has it. Metrics divide by a reference's length."""


def words_of(text: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation.

    Nearly those of the Penn Treebank's tokenizer, which is the custom of the field and needs Java
    (docs/evaluation.md says how nearly).
    """
    words: list[str] = WORD.findall(
        unicodedata.normalize("NFC", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    return words


@dataclass(frozen=True)
class Said:
    """A prediction as it is compared. caption, references: words with a blank between; a caption may have
    none."""

    prediction: Prediction
    caption: str
    references: list[str]

    @classmethod
    def of(cls, prediction: Prediction) -> Said:
        """A prediction's words."""
        caption, *references = (
            " ".join(words_of(text)) for text in (prediction.caption, *prediction.references)
        )
        return cls(prediction, caption, [reference or NO_WORD for reference in references])


@dataclass(frozen=True)
class Figures:
    """Values of a metric. mean: of all clips together, which need not be the mean of each; each: by clip,
    empty where a clip alone has none."""

    mean: float
    each: Sequence[float] = ()

    @classmethod
    def averaged(cls, each: Sequence[float]) -> Figures:
        """Those of a metric that is a mean over clips."""
        return cls(sum(each) / len(each), each)


Metric = Callable[[Sequence[Said]], Figures | None]
"""Values for some clips, at least one; None where there is none for so few."""
