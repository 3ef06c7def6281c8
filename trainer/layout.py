"""TensorBoard's first look, on its page Custom Scalars: what belongs together, in one chart each."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

Chart = list[Sequence[str]]
AGAINST_REFERENCES = ("cider_d", "meteor", "rouge_l", "bleu_4", "bleu_1", "sbert_sim")
CHARTS: dict[str, dict[str, list[str]]] = {
    "loss": {
        "training and validation": ["loss", "validation/loss", "validation/loss_own"],
        "training, by source": ["loss/.+"],
        "validation, by source": ["validation/loss/.+"],
        "validation at own lengths, by source": ["validation/loss_own/.+"],
    },
    "captions": {
        "against what people said": [f"validation/({'|'.join(AGAINST_REFERENCES)})"],
        "CIDEr-D, by source": ["validation/cider_d/.+"],
        "ROUGE-L, by source": ["validation/rouge_l/.+"],
        "word for word": ["validation/exact_match(/.+)?"],
    },
    "listening": {
        "discrimination": ["validation/discrimination(/.+)?"],
        "loops, and captions without a word": ["validation/(repetition|empty)_rate"],
        "words for silence and for noise": ["validation/(silence|noise)_words"],
        "loops for silence and for noise": ["validation/(silence|noise)_repetition_rate"],
        "length against the reference": ["validation/length_ratio(/.+)?"],
        "distinct words and pairs": ["validation/distinct_[12]"],
    },
    "speed": {
        "samples per second": ["speed/samples_per_second"],
        "seconds of a step": ["step_seconds/.+"],
        "share of the peak (MFU)": ["speed/(useful_)?mfu"],
        "waiting for data": ["speed/data_wait_share"],
    },
    "goodput": {
        "where the time went": ["goodput/.+"],
        "attempt": ["attempt"],
    },
}
"""Curves by section and title of their chart, as expressions that match the whole name."""


def layout(names: Collection[str]) -> dict[str, dict[str, Chart]]:
    """The charts that have a curve, as TensorBoard wants them. names: of the curves."""
    sections = {
        section: {
            title: ["Multiline", [f"^{pattern}$" for pattern in patterns]]
            for title, patterns in charts.items()
            if any(re.fullmatch(pattern, name) for pattern in patterns for name in names)
        }
        for section, charts in CHARTS.items()
    }
    return {section: charts for section, charts in sections.items() if charts}
