"""Figures of captions are those of the field, and each fault of a captioner stands out in the figure made for
it."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.metrics import HIGHER_IS_BETTER, is_higher_better
from configs.run.predictions import Prediction, Sound
from trainer import parts
from trainer.said import words_of
from trainer.scores import score

SOUND = Sound("shards/sounds-000000.tar", 512, 1024, "flac")


def prediction(caption: str, *references: str, source: str = "sounds") -> Prediction:
    return Prediction(f"{source}/a.tar/0", source, 1.0, list(references), caption, 0.5, SOUND)


PUBLISHED = [
    prediction("A dog barks loudly, and then stops.", "A dog is barking.", "A dog barks loudly near by."),
    prediction("Rain falls on a tin roof.", "Rain is falling on a metal roof."),
    prediction(
        "A man speaks while a crowd cheers!",
        "A man is speaking, and people cheer.",
        "A crowd cheers as a man speaks.",
        "Someone talks.",
    ),
    prediction("", "A bell rings three times."),
    prediction("Tek tek tek tek tek tek tek tek", "A low drum loop plays."),
]
OF_LIBRARY = {
    "cider_d": (1.3205085, [2.8283158, 1.9147696, 1.8594571, 0, 0]),
    "bleu_1": (0.4655314, [0.5714286, 0.5643211, 0.8571429, 0, 0]),
    "bleu_4": (0.1989155, [0.4111336, 0, 8.69e-05, 0, 0]),
    "rouge_l": (0.3319155, [0.6240409, 0.6069652, 0.4285714, 0, 0]),
}
"""What `aac_metrics.functional` of aac-metrics 0.6.0, imported whole, gave of the words of PUBLISHED."""


def test_metrics_of_the_field_are_those_of_the_whole_library() -> None:
    scored = score(PUBLISHED)
    for name, (of_all, of_each) in OF_LIBRARY.items():
        assert scored.means[name] == pytest.approx(of_all, abs=1e-5)
        assert [clip.scores[name] for clip in scored.predictions] == pytest.approx(of_each, abs=1e-5)


def test_the_library_is_imported_without_the_packages_that_break_beside_another_torch() -> None:
    score(PUBLISHED, ["cider_d"])
    assert not {"aac_metrics", "aac_metrics.functional", "msclap", "torchaudio"} & sys.modules.keys()


SANE = [
    prediction(caption, caption, f"In a recording, {caption.lower()}", source=source)
    for source, caption in [
        ("sounds", "A dog barks twice in the distance."),
        ("sounds", "Rain falls on the roof of a car."),
        ("sounds", "A door creaks open, then slams shut."),
        ("sounds", "Children laugh and shout at a playground."),
        ("music", "A slow piano melody in a minor key."),
        ("music", "Fast drums drive a distorted guitar riff."),
        ("music", "A soft synthesizer pad with a deep bass."),
        ("music", "An old folk song, sung with a banjo."),
    ]
]


def shuffled(captions: list[str]) -> list[str]:
    """Each caption is of another clip."""
    return captions[3:] + captions[:3]


FAULTS = {
    "loops": lambda captions: ["tek " * 100 for _ in captions],
    "loops without blanks": lambda captions: ["hahaha" * 100 for _ in captions],
    "loops over a phrase": lambda captions: [f"{caption} " * 9 for caption in captions],
    "says the same of all": lambda captions: [captions[0] for _ in captions],
    "says nothing": lambda captions: [" ... " for _ in captions],
    "ignores the audio": shuffled,
    "goes on for too long": lambda captions: [" ".join(captions[i:] + captions[:i]) for i in range(8)],
}
STANDS_OUT = [  # fault, metric, value for sane captions, least and most for the faulty ones
    ("loops", "repetition_rate", 0, 0.98, 1),
    ("loops without blanks", "repetition_rate", 0, 0.8, 1),
    ("loops over a phrase", "repetition_rate", 0, 0.85, 1),
    ("says the same of all", "distinct_1", 41 / 57, 0, 0.15),
    ("says the same of all", "distinct_2", 1, 0, 0.15),
    ("says nothing", "empty_rate", 0, 1, 1),
    ("says nothing", "length_ratio", 57 / 69, 0, 0),
    ("ignores the audio", "exact_match", 1, 0, 0),
    ("ignores the audio", "cider_d", 9.0, 0, 0.5),
    ("ignores the audio", "bleu_4", 1, 0, 0.1),
    ("ignores the audio", "rouge_l", 1, 0, 0.3),
    ("goes on for too long", "length_ratio", 57 / 69, 6, 8),
]


@pytest.mark.parametrize(("fault", "metric", "sane", "least", "most"), STANDS_OUT)
def test_each_fault_stands_out_in_its_figure(
    fault: str, metric: str, sane: float, least: float, most: float
) -> None:
    captions = FAULTS[fault]([clip.caption for clip in SANE])
    faulty = [replace(clip, caption=caption) for clip, caption in zip(SANE, captions, strict=True)]
    assert score(SANE, [metric]).means[metric] == pytest.approx(sane, abs=0.1)
    assert least <= score(faulty, [metric]).means[metric] <= most


def test_figures_of_a_source_are_those_of_its_clips_alone() -> None:
    """As one would publish them; scores of clips are within their source, and in the order of the clips."""
    mixed = [replace(clip, caption=SANE[number // 2].caption) for number, clip in enumerate(SANE)]
    random.Random(0).shuffle(mixed)
    scored = score(mixed)
    for source in ("sounds", "music"):
        alone = score([clip for clip in mixed if clip.source == source])
        of_source = {name: value for name, value in scored.means.items() if name.endswith(f"/{source}")}
        assert {f"{name}/{source}" for name in alone.means if "/" not in name} == of_source.keys()
        assert all(alone.means[name] == value for name, value in of_source.items())
        assert [clip for clip in scored.predictions if clip.source == source] == alone.predictions


def test_scores_of_a_clip_are_added_to_those_it_has_and_the_clip_given_is_as_it_was() -> None:
    clip = replace(SANE[0], scores={"discrimination": 1.0})
    scored = score([clip, *SANE[1:]]).predictions[0].scores
    assert scored["discrimination"] == 1 and scored["rouge_l"] == 1
    assert clip.scores == {"discrimination": 1}


def test_a_single_clip_has_no_cider_d_and_no_clips_have_no_figures() -> None:
    scored = score([*SANE[:2], replace(SANE[4], caption="A slow piano.")])
    assert "cider_d/sounds" in scored.means and "cider_d" in scored.means
    assert "cider_d/music" not in scored.means and "cider_d" not in scored.predictions[2].scores
    assert scored.means["rouge_l/music"] < 1
    assert score([]).means == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A woman says: "One moment, please."', "a woman says one moment please"),
        (
            "A dog's bark isn't loud \N{EM DASH} it\N{RIGHT SINGLE QUOTATION MARK}s close-by!",
            "a dog 's bark is n't loud it 's close-by",
        ),
        ("At 10:30 o'clock, 3.5 m away (1,000 Hz)", "at 10:30 o'clock 3.5 m away 1,000 hz"),
        (
            "Cafe\N{COMBINING ACUTE ACCENT} m\N{LATIN SMALL LETTER U WITH DIAERESIS}sic",
            "caf\N{LATIN SMALL LETTER E WITH ACUTE} m\N{LATIN SMALL LETTER U WITH DIAERESIS}sic",
        ),
        (" ... ?! ", ""),
        ("犬が吠える。", "犬 が 吠 え る"),
        ("สุนัขเห่า", "สุ นั ข เ ห่ า"),
        ("东京ABC塔!", "东 京 abc 塔"),
        ("कुत्ता भौंकता है।", "कुत्ता भौंकता है"),
        ("개가 짖는다.", "개가 짖는다"),
    ],
)
def test_words_are_in_lower_case_without_punctuation_as_the_tokenizer_of_the_field_has_them(
    text: str, words: str
) -> None:
    assert words_of(text) == words.split()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=2)), max_size=4
    )
)
def test_captions_of_any_characters_have_figures(captions: list[tuple[str, list[str]]]) -> None:
    clips = [prediction(caption, *references) for caption, references in captions]
    scored = score(clips)
    shares = scored.means.keys() - {"cider_d", "cider_d/sounds", "length_ratio", "length_ratio/sounds"}
    assert all(0 <= scored.means[name] <= 1 + 1e-9 for name in shares)
    assert bool(scored.means) == bool(clips)


SOURCES = ["sounds", "music"]


@pytest.mark.parametrize(
    ("curve", "higher"),
    [
        ("validation/loss", False),
        ("validation/loss/music", False),
        ("validation/cider_d", True),
        ("validation/cider_d/music", True),
        ("validation/repetition_rate/sounds", False),
    ],
)
def test_which_way_a_curve_is_better_is_known_by_its_name(curve: str, higher: bool) -> None:
    assert is_higher_better(curve, SOURCES) is higher


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        ("cider_d", "did you mean 'validation/cider_d'?"),
        ("validation/cider", "did you mean 'validation/cider_d'?"),
        ("validation/cider_d/musik", "did you mean 'validation/cider_d/music'?"),
        ("validation/spice", "NAME is one of loss, "),
        ("validation/length_ratio/music", "length_ratio is best at 1"),
    ],
)
def test_a_name_that_marks_no_best_is_refused_with_the_nearest_that_does(curve: str, says: str) -> None:
    with pytest.raises(ValueError) as refusal:
        is_higher_better(curve, SOURCES)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_metric_that_is_computed_has_a_way_to_be_better() -> None:
    assert set(parts.NAMES) < HIGHER_IS_BETTER.keys()
