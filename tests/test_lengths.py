"""How much of each source is too long is told at the start, by a full index and by a quick one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configs.load import validate
from configs.schema import RunConfig
from data import dataset, lengths
from data.index import index_shard
from tests.making import config_values
from tests.shards import Members, shard, words

WINDOW = 2.0
"""Seconds."""


def silence(seconds: float, ending: str = "wav") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * 16_000), np.int16), 16_000, format=ending)
    return file.getvalue()


def clips(seconds: list[float]) -> Members:
    """Silence of these lengths, with captions."""
    return [
        member
        for number, length in enumerate(seconds)
        for member in ((f"{number}.wav", silence(length)), (f"{number}.json", words()))
    ]


def told(config: RunConfig, full: bool = False) -> list[str]:
    if full:
        for one in dataset.list_shards(config):
            index_shard(one, config.data.index_dir, full=True)
    return dataset.build(config, config.run.dir, WINDOW).lines


def configured(folder: Path, *shards: Path, **data: object) -> RunConfig:
    """A source for each shard."""
    sources = [{"name": path.stem, "shards": [str(path)]} for path in shards]
    values = config_values("run", folder, Path("model"), "")
    values["data"] |= {"sources": sources, **data}
    return validate(values, "test")


LONG = "s and left out; data.overlong=start would take the beginning of each"


@pytest.mark.parametrize("full", [True, False])
def test_the_share_of_clips_and_hours_is_told_for_each_source(tmp_path: Path, full: bool) -> None:
    """Exactly, by a quick index, too, where it looks at all clips."""
    some = shard(tmp_path / "some.tar", clips([1.0] * 6 + [7.0, 7.0]))
    none = shard(tmp_path / "none.tar", clips([1.0, 2.0]))
    assert told(configured(tmp_path, some, none), full) == [
        f"source some: 2 of 8 clips (25.0 %), 14.0 s of 20.0 s (70.0 %), are longer than 2 {LONG}"
    ]


@pytest.mark.parametrize("full", [True, False])
def test_what_is_cut_is_told_alike(tmp_path: Path, full: bool) -> None:
    some = shard(tmp_path / "some.tar", clips([1.0] * 6 + [7.0, 7.0]))
    assert told(configured(tmp_path, some, overlong="crop", max_seconds=1.5), full) == [
        "source some: 2 of 8 clips (25.0 %) are longer than 1.5 s and cut (data.overlong=crop): 11.0 s of"
        " 20.0 s (55.0 %) lie beyond"
    ]


def test_a_quick_index_looks_at_some_clips_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread evenly over all shards; a start that finds its merged index does not look again."""
    config = configured(tmp_path, shard(tmp_path / "many.tar", clips([1.0, 3.0] * 100)))
    (line,) = told(config)
    found = re.fullmatch(
        r"source many: of 64 clips looked at \(there are 200\), (\d+) \((.*) %\), .* are longer than 2 s and"
        r" left out; data\.overlong=start would take the beginning of each\. This is an estimate; a full"
        r" index \(`python -m tools\.index CONFIG`\) knows all lengths",
        line,
    )
    assert found and abs(int(found[1]) - 32) <= 4 and float(found[2]) == round(100 * int(found[1]) / 64, 1)
    monkeypatch.setattr(lengths, "probe", None)
    assert told(config) == [line]


def test_large_clips_are_looked_at_more_sparingly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "BYTES", 20 * len(silence(3.0)))
    (line,) = told(configured(tmp_path, shard(tmp_path / "many.tar", clips([3.0] * 100))))
    assert line.startswith("source many: of 20 clips looked at (there are 100), 20 (100.0 %)")


def test_clips_without_a_length_are_named_and_do_not_count(tmp_path: Path) -> None:
    members = clips([1.0] * 5 + [3.0] * 2)
    members[2] = (members[2][0], b"RIFF")
    lines = told(configured(tmp_path, shard(tmp_path / "some.tar", members)))
    assert lines[0].startswith(
        "source some: 1 of 7 clips looked at cannot be used, e.g. some.tar/1: the audio"
    )
    assert lines[1].startswith("source some: 2 of 6 clips (33.3 %), 6.0 s of 10.0 s (60.0 %), are longer")


def test_a_source_of_which_all_is_too_long_is_refused_with_its_lengths(tmp_path: Path) -> None:
    config = configured(tmp_path, shard(tmp_path / "some.tar", clips([3.0] * 4)))
    with pytest.raises(dataset.DataError, match=r"4 of 4 clips .*\n.*no sample to train on in source some"):
        told(config, full=True)


def test_the_overview_counts_all_samples_of_each_source(tmp_path: Path) -> None:
    members = [*clips([1.0] * 10 + [3.0] * 2), ("alone.json", words())]
    config = configured(tmp_path, shard(tmp_path / "some.tar", members))
    told(config, full=True)
    (counts,) = dataset.build(config, config.run.dir, WINDOW).sources
    assert (counts.samples, counts.training, counts.validation) == (13, 10, 0)
    assert (counts.unusable, counts.too_long) == (1, 2)


def test_a_share_for_validation_that_chooses_nothing_is_told(tmp_path: Path) -> None:
    config = configured(tmp_path, shard(tmp_path / "some.tar", clips([1.0] * 3)))
    (source,) = config.model_dump(mode="json")["data"]["sources"]
    values = config_values("run", tmp_path, Path("model"), "")
    values["data"] |= {"sources": [{**source, "validation": {"fraction": 0.001}}]}
    (line,) = told(validate(values, "test"))
    assert line.startswith("source some: data.sources.some.validation=0.001 chooses none of its 3 samples")


@pytest.mark.parametrize(
    ("bad", "good", "is_refused"),
    [(1, 9, False), (1, 1, False), (1, 49, False), (10, 10, True), (3, 2, True)],
)
def test_one_bad_sample_of_few_is_left_out_and_half_of_them_are_refused(
    tmp_path: Path, bad: int, good: int, is_refused: bool
) -> None:
    members = [*clips([1.0] * good), *((f"alone{number}.json", words()) for number in range(bad))]
    config = configured(tmp_path, shard(tmp_path / "some.tar", members))
    if is_refused:
        with pytest.raises(dataset.DataError, match=f"{bad} of {bad + good} samples cannot be used"):
            told(config)
    else:
        assert f"{bad} of {bad + good} samples are left out" in told(config)[0]
