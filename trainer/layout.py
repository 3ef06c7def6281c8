"""TensorBoard's first look, on its page Custom Scalars: what belongs together, in one chart each."""

from __future__ import annotations

AGAINST_REFERENCES = ("cider_d", "spider", "spice", "meteor", "rouge_l", "bleu_4", "bleu_1", "fense", "clap")


def _lines(*tags: str) -> list[str | list[str]]:
    """A chart of all curves whose names are like one of these."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]


LAYOUT = {
    "loss": {
        "training and validation": _lines("loss", "validation/loss", "validation/loss_own"),
        "training, by source": _lines("loss/.+"),
        "validation, by source": _lines("validation/loss/.+"),
    },
    "captions": {
        "against what people said": _lines(f"validation/({'|'.join(AGAINST_REFERENCES)})"),
        "CIDEr-D, by source": _lines("validation/cider_d/.+"),
        "ROUGE-L, by source": _lines("validation/rouge_l/.+"),
        "word for word, by source": _lines("validation/exact_match/.+"),
    },
    "listening": {
        "discrimination": _lines("validation/discrimination(/.+)?"),
        "loops and silence": _lines("validation/(repetition|empty)_rate"),
        "length against the reference": _lines("validation/length_ratio(/.+)?"),
        "distinct words and pairs": _lines("validation/distinct_[12]"),
    },
    "speed": {
        "samples per second": _lines("speed/samples_per_second"),
        "seconds of a step": _lines("step_seconds/.+"),
        "share of the peak (MFU)": _lines("speed/(useful_)?mfu"),
        "waiting for data": _lines("speed/data_wait_share"),
    },
    "goodput": {
        "where the time went": _lines("goodput/.+"),
        "attempt": _lines("attempt"),
    },
}
"""Charts by section and title. One without a curve stays empty."""
