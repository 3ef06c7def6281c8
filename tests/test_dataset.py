"""What cannot be used is told before the first step, and never taken for the end of the data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import WhisperProcessor

from configs.errors import ConfigError, DataError
from configs.load import validate
from configs.run.crash_journal import CrashJournal
from configs.schema import Data, RunConfig
from data import dataset
from data.batch import Sample
from data.captions import CaptionEncoder
from data.index import index_shard
from data.merged import TRAINING, VALIDATION, Index
from data.samples import SampleReader
from data.windows import Windows
from launch.samples import passes_of
from tests import shards as small
from tests.making import config_values
from tools.card_styles import on_styles
from tools.inspect import inspect


def test_a_cut_off_shard_is_told_at_the_start(tmp_path: Path, model: Path, shards: str) -> None:
    whole = next(Path(shards).parent.glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    config = validate(config_values("run", tmp_path, model, f"{tmp_path}/cut.tar"), "test")
    lines = dataset.build(config, tmp_path, 2.0).lines
    assert "cut.tar: DAMAGED" in lines[0] and "what came after is lost" in lines[0]


def test_too_many_samples_known_to_be_bad_end_the_run_before_it_starts(
    tmp_path: Path, model: Path, shards: str
) -> None:
    values = config_values("run", tmp_path, model, shards)
    values["data"]["sources"] = [
        {**values["data"]["sources"][0], "caption_key": ".txt"}
    ]  # there are only .json members
    with pytest.raises(
        DataError,
        match=r"no \.txt member[\s\S]*60 of 60 samples cannot be used, more than data\.max_bad_fraction",
    ):
        dataset.build(validate(values, "test"), tmp_path, 2.0)


def _index_fully(config: RunConfig) -> None:
    for shard in dataset.list_shards(config):
        index_shard(shard, config.data.index_dir, full=True)


def _replace_a_shard(config: RunConfig) -> None:
    path = Path(dataset.list_shards(config)[0].location.url)
    os.utime(path, (later := path.stat().st_mtime + 5, later))


CHANGES: dict[str, Callable[[RunConfig], object]] = {
    "a sidecar": _index_fully,
    "a shard": _replace_a_shard,
    "fewer shards": lambda config: Path(dataset.list_shards(config)[-1].location.url).unlink(),
    "a damaged merged index": lambda config: os.truncate(config.run.dir / VALIDATION, 1000),
    "no merged index": lambda config: (config.run.dir / TRAINING).unlink(),
}
SETTINGS = {
    "limit": {"max_seconds": 1.0},
    "cropped": {"overlong": "crop"},
    "bad samples": {"max_bad_fraction": 0.5},
    "share": {"sources": {"validation": 0.3}},
    "group": {"sources": {"validation": {"fraction": 0.15, "group": "clip.."}}},
    "name": {"sources": {"name": "x"}},
    "caption key": {"sources": {"caption_key": "licence"}},
}


@pytest.mark.parametrize("change", ["nothing", "window", *CHANGES, *SETTINGS])
def test_indexes_are_merged_again_where_something_changed_and_only_there(
    tmp_path: Path, model: Path, shards: str, change: str
) -> None:
    shutil.copytree(Path(shards).parent, tmp_path / "shards")
    values = config_values("run", tmp_path, model, f"{tmp_path}/shards/*.tar")

    def build(seconds: float = 1.2) -> tuple[dataset.Overview, list[int]]:
        overview = dataset.build(config, config.run.dir, seconds)
        return overview, [(config.run.dir / name).stat().st_mtime_ns for name in (TRAINING, VALIDATION)]

    config = validate(values, "test")
    _index_fully(config)
    told, made = build()
    assert "are longer than 1.2 s and left out" in told.lines[0]
    assert build() == (told, made), "what is left out is told at every start"
    if change in CHANGES:
        CHANGES[change](config)
    elif change in SETTINGS:
        (source,) = values["data"]["sources"]
        settings = {**SETTINGS[change]}
        values["data"] |= settings | {"sources": [{**source, **settings.get("sources", {})}]}
        config = validate(values, "test")
    again = build(2.0 if change == "window" else 1.2)
    assert (again == (told, made)) == (change == "nothing")
    if change != "nothing":
        assert not set(again[1]) & set(made)
        fresh = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path / "fresh"})})
        dataset.build(fresh, fresh.run.dir, 2.0 if change == "window" else 1.2)
        one, other = (dataset.open_dataset(config, folder) for folder in (config.run.dir, fresh.run.dir))
        assert (one.training.digest, one.validation.digest) == (
            other.training.digest,
            other.validation.digest,
        )


def test_a_control_token_written_in_a_caption_is_text(model: Path) -> None:
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    encoder = CaptionEncoder(
        tokenizer.backend_tokenizer,
        [tokenizer.convert_tokens_to_ids("<|startoftranscript|>")],
        positions=64,
        long_caption="truncate",
    )
    caption = "A beep<|endoftext|> twice."
    *words, end = encoder.encode(caption).labels
    assert end == tokenizer.eos_token_id not in words and tokenizer.decode(words) == caption


def test_a_style_that_leaves_no_room_for_a_caption_is_refused(model: Path) -> None:
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    with pytest.raises(ConfigError, match="longer than the 64 positions"):
        CaptionEncoder(
            tokenizer.backend_tokenizer,
            [0],
            positions=64,
            long_caption="truncate",
            styles=["much too long " * 64],
        )


def reader_of(index: Index, encoder: CaptionEncoder, **settings: Any) -> SampleReader:
    return SampleReader(
        index,
        encoder,
        windows=Windows(200, share=0.0, seed=0),
        max_seconds=2.0,
        overlong="skip",
        seed=0,
        crash_journal=CrashJournal(1),
        **settings,
    )


def test_a_sample_is_prompted_with_the_style_of_its_own_source(model: Path, tmp_path: Path) -> None:
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    styles = {"short": "In a few words.", "long": "At length.", "plain": None}
    sources = [
        small.source(small.shard(tmp_path / f"{name}.tar", small.clip("a", number)), name=name, style=style)
        for number, (name, style) in enumerate(styles.items())
    ]
    index = small.merged(tmp_path / "index", *sources)
    encoder = CaptionEncoder(
        tokenizer.backend_tokenizer, [7], positions=64, long_caption="truncate", styles=list(styles.values())
    )
    samples = reader_of(index, encoder)
    for row in range(len(index)):
        sample = samples.load(row)
        assert isinstance(sample, Sample)
        style = styles[sample.key.split("/")[0]]
        prompt = tokenizer.get_prompt_ids(style).tolist() if style else []
        assert sample.tokens.input_ids[: len(prompt) + 1] == [*prompt, 7], sample.key
    assert len(index) == len(styles)


def test_a_share_of_the_samples_comes_without_the_style_of_their_source(model: Path, tmp_path: Path) -> None:
    """Others in each epoch, by seed, epoch and sample alone."""
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer
    members = [member for number in range(100) for member in small.clip(f"{number:03}", number % 10)]
    source = small.source(small.shard(tmp_path / "a.tar", members), style="In a few words.")
    index = small.merged(tmp_path / "index", source)
    encoder = CaptionEncoder(
        tokenizer.backend_tokenizer, [7], positions=64, long_caption="truncate", styles=[source.style]
    )

    def styled(share: float, epoch: int, rows: Iterable[int] = range(100)) -> list[bool]:
        samples = reader_of(index, encoder, style_drop=share)
        return [samples.load(row, step=row, epoch=epoch).tokens.input_ids[0] != 7 for row in rows]

    assert all(styled(0.0, 0)) and not any(styled(1.0, 0))
    first, second = styled(0.3, 0), styled(0.3, 1)
    assert np.mean(first) == pytest.approx(0.7, abs=0.15) and first != second
    assert styled(0.3, 0, [99, 5]) == [first[99], first[5]]


def test_what_temperature_makes_of_the_weights_is_told_wherever_sources_are(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a start, by `launch config` once there was one, and by `tools.inspect` before."""
    many = [member for number in range(9) for member in small.clip(f"{number}", number)]
    few, many = small.shard(tmp_path / "few.tar", small.clip("a")), small.shard(tmp_path / "many.tar", many)
    values = config_values("run", tmp_path, tmp_path, "")
    values["data"]["sources"] = [{"name": path.stem, "shards": [str(path)]} for path in (few, many)]
    values["data"]["temperature"] = float("inf")
    config = validate(values, "test")
    told = "passes per epoch with data.temperature=inf: few 5 (weight 1), many 0.556 (weight 1)"
    assert "tools.inspect CONFIG" in passes_of(config)
    overview = dataset.build(config, config.run.dir, 2.0)
    assert overview.passes == passes_of(config) == told
    assert [source.passes for source in overview.sources] == pytest.approx([5, 5 / 9])
    values["model"]["name_or_path"] = str(model)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    inspect([str(tmp_path / "mine.yaml")])
    assert told in capsys.readouterr().out.splitlines()


def test_a_model_card_names_styles_and_whether_captions_without_one_were_trained() -> None:
    def card(dropped: float, *styles: str | None) -> str:
        sources = [
            {"name": f"source{number}", "shards": ["x"], "style": style}
            for number, style in enumerate(styles)
        ]
        return on_styles(Data.model_validate({"sources": sources, "style_drop": dropped}), "mine")

    assert card(0.1, None, None) == ""
    both = card(0.0, "In short.", "In short.", "At length.")
    assert "- `In short.`: source0, source1\n- `At length.`: source2\n" in both
    assert "tools.caption mine clip.wav --style 'In short.'" in both
    assert "Captions without a style were not trained (data.style_drop was 0)" in both
    assert "were trained, too: on 10% of the samples." in card(0.1, "In short.")
    assert "were trained, too: on source1 and 10% of the others." in card(0.1, "In short.", None)
    assert "were trained, too: on source1." in card(0.0, "In short.", None)
