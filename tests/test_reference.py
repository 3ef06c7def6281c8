"""The seven data sets as they really lie train with the keys of configs/captioner.yaml, and the six phases of
the reference follow one another."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from configs.load import dump, load
from configs.run.events import InitFrom
from configs.run.folder import RunDir
from data import dataset
from tests.making import ROOT, WINDOW_SECONDS, audit, config_values, run_program
from tests.shards import Members, shard

REFERENCE = ROOT / "configs/reference"
PAIRS = {
    "audioset-with-grounded-captions": 1_760_000,
    "captioned-ai-music-snippets": 236_000,
    "freesound": 372_000,
    "laions_got_talent_clean_with_captions": 178_000,
    "majestrino-data": 327_000,
    "majestrino-unified-detailed-captions-temporal": 175_000,
    "synthetic-vocal-bursts": 72_000,
}
"""Of the model's card."""


def clip(seed: int, ending: str, seconds: float = 0.6, rate: int = 44_100) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * rate)).astype(np.float32)
    soundfile.write(file, noise, rate, format=ending)
    return file.getvalue()


def sample(key: str, seed: int, ending: str, text: object, **clip_options: Any) -> Members:
    return [
        (f"{key}.{ending}", clip(seed, ending, **clip_options)),
        (f"{key}.json", json.dumps(text).encode()),
    ]


def audioset(number: int) -> Members:
    """Every other one has a `caption` only, and facts of the clip beside it."""
    key = "caption" if number % 2 else "comprehensive_caption"
    facts = {"duration_ms": 10_000, "tags": ["Bell"], "grounded": [{"start": 0.1, "text": "a bell"}]}
    return sample(f"Y{number:03d}_{30 * number}", number, "flac", {key: f"A bell, {number}.", **facts})


def music(number: int) -> Members:
    """MP3 whose comprehensive caption is null or empty at times."""
    text = {"comprehensive_caption": [None, "", "A beat."][number % 3], "caption": "A song."}
    return sample(f"{number}", number, "mp3", text)


def freesound(number: int) -> Members:
    """Names with dots; long ones, too."""
    key = f"{number} Bell 2.0 (take {number}.1)"
    return sample(key, number, "flac", {"caption": "A bell."}, seconds=0.6 if number % 3 else 3.5)


def got_talent(number: int) -> Members:
    """`annotation` in a variant; a WAV without a caption beside each fourth sample."""
    key = "annotation" if number % 2 else "detailed_caption"
    stray = [(f"take{number}.wav", clip(number, "wav"))] if number % 4 == 0 else []
    return [*sample(f"en_{number:04d}", number, "mp3", {key: "A voice.", "x.y": 1}), *stray]


def majestrino(number: int) -> Members:
    return sample(f"{number:06d}", number, "mp3", {"detailed_caption": "A voice.", "duration_ms": 600})


def unified(number: int) -> Members:
    return sample(f"a/{number:06d}", number, "flac", {"caption": "A voice, then a door."})


def bursts(number: int) -> Members:
    """A caption in a field of a field whose name holds a dot and blanks, as text, or plainly."""
    texts: list[dict[str, object]] = [
        {"Flash 2.5 Annotation": {"caption": "A laugh.", "intensity": 3}},
        {"Flash 2.5 Annotation": "A sigh.", "Emotion v1.0": "joy"},
        {"caption": "A cough."},
    ]
    return sample(f"burst {number}", number, "mp3", texts[number % 3], seconds=0.4)


LAYOUTS: dict[str, Callable[[int], Members]] = {
    "audioset-with-grounded-captions": audioset,
    "captioned-ai-music-snippets": music,
    "freesound": freesound,
    "laions_got_talent_clean_with_captions": got_talent,
    "majestrino-data": majestrino,
    "majestrino-unified-detailed-captions-temporal": unified,
    "synthetic-vocal-bursts": bursts,
}
SHARDS, PER_SHARD = 2, 6


@pytest.fixture(scope="module")
def seven_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards for each set, which have the same keys, and other files beside them."""
    folder = tmp_path_factory.mktemp("sets")
    for name, layout in LAYOUTS.items():
        for number in range(SHARDS):
            members = [member for each in range(PER_SHARD) for member in layout(each)]
            shard(folder / name / f"{number:05d}.tar", members)
        (folder / name / "sizes.json").write_text('{"00000.tar": 6}', encoding="utf-8")
        (folder / name / "stray.wav").write_bytes(clip(1, "wav"))
    return folder


def captioner(folder: Path, sets: Path, model: Path, config: Path = ROOT / "configs/captioner.yaml") -> Path:
    """A config file with the sources of `config` as they stand, but for the place of their shards; small."""
    values = yaml.safe_load(dump(load(config)))
    for source in values["data"]["sources"]:
        (pattern,) = source["shards"]
        source |= {"shards": [pattern.replace("s3://BUCKET", str(sets))], "validation": 0}
    small = config_values(values["run"]["name"], folder, model, "x")
    del small["data"]["sources"]
    values["optim"] |= {"lr": 1e-3}
    for section in ("run", "batch", "evaluate", "monitor"):
        values[section] |= small[section]
    values["data"] |= small["data"] | {"max_bad_fraction": 0.1}
    values["model"]["name_or_path"] = str(model)
    path = folder / f"{values['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_the_seven_sets_as_they_lie_train_with_the_captioners_own_keys(
    tmp_path: Path, seven_sets: Path, model: Path, launch
) -> None:
    path = captioner(tmp_path, seven_sets, model)
    done = launch(path, "optim.epochs=1")
    assert done.returncode == 0, done.stderr
    trained = sorted(key for keys in audit(tmp_path / "captioner").values() for key in keys)
    assert len(trained) == len(set(trained)) == len(LAYOUTS) * SHARDS * PER_SHARD
    # Six WAVs without a caption are no samples: they are named.
    lost = "2 of 8 samples are left out, e.g. because of this: no .json member"
    assert done.stdout.count(lost) == SHARDS, done.stdout
    assert "freesound" in done.stdout and f"{WINDOW_SECONDS} s" in done.stdout, "what is cut off is told"


def test_lists_of_captions_as_in_laions_audio_shards(tmp_path: Path, model: Path, launch) -> None:
    texts = [["A bell.", "A gong."], ["A drum."], ["A horn.", "A horn, far away.", "Brass."]]
    members = [
        member
        for number, text in enumerate(texts)
        for member in sample(str(number), number, "flac", {"text": text, "tag": ["x"]}, rate=48_000)
    ]
    values = config_values("run", tmp_path, model, str(shard(tmp_path / "set/0.tar", members)))
    values["data"]["sources"] = [
        {"name": "laion", "shards": f"{tmp_path}/set/*.tar", "caption_key": "text", "captions": "all"}
    ]
    values["optim"] = {"lr": 1e-3, "epochs": 1}
    done = launch(values)
    assert done.returncode == 0, done.stderr
    trained = sorted(key for keys in audit(tmp_path / "run").values() for key in keys)
    assert [key.removeprefix("laion/0.tar/") for key in trained] == ["0", "0#2", "1", "2", "2#2", "2#3"]


def test_what_lies_beside_the_shards_is_named_where_a_pattern_takes_it(
    tmp_path: Path, seven_sets: Path
) -> None:
    said = run_program("tools.index", f"{seven_sets}/majestrino-data/*", "--index-dir", tmp_path).stderr
    assert "sizes.json: not a tar archive that can be read: it is JSON" in said
    assert "stray.wav: not a tar archive that can be read: it is audio (WAV)" in said
    assert f"{seven_sets}/majestrino-data/*.tar" in said


@pytest.mark.parametrize("number", range(1, 7))
def test_each_phase_of_the_reference_is_as_the_card_says(number: int) -> None:
    config = load(REFERENCE / f"phase-{number}.yaml")
    whole = load(ROOT / "configs/captioner.yaml")
    assert config.optim.lr == {5: 4e-5, 6: 5e-5}.get(number, 1e-5)
    assert config.optim.epochs == (3 if number == 6 else 1)
    assert (config.optim.schedule, config.optim.warmup_fraction, config.batch.global_size) == (
        "linear",
        0.05,
        64,
    )
    assert config.model.init_from == (f"runs/reference-phase-{number - 1}" if number > 1 else None)
    assert config.run.name == f"reference-phase-{number}" and config.data.window == "full"
    weight = 0.2869 if number < 5 else 1.0
    assert [source.model_copy(update={"weight": 1.0}) for source in config.data.sources] == whole.data.sources
    assert {source.weight for source in config.data.sources} == {weight}
    pairs = sum(PAIRS[source.name] * source.weight for source in config.data.sources)
    steps = math.ceil(pairs * config.optim.epochs / config.batch.global_size)
    card = {5: 48_836, 6: 146_508}.get(number, 895_000 / 64)
    assert abs(steps - card) / card < 0.002
    guide = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    assert f"{steps if number > 4 else 13_985:,}" in guide


def test_the_phases_plan_the_same_subset_four_times_and_then_all(
    tmp_path: Path, seven_sets: Path, model: Path
) -> None:
    taken: list[list[str]] = []
    for number in range(1, 7):
        path = captioner(tmp_path, seven_sets, model, REFERENCE / f"phase-{number}.yaml")
        config = load(path)
        dataset.build(config, config.run.dir, float(WINDOW_SECONDS))
        samples = dataset.open_dataset(config, config.run.dir)
        order = samples.order(config)
        steps = order.steps_of(config.optim.epochs or 0)
        rows = order.lanes(0, range(config.batch.global_size)).ravel()
        taken.append(sorted(samples.training.identity(row) for row in rows[rows >= 0].tolist()))
        assert steps == order.steps_in(0) * (3 if number == 6 else 1)
    everything = len(LAYOUTS) * SHARDS * PER_SHARD
    assert taken[0] == taken[1] == taken[2] == taken[3] and 0 < len(taken[0]) < everything / 2
    assert len(taken[4]) == len(taken[5]) == everything


def test_a_phase_begins_with_the_weights_of_the_one_before(
    tmp_path: Path, seven_sets: Path, model: Path, launch
) -> None:
    length = ["optim.epochs=null", "optim.max_steps=1"]
    fourth, fifth = (
        captioner(tmp_path, seven_sets, model, REFERENCE / f"phase-{number}.yaml") for number in (4, 5)
    )
    done = launch(fourth, "model.init_from=null", *length)
    assert done.returncode == 0, done.stderr
    assert load(fifth).model.init_from == "runs/reference-phase-4"
    before = tmp_path / "reference-phase-4"
    done = launch(fifth, f"model.init_from={before}", *length)
    assert done.returncode == 0, done.stderr
    (begun,) = RunDir(tmp_path / "reference-phase-5").ledger.read().of(InitFrom)
    assert begun.checkpoint.startswith(f"{before}/checkpoints/")
