"""The benchmarks run, and their JSON has what they promise; figures of a model this small mean nothing."""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from configs.errors import ConfigError, DataError
from tests.making import caption_of, make_model, run_program, sound_of
from tools.bench import trace
from tools.bench.captioned import clips_of, judge
from tools.bench.compare import Comparison, Method, Recipe, Results, Trained, Which
from tools.bench.made import SHARES, _draw_seconds

SAVE = {"blocking_seconds", "total_seconds", "gigabytes"}
TRAINING = SAVE | {"hidden_seconds", "step_seconds"}
"""Figures of a method that trains on while it saves."""
WAITING = SAVE | {"cpu_seconds_per_gigabyte"}


STEP = {"samples_per_second", "mfu", "useful_mfu", "data_wait_seconds", "training_seconds", "host_gigabytes"}
TINY_STEPS = ("--preset", "sandbox", "--clips", 16, "--steps", 2, "--warm-up", 1, "--global-size", 2)


def bench(folder: Path, name: str, *options: object, rounds: tuple[object, ...] = ("--rounds", 1)) -> dict:
    done = run_program("tools.bench", name, *options, *rounds, "--dir", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return json.loads(done.stdout)


def positive(figures: dict[str, float]) -> bool:
    may_be_zero = ("hidden_seconds", "largest_mel_difference", "saving_seconds", "data_wait_share")
    return all(value > 0 for name, value in figures.items() if name not in may_be_zero)


@pytest.mark.slow
def test_augmentation_is_measured_part_by_part() -> None:
    done = run_program("tools.bench", "augment", "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["augment"]["milliseconds a clip"]["median"]
    assert {"gain_db", "noise_snr_db", "speed", "spec_augment", "mix"} < set(figures) and positive(figures)


@pytest.mark.slow
def test_saving_and_loading_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "checkpoint", "--model", "sandbox")
    saves, loads = result["save"], result["load"]
    assert {method: set(save["median"]) for method, save in saves.items()} == {
        "earwitness": TRAINING,
        "dcp": TRAINING,
        "deepspeed": WAITING,
        "earwitness sync": WAITING,
        "dcp sync": WAITING,
    }
    assert set(loads) == {"earwitness 2 -> 2", "deepspeed 2 -> 2", "earwitness 2 -> 3"}
    assert all(positive(save["median"]) and positive(save["first"]) for save in saves.values())
    assert all(positive(load["median"]) for load in loads.values())
    assert set(result["aims"]) == {"blocking", "load"}


@pytest.mark.slow
def test_exports_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "export", "--model", "sandbox")
    for export in result["export"].values():
        figures = export["median"]
        assert set(figures) == {"total_seconds", "import_seconds", "work_seconds", "peak_gigabytes"}
        assert positive(figures)
    assert set(result["aims"]) == {"export time", "export work", "export memory"}


@pytest.mark.slow
def test_starts_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "index", "--samples", 2000, "--shards", 20, "--procs", 2)
    assert set(result["first start"]["merge"]["median"]) == {"seconds", "peak_megabytes"}
    assert set(result["later start"]) == {"ranks 1", "ranks 2"}
    assert all(start["median"][aim] > 0 for start in result["later start"].values() for aim in result["aims"])


@pytest.mark.slow
def test_restarts_are_measured(tmp_path: Path) -> None:
    parts = bench(tmp_path, "start", "--backend", "fsdp2")["start"]
    seconds = {part: figures["median"]["fsdp2"] for part, figures in parts.items()}
    total = seconds.pop("total")
    assert list(seconds)[:3] == ["launch", "interpreter", "torch"] and list(seconds)[-1] == "first_step"
    assert sum(seconds.values()) == pytest.approx(total) and all(part >= 0 for part in seconds.values())


@pytest.mark.slow
def test_readers_are_measured(tmp_path: Path) -> None:
    form = "flac-10s-16k-mono"
    places = ("local", "s3-far")
    options = ["--clips", 32, "--format", form, "--place", places[0], "--place", places[1]]
    result = bench(tmp_path, "data", *options)
    installed = {name for name in ("datasets", "litdata") if f"skipped {name}" not in result}
    readers = {"earwitness", "waveforms", "webdataset"} | installed
    assert set(result["data"]) == {f"{form}, {place}, {reader}" for place in places for reader in readers}
    for name, reading in result["data"].items():
        figures = reading["median"]
        assert positive(figures) and figures["distinct_samples"] == 32
        assert "waveforms" in name or figures["largest_mel_difference"] < 1e-3


@pytest.mark.slow
def test_balance_is_measured() -> None:
    options = ["--samples", 20_000, "--steps", 64, "--rounds", 1, "--json"]
    done = run_program("tools.bench", "balance", *options)
    assert done.returncode == 0, done.stderr
    by_ranks = {name: table["median"] for name, table in json.loads(done.stdout)["balance"].items()}
    assert set(by_ranks) == {f"ranks {ranks}" for ranks in (2, 4, 8, 16, 32, 64)}
    eight, all_alone = by_ranks["ranks 8"], by_ranks["ranks 64"]
    assert eight["fullest_balanced"] < 1.05 < eight["fullest_as_shuffled"]
    assert 0 < eight["share_moved"] < 0.15 and all_alone["share_moved"] == 0


@pytest.mark.slow
def test_steps_are_measured(tmp_path: Path) -> None:
    result = bench(tmp_path, "step", *TINY_STEPS, "--window", "full", "monitor.spike_sigma=7", rounds=())
    step = result["step"]["sandbox"]
    assert set(step["median"]) >= STEP and positive(step["median"])
    assert len(step["rounds"]) == 2
    assert step["median"]["useful_mfu"] < 0.9 * step["median"]["mfu"]  # most clips are shorter than 30 s
    assert result["data.window"] == "full" and result["first_step_seconds"] > 0
    assert set(result["device"]["alone"]["median"]) == {
        "matrix_tflops",
        "attention_tflops",
        "log_mel_milliseconds",
    }


@pytest.mark.slow
def test_scaling_is_measured(tmp_path: Path) -> None:
    options = (*TINY_STEPS, "--ranks", "1,2", "--full-share", 0, "monitor.peak_tflops=1")
    scaling = bench(tmp_path, "scaling", *options, rounds=())["scaling"]
    assert scaling["ranks 1"]["median"]["efficiency"] == pytest.approx(1)
    of_two = scaling["ranks 2"]["median"]
    one, two = (scaling[f"ranks {number}"]["median"]["samples_per_second"] for number in (1, 2))
    assert of_two["efficiency"] == pytest.approx(two / one / 2)
    assert of_two["useful_mfu"] == pytest.approx(of_two["mfu"], rel=1e-3)  # nothing is padded


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper with random weights."""
    folder = make_model(tmp_path_factory.mktemp("whisper"))
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips of two sources, of 44.1 kHz stereo, too, a table for each."""
    folder = tmp_path_factory.mktemp("tables")
    for source, numbers in {"high": range(12), "low": range(12, 24)}.items():
        rows = []
        for number in numbers:
            rate = (16_000, 44_100)[number % 2]
            file = f"{number}.wav"
            soundfile.write(folder / file, sound_of(number, rate, channels=1 + number % 2), rate)
            split = "validation" if number % 4 == 0 else "train"
            rows.append({"file": file, "caption": caption_of(number), "split": split})
        with (folder / f"{source}.csv").open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: with more, clips as short take 50 times as long where other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_the_judge_gives_the_mean_loss_of_a_caption_token_at_full_windows(
    whisper: Path, tables: Path
) -> None:
    clips = clips_of(tables, "validation")
    assert [clip.file.stem for clip in clips] == ["0", "4", "8", "12", "16", "20"]
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    processor = WhisperProcessor.from_pretrained(whisper, language="en", task="transcribe")
    losses: dict[str, list[float]] = {"high": [], "low": []}
    for clip in clips:
        audio, _ = soundfile.read(clip.file)
        features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
        assert features.shape[-1] == 200, "the whole window of 2 s"
        tokens = processor.tokenizer(
            clip.caption
        ).input_ids  # start, <|en|>, <|transcribe|>, <|notimestamps|>
        logits = model(features, decoder_input_ids=torch.tensor([tokens])).logits[0].double()
        for place in range(4, len(tokens)):
            losses[clip.source].append(-float(logits[place - 1].log_softmax(-1)[tokens[place]]))
    expected = {"loss": np.mean(losses["high"] + losses["low"])}
    expected |= {f"loss/{source}": np.mean(values) for source, values in losses.items()}
    assert judge(whisper, clips) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("batch.globalsize=4", "did you mean 'global_size'?"),
        ("run.seed=5", "run. is for the comparison to say: --seeds"),
        ("data.sources.high.style='A tone", "No closing quotation"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(
    whisper: Path, tables: Path, tmp_path: Path, way: str, words: str
) -> None:
    comparison = Comparison(tmp_path, Recipe(str(whisper), str(tables), 3, 0, 1e-4), captions=False)
    style = "data.sources.high.style='A tone.'"
    comparison.check(Method(Which.ours, "own", 0.2, overrides=f"optim.lr=1e-5 {style}"))
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        comparison.check(Method(Which.ours, "own", 0.2, overrides=way))
    assert str(refused.value).startswith(f"--with {way!r}: ")


@pytest.mark.slow
def test_training_is_compared_in_parts(whisper: Path, tables: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    options = (whisper, tables, "--max-steps", 3, "--seeds", "3", "--out", out)
    ours = bench(work, "compare", *options, "--only", "ours", rounds=())
    assert set(ours["methods"]) == {"own windows, 0.2 full"} and not ours["aims"]
    if not importlib.util.find_spec("accelerate"):
        pytest.skip("accelerate is not installed: pip install accelerate")
    both = bench(work, "compare", *options, rounds=())
    (first,) = ours["methods"]["own windows, 0.2 full"]["runs"]
    assert both["methods"]["own windows, 0.2 full"]["runs"] == [first], "it was not trained again"
    (theirs,) = both["methods"]["Seq2SeqTrainer"]["runs"]
    # 18 clips: a step of 16, one of 2, and one of 16
    assert [(run["steps"], run["samples"]) for run in (first, theirs)] == [(3, 34), (3, 34)]
    assert set(first["losses"]) == set(theirs["losses"]) == {"loss", "loss/high", "loss/low"}
    untrained = judge(whisper, clips_of(tables, "validation"))["loss"]
    assert first["losses"]["loss"] < untrained and theirs["losses"]["loss"] < untrained
    assert len(both["aims"]) == 2
    way = "batch.global_size=8 data.sources.high.style=tone"
    other = bench(work, "compare", *options, "--only", "ours", "--with", way, "--captions", rounds=())
    (run,) = other["methods"][f"own windows, 0.2 full, {way}"]["runs"]
    assert (run["steps"], run["samples"]) == (3, 18)
    assert {"cider_d", "cider_d/high", "discrimination/low"} <= set(run["scores"])


def test_results_are_kept_and_told_apart_by_what_was_trained(tmp_path: Path) -> None:
    recipe = Recipe("tiny.en", "clips", epochs=3, max_steps=0, lr=5e-5)
    own, theirs = Method(Which.ours, "own", 0.2), Method(Which.trainer, "full")
    done = Trained(own, 1, recipe, {"cores": 2}, steps=3, samples=34, seconds=2.0, losses={"loss": 0.5})
    Results(tmp_path / "new/results.jsonl").add(done)
    again = Results(tmp_path / "new/results.jsonl")
    have = functools.partial(again.have, captions=False)
    assert again.of(recipe) == [done] and have(own, 1, recipe)
    assert not have(own, 2, recipe) and not have(theirs, 1, recipe)
    assert not have(own, 1, dataclasses.replace(recipe, lr=1e-4))
    assert not have(dataclasses.replace(own, overrides="optim.lr=1e-4"), 1, recipe)
    assert not again.have(own, 1, recipe, captions=True), "its captions were not scored"
    scored = dataclasses.replace(done, scores={"cider_d": 4.4})
    again.add(scored)
    assert again.of(recipe) == [scored] and again.have(own, 1, recipe, captions=True)


def test_clips_are_as_long_as_the_reference_has_them() -> None:
    random = np.random.default_rng(0)
    seconds = {source: [_draw_seconds(random, source) for _ in range(1000)] for source in SHARES}
    mean = sum(SHARES[source] * np.mean(seconds[source]) for source in SHARES) / sum(SHARES.values())
    assert set(seconds["audioset"]) == {10.0} and set(seconds["music"]) == {30.0}
    assert min(map(min, seconds.values())) >= 0.5 and max(map(max, seconds.values())) <= 30
    assert mean == pytest.approx(12.3, abs=0.5)


def test_a_trace_tells_how_long_a_gpu_was_idle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def event(category: str, name: str, begin: float, length: float) -> dict:
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length}

    events = [
        event("kernel", "product", 100, 400),
        event("gpu_memcpy", "copy", 300, 300),  # at the same time as the product, and longer
        event("kernel", "product", 610, 190),  # after 10 us
        event("kernel", "sum", 1000, 100),  # after 200 us
        event("cuda_runtime", "cudaStreamSynchronize", 0, 5000),
        {"ph": "i", "name": "no length", "ts": 0},
    ]
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    idle = trace.idle(trace.read(file))
    assert idle["milliseconds"] == pytest.approx(1.0)
    assert idle["idle_share"] == pytest.approx(0.21) and idle["idle_share_in_long_gaps"] == pytest.approx(0.2)
    trace.bench_trace(file)
    told = capsys.readouterr().out
    assert "product" in told and "cudaStreamSynchronize: 5.0 ms" in told


def test_a_trace_without_a_gpu_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    event = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1}
    file.write_text(json.dumps({"traceEvents": [event]}), encoding="utf-8")
    with pytest.raises(DataError, match="no kernels"):
        trace.read(file)
