"""The metrics of captions, by name: what they are, and which way is better."""

from __future__ import annotations

HIGHER_IS_BETTER = {
    "cider_d": True,
    "bleu_1": True,
    "bleu_4": True,
    "rouge_l": True,
    "exact_match": True,
    "length_ratio": None,
    "distinct_1": True,
    "distinct_2": True,
    "repetition_rate": False,
    "empty_rate": False,
    "discrimination": True,
    "meteor": True,
    "spice": True,
    "spider": True,
    "fense": True,
    "clap": True,
}
"""By name; None where there is a right value (1), and neither more nor less is better."""
