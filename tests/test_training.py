"""The whole way on one machine, through the command line, as people use it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import soundfile
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

from configs.errors import ConfigError, DataError
from configs.load import load
from configs.run.events import Evaluated, RankFailed, Skipped
from configs.run.folder import RunDir
from launch import doctor
from launch.submit import submit_run
from tests import refusals
from tests import shards as small
from tests.making import ROOT, audit, caption_of, config_values, make_clips, make_model, run_program, sound_of
from tools.export import export
from tools.sandbox import faults
from tools.sandbox.faults import Fault
from trainer.checkpoint import Reader, find


def write_config(folder: Path, values: dict[str, object]) -> Path:
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train(
    config: Path, *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_program("launch", "train", config, *arguments, env=env)


def start_training(config: Path, procs: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "train", str(config), "--procs", str(procs)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


def wait_for(process: subprocess.Popen[str], pattern: str) -> None:
    """Read the output up to a line."""
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return
    pytest.fail(f"no line {pattern!r}: {process.communicate()[1]}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = Reader(find(RunDir(run).checkpoints)[0])
    return {
        f"{name}:{kind}": reader(name, kind, 0, reader.tensor(name).numel())
        for name in reader.manifest.parameters
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of 40 steps on 2 processes, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    monitor = {"every_steps": 1, "peak_tflops": 0.1}
    config = write_config(
        folder,
        config_values(
            "run",
            folder,
            model,
            shards,
            optim={"max_steps": 40},
            evaluate={"every_steps": 20},
            monitor=monitor,
        ),
    )
    done = train(config, "--procs", 2)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


@pytest.fixture(scope="module")
def exported(finished) -> Path:
    """Its fp32 export."""
    folder = finished[0].parent / "export"
    done = run_program("tools.export", finished[0], folder)
    assert done.returncode == 0 and f"{folder}: step" in done.stdout, done.stderr
    return folder


def test_training_learns_and_says_so(finished) -> None:
    run, done = finished
    evaluations = [event.metrics["validation/loss"] for event in RunDir(run).ledger.read().of(Evaluated)]
    assert len(evaluations) == 3 and evaluations[-1] < 0.7 * evaluations[0]
    assert re.search(r"step 40/40  loss \d\.\d+  grad norm .* samples/s  MFU \d+\.\d%", done.stdout)
    assert done.stdout.count("holds no weights: training starts at random (run.seed=") == 1


def test_tensorboard_shows_curves_and_a_panel_with_audio(finished) -> None:
    run, _ = finished
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"audio": 0, "tensors": 0})
    events.Reload()
    expected = {
        "loss",
        "loss/sounds",
        "grad_norm",
        "learning_rate",
        "speed/mfu",
        "speed/samples_per_second",
        "speed/audio_seconds_per_second",
        "speed/data_wait_share",
    }
    assert expected | {"memory/host_gb", "validation/loss", "validation/loss/sounds"} <= set(
        events.Tags()["scalars"]
    )
    assert [point.step for point in events.Scalars("loss")] == list(range(1, 41))
    # What a clip is never changes: it is written once, and what is said of it at each evaluation.
    assert [point.step for point in events.Audio("panel/0")] == [0]
    assert [point.step for point in events.Images("panel/0/log_mel")] == [0]
    texts = [point.tensor_proto.string_val[0].decode() for point in events.Tensors("panel/1/text_summary")]
    assert len(texts) == 3 and all("**said**" in text and "**reference**" in text for text in texts)


@pytest.mark.parametrize("procs", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_the_same_run(
    finished, tmp_path: Path, model: Path, shards: str, launch, procs: int
) -> None:
    """Ctrl-C saves and exits with 85; the same command goes on with the same samples, and on as many
    processes bit for bit."""
    config = write_config(
        tmp_path,
        config_values("run", tmp_path, model, shards, optim={"max_steps": 40}, evaluate={"every_steps": 20}),
    )
    process = start_training(config, 2)
    wait_for(process, r"^step 4/40")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 85
    stopped = Reader(find(RunDir(tmp_path / "run").checkpoints)[0]).manifest.step
    assert 4 <= stopped < 40
    again = launch(config, procs=procs)
    assert again.returncode == 0, again.stderr
    assert f"resumes at step {stopped}" in again.stdout
    expected, found = weights(finished[0]), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    if procs == 2:
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert audit(tmp_path / "run") == audit(finished[0])


def test_a_killed_rank_ends_all_and_is_named_last(tmp_path: Path, model: Path, shards: str) -> None:
    config = write_config(
        tmp_path,
        config_values("run", tmp_path, model, shards, optim={"max_steps": 10_000}, evaluate={"captions": 0}),
    )
    process = start_training(config, 2)
    wait_for(process, r"^step 3/")
    ranks = [
        child
        for child in psutil.Process(process.pid).children()
        if "launch.worker" in " ".join(child.cmdline())
    ]
    next(child for child in ranks if child.environ()["RANK"] == "1").kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in said.strip().splitlines()[-1]
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks)


def test_bad_data_on_one_rank_ends_all_with_its_message(
    tmp_path: Path, model: Path, clips: Path, launch
) -> None:
    """A sample that is not what was indexed: exit code 3, and the paragraph names shard and sample."""
    run_program("tools.pack", clips, tmp_path / "shards")
    run_program("tools.index", tmp_path / "shards/shard-000000.tar", "--index-dir", tmp_path / "index")
    shard = tmp_path / "shards/shard-000000.tar"
    times, content = shard.stat(), bytearray(shard.read_bytes())
    at = content.index(b"fLaC")
    content[at + 600] ^= 0xFF
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = launch(
        config_values("run", tmp_path, model, str(shard), optim={"max_steps": None, "epochs": 1}), procs=2
    )
    assert done.returncode == 3
    assert (
        "CRC32 differs" in done.stderr and "shard-000000.tar" in done.stderr and "tools.index" in done.stderr
    )
    assert "Traceback" not in done.stderr
    (failed,) = RunDir(tmp_path / "run").ledger.read().of(RankFailed)
    assert "CRC32 differs" in failed.message, "who only leaves with it is not written down as a failure"


@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_gradients_that_are_not_finite_are_skipped_and_then_end_the_run(
    tmp_path: Path, model: Path, shards: str, launch, backend: str
) -> None:
    """The steps are consumed: their samples are named, and do not come again."""
    optim = {"max_steps": 50, "lr": 1e38, "max_skips": 2}
    values = config_values(
        "run",
        tmp_path,
        model,
        shards,
        optim=optim,
        evaluate={"captions": 0},
        engine={"backend": backend},
        checkpoint={"every_steps": 1},
    )
    done = launch(values, procs=2)
    assert (
        done.returncode == 1
        and "not finite 3 times in a row" in done.stderr
        and "Traceback" not in done.stderr
    )
    skips = RunDir(tmp_path / "run").ledger.read().of(Skipped)
    steps, keys = [line.step for line in skips], audit(tmp_path / "run")
    assert len(steps) == 3 and [line.keys for line in skips] == [keys[step] for step in steps]
    before = Reader(find(RunDir(tmp_path / "run").checkpoints)[0])
    assert before.manifest.step == steps[-1] and before.manifest.updates == steps[0] and before.verify() == []


def test_the_export_is_the_trained_model(finished, exported: Path, tmp_path: Path) -> None:
    """Loaded by transformers it has the trained weights, and works in a stock pipeline."""
    loaded = WhisperForConditionalGeneration.from_pretrained(exported)
    reader = Reader(find(RunDir(finished[0]).checkpoints)[0])
    trained = WhisperForConditionalGeneration(loaded.config)
    trained.load_state_dict({name: reader.tensor(name) for name in reader.manifest.parameters}, strict=False)
    trained.model.encoder.embed_positions.load_state_dict(loaded.model.encoder.embed_positions.state_dict())
    features, inputs = torch.randn(2, 80, 200), torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(
            loaded(input_features=features, decoder_input_ids=inputs).logits,
            trained(input_features=features, decoder_input_ids=inputs).logits,
        )
    assert (exported / "model.safetensors").stat().st_mode & 0o777 == (
        exported / "config.json"
    ).stat().st_mode & 0o777

    soundfile.write(tmp_path / "clip.wav", sound_of(1), 16_000)
    captioner = pipeline("automatic-speech-recognition", model=str(exported))
    by_tool = run_program("tools.caption", exported, tmp_path / "clip.wav", "--json", "--window", "full")
    audio = soundfile.read(tmp_path / "clip.wav", dtype="float32")[
        0
    ]  # given a path, the pipeline would want FFmpeg
    assert (
        captioner({"raw": audio, "sampling_rate": 16_000})["text"].strip()
        == json.loads(by_tool.stdout)["caption"]
        != ""
    )


@pytest.mark.slow
def test_bf16_export_repeats_the_captions_of_the_last_evaluation(
    finished, tmp_path: Path, clips: Path
) -> None:
    run, _ = finished
    last = RunDir(run).ledger.read().of(Evaluated)[-1]
    assert run_program("tools.export", run, tmp_path / "bf16", "--dtype", "bf16", "--best").returncode == 0
    for clip in last.captions:
        shutil.copy(next(clips.parent.glob(clip["key"].rsplit("/", 1)[1] + ".*")), tmp_path)
    said = run_program("tools.caption", tmp_path / "bf16", *sorted(tmp_path.glob("clip*")), "--json")
    captions = {
        Path(line["path"]).stem: line["caption"] for line in map(json.loads, said.stdout.splitlines())
    }
    assert captions == {clip["key"].rsplit("/", 1)[1]: clip["caption"] for clip in last.captions} != {}


def test_tokens_of_the_captions_can_be_said_after_export(exported: Path) -> None:
    """Quotes and colons are in the captions, brackets are not: only what was learnt is no longer
    suppressed."""
    tokenizer = WhisperProcessor.from_pretrained(exported).tokenizer
    suppressed = set(
        WhisperForConditionalGeneration.from_pretrained(exported).generation_config.suppress_tokens
    )
    learnt = {
        token
        for number in range(60)
        for token in tokenizer(caption_of(number), add_special_tokens=False)["input_ids"]
    }
    assert suppressed and not suppressed & learnt
    assert tokenizer.convert_tokens_to_ids(":") in learnt


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("generation_config.json", "no_timestamps_token_id", 1, "by tokenizer and config.json it is"),
        ("processor_config.json", "feature_extractor", {"feature_size": 128}, "feature_size=128 there, 80"),
    ],
)
def test_no_export_is_made_with_what_another_model_has_beside_its_weights(
    finished, tmp_path: Path, file: str, key: str, value: object, said: str
) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    values = json.loads((run / "base" / file).read_text(encoding="utf-8"))
    (run / "base" / file).write_text(json.dumps({**values, key: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        export(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_written_over_a_folder(finished, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious", encoding="utf-8")
    done = run_program("tools.export", finished[0], tmp_path / "out")
    assert done.returncode == 2 and "not empty" in done.stderr and (tmp_path / "out/mine.txt").exists()


@pytest.mark.slow
def test_an_export_to_s3_is_the_export_to_a_folder(finished, exported: Path, s3_server) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="exports")
    done = run_program("tools.export", finished[0], "s3://exports/export", env=s3_server.environment)
    assert done.returncode == 0 and "s3://exports/export: step" in done.stdout, done.stderr
    found = [item["Key"] for item in client.list_objects_v2(Bucket="exports")["Contents"]]
    there = {
        key.removeprefix("export/"): client.get_object(Bucket="exports", Key=key)["Body"].read()
        for key in found
    }
    assert there == {path.name: path.read_bytes() for path in exported.iterdir()}
    refused = run_program("tools.export", finished[0], "s3://exports/export", env=s3_server.environment)
    assert refused.returncode == 2 and "not empty" in refused.stderr


@pytest.mark.slow
def test_from_s3_the_same_samples_come_in_the_same_order(
    finished, tmp_path: Path, model: Path, shards: str, s3_server, launch
) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="clips")
    for shard in Path(shards).parent.glob("*.tar"):
        client.upload_file(str(shard), "clips", f"train/{shard.name}")
    config = write_config(
        tmp_path,
        config_values(
            "run",
            tmp_path,
            model,
            "s3://clips/train/*.tar",
            optim={"max_steps": 40},
            evaluate={"captions": 0, "every_steps": 100},
        ),
    )
    unindexed = launch(config, env=s3_server.environment)
    assert unindexed.returncode == 3 and "python -m tools.index" in unindexed.stderr
    indexed = run_program("tools.index", config, env=s3_server.environment)
    assert indexed.returncode == 0 and "60 samples" in indexed.stdout, indexed.stdout + indexed.stderr
    failing = [
        Fault(kind, times=0, share=0.01, after=after)
        for kind, after in (("reset", 5000), ("close", 5000), ("503", 0), ("500", 0), ("flip", 5000))
    ]
    with faults.serve(s3_server.endpoint, failing) as proxy:  # one in twenty requests fails
        # fsspec cannot be forked; a request for each sample
        done = train(
            config,
            "data.read_ahead_mb=1",
            "--procs",
            2,
            env={**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint},
        )
        assert done.returncode == 0, done.stderr
        print(
            f"{sum(proxy.hits.values())} of {len(proxy.requests)} requests failed:"
            f" {[(fault.kind, count) for fault, count in proxy.hits.items()]}"
        )
        assert sum(proxy.hits.values()) > 3
    assert audit(tmp_path / "run") == audit(finished[0])
    wrong = launch(
        config,
        "run.name=other",
        f"run.dir={tmp_path}/other",
        env={**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"},
    )
    assert wrong.returncode == 3 and "credentials" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_shape_of_turbo_passes_through_everything(tmp_path: Path) -> None:
    """128 mels and a vocabulary of 51,866, as large-v3-turbo has: pack, train, export, caption."""
    small = make_model(tmp_path / "model", mels=128, vocabulary=51_866)
    table = make_clips(tmp_path / "clips", range(12))
    assert run_program("tools.pack", table, tmp_path / "shards").returncode == 0
    values = config_values("run", tmp_path, small, f"{tmp_path}/shards/*.tar", optim={"max_steps": 2})
    values["model"]["gradient_checkpointing"] = True
    done = train(write_config(tmp_path, values))
    assert done.returncode == 0, done.stderr
    assert run_program("tools.export", tmp_path / "run", tmp_path / "out", "--dtype", "fp16").returncode == 0
    said = run_program("tools.caption", tmp_path / "out", tmp_path / "clips/clip0001.wav")
    assert said.returncode == 0 and said.stdout.startswith(str(tmp_path / "clips/clip0001.wav\t")), (
        said.stderr
    )


def test_doctor_gives_a_verdict(tmp_path: Path, model: Path, shards: str) -> None:
    done = run_program(
        "launch", "doctor", write_config(tmp_path, config_values("run", tmp_path, model, shards))
    )
    assert done.returncode == 0 and "verdict: ready to train" in done.stdout and "deepspeed" in done.stdout


def test_doctor_wants_no_base_model_of_a_run_that_has_a_checkpoint(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, config_values("run", tmp_path, tmp_path / "gone", shards))
    assert doctor.examine(path) == 1
    (tmp_path / "run/checkpoints/step-00000004").mkdir(parents=True)
    assert doctor.examine(path) == 0
    assert "verdict: mend model first" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["whole", "bare"])
def test_doctor_and_submit_read_of_each_source_as_a_size_alone_tells_little(
    tmp_path: Path,
    model: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    content = small.shard(tmp_path / "a.tar", small.clip("one")).read_bytes()
    with refusals.serve(content) as server:
        values = config_values("run", tmp_path, model, f"{server.url}/{name}/a.tar")
        path = write_config(tmp_path, values)
        assert doctor.examine(path) == 1
        with pytest.raises(DataError) as refused:
            submit_run(load(path, []), dry_run=True)
    said = {"whole": "this server gives no ranges", "bare": "the server redirects to nowhere"}[name]
    told = capsys.readouterr().out
    assert "verdict: mend source sounds first" in told and said in told
    assert said in str(refused.value)
