"""The caption that was meant is the one that is trained on, however it is written down; anything else is a
bad sample that says why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import WhisperProcessor

from configs.errors import ConfigError
from configs.load import validate
from configs.run.crash_journal import CrashJournal
from configs.schema import Source
from data import dataset
from data.batch import Sample
from data.captions import CaptionEncoder, find_captions
from data.decode import BadSample
from data.index import index_shard
from data.merged import Index
from data.samples import SampleReader
from data.windows import Windows
from tests.making import audit, config_values, run_program
from tests.shards import Members, clip, merged, rows, shard, sound, source
from trainer.changes import changes, pinned

MARK = b"\xef\xbb\xbf"
DEEP = {"captions": [{"text": "A bell.", "by": 1}, {"text": "A gong.", "by": 2}], "n": [1], "none": None}
FOUND: dict[str, tuple[object, object, list[str]]] = {
    "a text": ({"caption": " A bell. "}, "caption", ["A bell."]),
    "an array": ({"text": ["A bell.", "A gong."]}, "text", ["A bell.", "A gong."]),
    "an array with gaps": ({"text": [None, "A bell.", " ", "A gong.", ""]}, "text", ["A bell.", "A gong."]),
    "a path": ({"a": {"b": {"c": "A bell."}}}, "a.b.c", ["A bell."]),
    "a number": (DEEP, "captions.1.text", ["A gong."]),
    "a number alone": ({"text": ["A bell.", "A gong."]}, "text.1", ["A gong."]),
    "of each object": (DEEP, "captions.text", ["A bell.", "A gong."]),
    "objects": (DEEP, "captions", ["A bell.", "A gong."]),
    "an object": ({"en": {"caption": "A bell.", "score": 0.4}}, "en", ["A bell."]),
    "objects of which one has none": (
        {"c": [{"text": "A bell."}, {"start": 3}]},
        "c.text",
        ["A bell."],
    ),
    "a key with a dot": ({"Flash 2.5 Annotation": "A bell."}, "Flash 2.5 Annotation", ["A bell."]),
    "a key with a dot in a path": ({"v2.5": {"a.b": {"c": "A bell."}}}, "v2.5.a.b.c", ["A bell."]),
    "a key with a dot beside a path": (
        {"a.b": "A bell.", "a": {"b": "A gong."}},
        "a.b",
        ["A bell."],
    ),
    "a path beside a key with a dot": ({"a.b": 1, "a": {"b": {"c": "A bell."}}}, "a.b.c", ["A bell."]),
    "a key that is a number": ({"captions": {"0": "A bell."}}, "captions.0", ["A bell."]),
    "the first of two keys": ({"long": "A bell.", "caption": "A gong."}, ["long", "caption"], ["A bell."]),
    "the second of two keys": ({"caption": "A gong."}, ["long", "caption"], ["A gong."]),
    "the second, as the first is null": (
        {"long": None, "caption": "A gong."},
        ["long", "caption"],
        ["A gong."],
    ),
    "the second, as the first is empty": (
        {"long": [" "], "caption": "A gong."},
        ["long", "caption"],
        ["A gong."],
    ),
    "an array as the whole": (["A bell.", "A gong."], "1", ["A gong."]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_captions_are_found_where_a_key_says(case: str) -> None:
    document, key, captions = FOUND[case]
    keys = Source(name="x", shards=["a.tar"], caption_key=key).caption_keys
    assert find_captions(json.dumps(document).encode(), keys) == captions


REFUSED: dict[str, tuple[object, object, str]] = {
    "null": ({"text": None}, "text", "the caption under 'text' is null"),
    "nulls": ({"text": [None, ""]}, "text", "the caption under 'text' is null"),
    "nothing": ({"text": []}, "text", "the caption under 'text' is an empty array"),
    "blanks": ({"text": [" ", ""]}, "text", "the caption is empty"),
    "a number": ({"text": 3.5}, "text", "the caption under 'text' is a number, not text"),
    "a boolean": ({"text": True}, "text", "the caption under 'text' is a boolean, not text"),
    "numbers": ({"text": ["A bell.", 3]}, "text", "the caption under 'text' is a number, not text"),
    "arrays in an array": ({"text": [["A bell."]]}, "text", "the caption under 'text' is an array, not text"),
    "an object": (
        {"text": {"en": "A bell.", "de": "Eine Glocke."}},
        "text",
        "is an object, not text (its keys: en, de); name one of them, as text.en",
    ),
    "an object with two texts": ({"x": {"caption": "A", "text": "B"}}, "x", "is an object, not text"),
    "another key": ({"a": 1, "b": 2}, "text", "no caption under 'text' (keys there: a, b)"),
    "another key, deep": ({"a": {"b": 2}}, "a.text", "no caption under 'a.text' (keys there: b)"),
    "no object": ({"a": "A bell."}, "a.text", "no caption under 'a.text' (there is a string)"),
    "no object but null": ({"a": None}, "a.0", "no caption under 'a.0' (there is null)"),
    "too few": ({"a": ["A"]}, "a.1", "no caption under 'a.1' (the array there has 1, counted from 0)"),
    "neither key": ({"a": 1}, ["long", "text"], "no caption under 'long' or 'text' (keys there: a)"),
    "one key, and it is null": (
        {"long": None},
        ["long", "text"],
        "the caption under 'long' is null; no caption under 'text' (keys there: long)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_caption_is_named_in_the_words_of_json(case: str) -> None:
    document, key, said = REFUSED[case]
    keys = Source(name="x", shards=["a.tar"], caption_key=key).caption_keys
    with pytest.raises(BadSample) as refused:
        find_captions(json.dumps(document).encode(), keys)
    assert said in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("key", ["caption", ".txt"])
def test_text_is_read_as_windows_writes_it(key: str, encoding: str) -> None:
    text = "Eine Glöcke, 鐘." if key == ".txt" else '{"caption": "Eine Glöcke, 鐘."}'
    assert find_captions(text.encode(encoding), [key]) == ["Eine Glöcke, 鐘."]


STAND_INS = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "a page": (b"<!DOCTYPE html><title>Sign in</title>", "a web page (Sign in)"),
    "a refusal": (b'<?xml version="1.0"?><Error><Code>X</Code></Error>', "XML, as a server answers"),
    "a zip": (b"PK\x03\x04\x14\0\0\0\x08\0", "a zip archive"),
    "zeros": (bytes(300), "nothing but zero bytes"),
    "audio": (sound(), "audio (WAV)"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAND_INS)
@pytest.mark.parametrize("key", ["caption", ".txt"])
def test_what_stands_in_the_place_of_a_caption_is_not_learnt(key: str, case: str) -> None:
    content, said = STAND_INS[case]
    with pytest.raises(BadSample, match="the caption's member is") as refused:
        find_captions(content, [key])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("\u200b\ufeff \u200e", "the caption is empty"),
        ("...", "the caption is '...', without a letter or a digit"),
        ("NaN", "the caption is 'NaN', which programs write where there is none"),
        ("#NAME?", "the caption is '#NAME?', which programs write"),
        ("['A bell.', 'A gong.']", "a list or an object that was written as text"),
        ("['A bell.'\n 'A gong.']", "a list or an object that was written as text"),
        ('{"text": "A bell."}', "object"),
    ],
)
@pytest.mark.parametrize("key", ["caption", ".txt"])
def test_what_programs_write_for_a_caption_that_is_none_is_not_learnt(
    key: str, caption: str, said: str
) -> None:
    content = caption if key == ".txt" else json.dumps({"caption": caption})
    with pytest.raises(BadSample) as refused:
        find_captions(content.encode(), [key])
    assert said in str(refused.value)


@pytest.mark.parametrize("caption", ["♪", "[music]", "{laughs} No.", "None of it.", "鐘", "5", "👏"])
def test_an_unusual_caption_is_one(caption: str) -> None:
    assert find_captions(json.dumps({"caption": f"\ufeff{caption}\u200b"}).encode(), ["caption"]) == [caption]


def test_of_two_captions_of_one_name_none_is_taken_for_the_caption() -> None:
    twice = b'{"caption": "A bell.", "by": 1, "by": 2, "caption": "A gong."}'
    with pytest.raises(BadSample, match="under 'caption' is there twice with different values"):
        find_captions(twice, ["caption"])
    alike = b'{"caption": "A bell.", "by": 1, "by": 2, "caption": "A bell."}'
    assert find_captions(alike, ["caption"]) == ["A bell."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes): was its download broken off?"),
        (b"caption: A bell.", "is text (caption: A bell.), not JSON"),
        (b'{"a"', "the JSON is broken"),
        (b"../.git/annex/objects/aB/cD/MD5E-s3--1.json", "is a pointer of git-annex"),
    ],
)
def test_what_is_no_json_says_what_it_is(content: bytes, said: str) -> None:
    with pytest.raises(BadSample) as refused:
        find_captions(content, ["caption"])
    assert said in str(refused.value)


def test_json_in_a_text_member_is_not_learnt_with_its_brackets() -> None:
    with pytest.raises(BadSample, match="is JSON, an object, not text: give it the ending"):
        find_captions(b'{"caption": "A bell."}', [".txt"])
    assert find_captions(b"[laughter] A bell.", [".txt"]) == ["[laughter] A bell."]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (["caption", ".txt"], "not both"),
        ([], "name a key of the JSON"),
        ([""], "name a key of the JSON"),
        (".", "name a key of the JSON"),
    ],
)
def test_a_caption_key_that_cannot_be_is_refused(tmp_path: Path, key: object, said: str) -> None:
    values = config_values("run", tmp_path, tmp_path, "a.tar")
    values["data"]["sources"][0]["caption_key"] = key
    with pytest.raises(ConfigError, match=said):
        validate(values, "test")


def test_of_several_text_members_the_preferred_one_counts(tmp_path: Path) -> None:
    members: Members = [
        *[("a.wav", sound()), ("a.txt", b"A."), ("a.caption.txt", b"A, at length.")],
        *[("b.wav", sound()), ("b.txt", b"B.")],
    ]
    path = shard(tmp_path / "a.tar", members)
    found = rows(path, caption_key=[".caption.txt", ".txt"])
    assert {key: row["caption_characters"] for key, row in found.items()} == {"a": 13, "b": 2}


CAPTIONS = {"five": [f"Text {number}." for number in range(5)], "two": ["One.", "Two."], "one": ["Alone."]}


def with_captions(folder: Path) -> Path:
    """A shard of three clips with five captions, two, and one, and of one whose captions are null."""
    captions = {**CAPTIONS, "null": None}
    return shard(
        folder / "a.tar",
        [
            member
            for key, text in captions.items()
            for member in ((f"{key}.wav", sound()), (f"{key}.json", json.dumps({"text": text}).encode()))
        ],
    )


@pytest.fixture
def read(tmp_path: Path, model: Path) -> Callable[[Index], Callable[..., dict[str, str]]]:
    """Captions by key, as the samples of an index are read in an epoch."""
    processor = WhisperProcessor.from_pretrained(model)
    encoder = CaptionEncoder(processor.tokenizer.backend_tokenizer, [1], positions=64, long_caption="skip")

    def reader(index: Index, **options: bool) -> Callable[[int], dict[str, str]]:
        samples = SampleReader(
            index,
            encoder,
            windows=Windows(200, 0.0, 0),
            max_seconds=2.0,
            overlong="skip",
            seed=3,
            crash_journal=CrashJournal(1),
            **options,
        )

        def captions(epoch: int) -> dict[str, str]:
            loaded = [samples.load(row, step=epoch, epoch=epoch) for row in range(len(index))]
            return {sample.key: sample.caption for sample in loaded if isinstance(sample, Sample)}

        return captions

    return reader


@pytest.mark.parametrize("full", [True, False])
def test_all_captions_of_a_clip_are_samples(
    tmp_path: Path, full: bool, read: Callable[[Index], Callable[..., dict[str, str]]]
) -> None:
    index = merged(tmp_path, source(with_captions(tmp_path), caption_key="text", captions="all"), full=full)
    wanted = {
        f"sounds/a.tar/{key}{f'#{number + 1}' if number else ''}": text
        for key, texts in CAPTIONS.items()
        for number, text in enumerate(texts)
    }
    assert len(index) == len(wanted) and read(index)(0) == wanted
    order = [index.text("key", row) for row in range(len(index))]
    assert order == ["five", "two", "one", "five", "two", "five", "five", "five"], "pass after pass"


def test_a_random_caption_is_another_one_in_each_epoch_and_the_same_in_validation(
    tmp_path: Path, read: Callable[[Index], Callable[..., dict[str, str]]]
) -> None:
    index = merged(tmp_path, source(with_captions(tmp_path), caption_key="text", captions="random"))
    epochs = [read(index)(epoch) for epoch in range(200)]
    assert epochs[:20] == [read(index)(epoch) for epoch in range(20)], "a function of seed, epoch and sample"
    for key, texts in CAPTIONS.items():
        counts = Counter(captions[f"sounds/a.tar/{key}"] for captions in epochs)
        assert set(counts) == set(texts) and min(counts.values()) > 200 / len(texts) / 2
    in_validation = read(index, always_alike=True)
    assert in_validation(0) == in_validation(7) == epochs[0]


def test_the_first_caption_is_taken_unless_told_otherwise(
    tmp_path: Path, read: Callable[[Index], Callable[..., dict[str, str]]]
) -> None:
    index = merged(tmp_path, source(with_captions(tmp_path), caption_key="text"))
    assert read(index)(3) == {f"sounds/a.tar/{key}": texts[0] for key, texts in CAPTIONS.items()}


@pytest.mark.parametrize(("captions", "told"), [("first", True), ("all", False), ("random", False)])
def test_it_is_told_where_only_first_captions_are_used(tmp_path: Path, captions: str, told: bool) -> None:
    values = config_values("run", tmp_path, tmp_path, str(with_captions(tmp_path)))
    text = {"caption_key": "text", "captions": captions, "validation": 0}
    values["data"]["sources"] = [{**values["data"]["sources"][0], **text}]
    config = validate(values, "test")
    for one in dataset.list_shards(config):
        index_shard(one, config.data.index_dir, full=True)
    lines = dataset.build(config, config.run.dir, 2.0).lines
    said = "source sounds: 2 of 4 samples have several captions (up to 5), of which the first is used"
    assert any(said in line for line in lines) == told


def test_a_quick_index_of_first_captions_is_made_anew_where_all_are_wanted(tmp_path: Path) -> None:
    path = with_captions(tmp_path)
    merged(tmp_path / "index", source(path, caption_key="text"), full=False)
    values = config_values("run", tmp_path, tmp_path, str(path))
    values["data"]["sources"] = [{"name": "sounds", "shards": [str(path)], "caption_key": "text"}]
    values["data"]["sources"][0]["captions"] = "all"
    config = validate(values, "test")
    (sidecar,) = dataset.index_missing(config, dataset.list_shards(config))
    assert sidecar.table["captions"].to_pylist() == [5, 2, 1, -1]


def test_a_run_on_all_captions_takes_each_once_per_epoch(tmp_path: Path, model: Path, launch) -> None:
    values = config_values("run", tmp_path, model, str(with_captions(tmp_path)))
    text = {"caption_key": "text", "captions": "all", "validation": 0}
    values["data"] |= {"sources": [{**values["data"]["sources"][0], **text}], "max_bad_fraction": 1}
    values["optim"] = {"lr": 1e-3, "epochs": 2}
    values["batch"]["global_size"] = 3
    done = launch(values)
    assert done.returncode == 0, done.stderr
    seen = Counter(key.rpartition("/")[2] for keys in audit(tmp_path / "run").values() for key in keys)
    assert seen == {
        **dict.fromkeys(["five", "five#2", "five#3", "five#4", "five#5", "two", "two#2", "one"], 2)
    }


def test_a_checkpoint_that_knows_nothing_of_several_captions_goes_on(tmp_path: Path) -> None:
    config = validate(config_values("run", tmp_path, tmp_path, "a.tar"), "test")
    now = pinned(config, "digest")
    before = {**now, "data.sources.captions": [["caption", None]]}
    assert changes(before, now) == []
    assert changes({**before, "data.sources.captions": [["text", None]]}, now) == ["data.sources.captions"]


@pytest.mark.parametrize("command", ["index", "inspect"])
def test_several_keys_are_named_on_a_command_line(tmp_path: Path, command: str) -> None:
    path = shard(tmp_path / "a.tar", [("a.wav", sound()), ("a.json", b'{"short": "A."}'), *clip("b")])
    keys = ["--caption-key", "short", "--caption-key", "caption"]
    said = run_program(f"tools.{command}", path, *keys, "--index-dir", tmp_path / "index")
    assert said.returncode == 0, said.stderr
    assert "2 samples" in said.stdout and "no caption" not in said.stdout
