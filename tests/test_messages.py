"""Bad input ends in one paragraph that says what, where and what to do, with the right exit code; and what
can be used is not lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import ExitCode
from configs.load import validate
from configs.run.folder import RunDir
from configs.run.lease import claim
from data import dataset
from data.decode import BadSample, Skipped, decode
from tests.making import ROOT, config_values, make_clips, make_model, run_program
from trainer import checkpoint

CLIPS = 24


def config(folder: Path, model: Path, shards: object, **sections: dict[str, object]) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump(config_values("run", folder, model, str(shards), **sections)), encoding="utf-8"
    )
    return path


def pack(folder: Path, numbers: range = range(CLIPS)) -> Path:
    """A shard of sound clips."""
    done = run_program("tools.pack", make_clips(folder / "clips", numbers), folder / "shards")
    assert done.returncode == 0, done.stderr
    return folder / "shards/shard-000000.tar"


def refused(code: int, *arguments: object, **environment: str) -> str:
    """Run a command that must fail with this exit code and one message; returns that."""
    done = run_program(*arguments, env=environment)
    print(done.stderr)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'?"),
        (
            "batch.global_size=many",
            (
                "batch.global_size: Input should be a valid integer, unable to parse string as an integer"
                " (got 'many')"
            ),
        ),
        ("optim.lr=0", "optim.lr: Input should be greater than 0 (got 0)"),
        ("data.overlong=cut", "data.overlong: Input should be 'skip', 'start' or 'crop' (got 'cut')"),
    ],
)
def test_a_key_that_is_unknown_or_of_another_type(
    tmp_path: Path, model: Path, override: str, said: str
) -> None:
    assert said in refused(ExitCode.USAGE, "launch", "config", config(tmp_path, model, "x.tar"), override)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ("absent.tar", "absent.tar: cannot read its size: it does not exist. Check the path"),
        (
            "*.tar",
            "source sounds: {folder}/*.tar matches no shard. Quote the pattern in the shell. Check the path",
        ),
        (
            "clips.tar.gz",
            "clips.tar.gz: compressed shards cannot be read at any position; unpack it to a plain .tar",
        ),
        ("page.tar", "page.tar: not a tar archive that can be read"),
        ("set", "set: cannot read bytes 0-4096: it is a folder. `{folder}/set/*.tar` names the shards in it"),
    ],
)
def test_shards_that_are_not_there_or_are_none(tmp_path: Path, model: Path, shards: str, said: str) -> None:
    (tmp_path / "page.tar").write_bytes(b"<html>404 Not Found</html>" * 100) if shards == "page.tar" else None
    (tmp_path / "set").mkdir()
    message = refused(ExitCode.DATA, "launch", "train", config(tmp_path, model, tmp_path / shards))
    assert said.format(folder=tmp_path) in message
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_missing_caption_key_names_source_sample_and_the_keys_that_are_there(
    tmp_path: Path, model: Path, shards: str, launch
) -> None:
    values = config_values("run", tmp_path, model, shards)
    values["data"]["sources"] = [{**values["data"]["sources"][0], "caption_key": "text.en"}]
    done = launch(values)
    assert done.returncode == ExitCode.DATA
    assert (
        "no caption under 'text.en' (keys there: licence, caption), e.g. sounds/shard-000000.tar/clip"
        in done.stderr
    )
    assert "is data.sources.NAME.caption_key right?" in done.stderr
    reasons = [sample.reason for sample in RunDir(tmp_path / "run").quarantine.read().samples]
    assert reasons and all(
        "no caption under 'text.en' (keys there: licence, caption)" in reason for reason in reasons
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of sound clips between which there are bad ones of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    with tarfile.open(pack(folder), "a", encoding="utf-8") as archive:

        def add(key: str, audio: bytes, caption: str = "A beep.", ending: str = "flac") -> None:
            for name, content in (
                (f"{key}.{ending}", audio),
                (f"{key}.json", json.dumps({"caption": caption}).encode()),
            ):
                (folder / "member").write_bytes(content)
                archive.add(folder / "member", name)

        def flac(samples: np.ndarray) -> bytes:
            soundfile.write(folder / "x.flac", samples, 16_000)
            return (folder / "x.flac").read_bytes()

        noise = flac(np.random.default_rng(0).uniform(-0.3, 0.3, 16_000))
        add("empty", b"")
        add("nothing", b"RIFF", ending="wav")
        add("cut", noise[: len(noise) // 2])
        add("page", b"<html>404 Not Found</html>", ending="mp3")
        add("long", flac(np.zeros(1800 * 16_000, np.int16)))
        add("mute", noise, " ")
        add("wordy", noise, "A beep, " * 100)
    return folder / "shards/shard-000000.tar"


def test_bad_audio_and_captions_are_named_and_the_others_are_trained_on(
    tmp_path: Path, model: Path, mixed: Path, launch
) -> None:
    path = config(
        tmp_path,
        model,
        mixed,
        optim={"max_steps": None, "epochs": 1},
        evaluate={"captions": 0},
        data={"audit": True, "threads": 1},
    )
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["data"] |= {
        "sources": [{"name": "sounds", "shards": [str(mixed)]}],
        "index_dir": str(tmp_path / "index"),
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = launch(path)
    assert done.returncode == 0, done.stderr
    quarantined = {
        sample.key.rsplit("/", 1)[1]: sample.reason
        for sample in RunDir(tmp_path / "run").quarantine.read().samples
    }
    assert quarantined.keys() == {"nothing", "cut", "page", "long", "mute"}
    assert (
        "cannot be decoded" in quarantined["nothing"]
        and "cannot be decoded" in quarantined["cut"]
        and quarantined["page"].startswith("the audio is a web page")
    )
    assert quarantined["mute"] == "the caption is empty"
    too_long = "the audio has 1800.0 s, 2 s fit (data.overlong: start or crop would take a part)"
    assert quarantined["long"] == too_long
    told = run_program("tools.inspect", tmp_path / "run").stdout
    assert (
        "source sounds: 1 x the audio has N s, N s fit (data.overlong: start or crop would take a part); e.g."
        " sounds/shard-000000.tar/long" in told
    )
    curves = EventAccumulator(str(tmp_path / "run/tensorboard"))
    curves.Reload()
    assert curves.Scalars("unusable_samples/sounds")[-1].value == 4  # not what is left out for its length
    table = curves.Tensors("unusable_samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| sounds | 1 | the caption is empty | sounds/shard-000000.tar/mute |" in table
    assert "1 of 31 samples are left out, e.g. because of this: the audio is empty (0 bytes)" in done.stdout
    assert (
        "sounds/shard-000000.tar/wordy: its caption is" in done.stdout
        and "tokens too long; they are cut off" in done.stdout
    )
    trained = [
        key
        for file in (tmp_path / "run/audit").iterdir()
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())
        for key in line["keys"]
    ]
    assert len(trained) == CLIPS + 1, "all sound clips and the wordy one"

    inspected = run_program("tools.inspect", path)
    assert (
        inspected.returncode == 0
        and "1 x the audio is empty (0 bytes); e.g. shard-000000.tar/empty" in inspected.stdout
    ), inspected.stderr
    indexed = run_program("tools.index", path)
    assert "long" not in indexed.stdout and "mute: the caption is empty" in indexed.stdout
    lines = dataset.build(validate(values, "test"), tmp_path, 2.0).lines
    assert any(
        "source sounds: 1 of 26 clips (3.8 %), 30 min of 30 min (98.8 %), are longer than 2 s and left out;"
        " data.overlong=start would take the beginning of each" in line
        for line in lines
    )


def test_half_an_hour_takes_no_more_memory_than_what_is_used_of_them(mixed: Path) -> None:
    with tarfile.open(mixed) as archive:
        content = archive.extractfile("long.flac").read()  # type: ignore[union-attr]

    def skip(seconds: float) -> None:
        raise Skipped(f"{seconds:g} s")

    tracemalloc.start()
    with pytest.raises(Skipped, match="1800 s"):
        decode(content, "flac", skip)
    assert len(decode(content, "flac", lambda seconds: (seconds - 2.5, 2.0))) == 32_000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("wav", r"cut off: .* bytes are there"),
        ("mp3", r"cut off: .* of 10.0 s are there"),
        ("flac", "cannot be decoded"),
    ],
)
def test_half_an_audio_file_is_a_bad_sample(tmp_path: Path, ending: str, said: str) -> None:
    soundfile.write(tmp_path / f"x.{ending}", np.random.default_rng(0).uniform(-0.3, 0.3, 160_000), 16_000)
    content = (tmp_path / f"x.{ending}").read_bytes()
    with pytest.raises(BadSample, match=said):
        decode(content[: len(content) // 2], ending)


@pytest.mark.parametrize(
    ("rest", "said"), [(b"", "is cut off"), (b"\xff" * 512, "is damaged")], ids=["cut off", "overwritten"]
)
def test_of_a_damaged_tar_the_samples_before_the_damage_are_kept_and_the_loss_is_reported(
    tmp_path: Path, shards: str, rest: bytes, said: str
) -> None:
    whole = min(Path(shards).parent.glob("*.tar"))
    with tarfile.open(whole) as archive:
        at = archive.getmembers()[20].offset  # ten samples of two members are before it
    content = whole.read_bytes()
    (tmp_path / "mine.tar").write_bytes(
        content[:at] + rest + content[at + 512 :] if rest else content[: at + 100]
    )
    done = run_program("tools.index", tmp_path / "mine.tar", "--index-dir", tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/mine.tar: DAMAGED: " in done.stdout and said in done.stdout
    assert (
        "10 samples before that are kept, what came after is lost" in done.stdout
        and "1 shards, 10 samples" in done.stdout
    )


@pytest.mark.slow
def test_a_shard_that_changed_is_indexed_anew_and_a_run_on_it_is_not_taken_up(
    tmp_path: Path, model: Path
) -> None:
    shard = pack(tmp_path / "old")
    path = config(tmp_path, model, shard, optim={"max_steps": 1}, evaluate={"captions": 0, "max_samples": 1})
    assert run_program("launch", "train", path).returncode == 0
    shutil.copy(pack(tmp_path / "new", range(CLIPS, 2 * CLIPS)), shard)
    other = make_model(tmp_path / "other", width=96)
    done = run_program("launch", "train", path, "optim.max_steps=2", f"model.name_or_path={other}")
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert f"{shard}: changed since it was indexed; it is indexed anew" in done.stdout
    assert "going on from here would not be the same run, because these changed:" in done.stderr
    assert f"model.name_or_path: {model} -> {other}" in done.stderr
    assert (
        "index (the samples, by digest: a shard was added, removed, changed, or indexed in full after a quick"
        " look): " in done.stderr
    )
    assert "start a new run with another run.name" in done.stderr

    shutil.copy(pack(tmp_path / "again"), shard)
    frozen = refused(ExitCode.USAGE, "launch", "train", path, "model.freeze=[model.encoder]")
    assert 'model.freeze: [] -> ["model.encoder"]' in frozen

    shutil.copy(other / "config.json", tmp_path / "run/base/config.json")
    message = refused(1, "tools.export", tmp_path / "run", tmp_path / "out")
    assert "has the shape" in message and "of another model" in message and not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if mounted.returncode:
        assert not os.environ.get("CI"), f"CI must be able to mount a small file system: {mounted.stderr}"
        pytest.skip(f"only root can mount a small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle_of_a_save(
    tmp_path: Path, model: Path, shards: str, small_disk: Path
) -> None:
    path = config(
        tmp_path,
        model,
        shards,
        run={"dir": str(small_disk / "run")},
        optim={"max_steps": 3},
        evaluate={"captions": 0, "max_samples": 1},
        checkpoint={"every_steps": 1, "keep_last": 3},
    )
    message = refused(1, "launch", "train", path)
    assert "cannot write the checkpoint of step" in message and "No space left on device" in message
    assert "Earlier checkpoints are intact; make room or mend the folder, and start again." in message
    (kept,) = checkpoint.find(RunDir(small_disk / "run").checkpoints)
    assert not checkpoint.Reader(kept).verify() and not list(kept.parent.glob("*.tmp"))


def test_a_port_in_use(tmp_path: Path, model: Path, shards: str) -> None:
    config = validate(config_values("run", tmp_path, model, shards), "test")
    run = RunDir.create(config)
    run.proposal.propose(config)
    lease = claim(run)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        message = refused(
            1,
            "launch.worker",
            run.path,
            lease.attempt,
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert (
        f"rank 0 cannot meet the others at 127.0.0.1:{port}: another program has taken that port; start again"
        in message
    )


@pytest.mark.slow
def test_a_validation_part_of_which_nothing_fits_is_told(
    tmp_path: Path, model: Path, shards: str, launch
) -> None:
    """Clips that are too long are not bad, but a loss of nothing is no loss; every rank has only some of the
    reasons."""
    (tmp_path / "long").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / f"long/{number}.flac", np.zeros(48_000), 16_000)
    (tmp_path / "long/clips.csv").write_text(
        "file,caption\n" + "".join(f"{number}.flac,Silence.\n" for number in range(3)), encoding="utf-8"
    )
    assert run_program("tools.pack", tmp_path / "long/clips.csv", tmp_path / "held-out").returncode == 0
    values = config_values("run", tmp_path, model, shards)
    values["data"]["sources"] = [
        {"name": "sounds", "shards": [shards], "validation": {"shards": [f"{tmp_path}/held-out/*.tar"]}}
    ]
    done = launch(values, procs=2)
    assert (
        done.returncode == ExitCode.DATA
        and "source sounds: none of its 3 validation samples can be used, and a loss of nothing is none"
        in done.stderr
    )
    assert "3 x the audio has 3.0 s, 2 s fit" in done.stderr and "caption_key" not in done.stderr
    assert "data.overlong=start (or crop)" in done.stderr


@pytest.mark.slow
def test_too_little_memory(tmp_path: Path, shards: str) -> None:
    large = make_model(
        tmp_path / "model", vocabulary=1_000_000
    )  # the scores of 50 captions of 30 tokens take 6 GB
    path = config(
        tmp_path,
        large,
        shards,
        batch={"global_size": 50, "micro_seconds": 50},
        evaluate={"captions": 0, "max_samples": 1},
    )
    limited = ["prlimit", f"--as={6 << 30}", sys.executable, "-m", "launch", "train", path]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    print(done.stderr)
    assert done.returncode == 1
    assert (
        "there is too little memory: " in done.stderr
        and "Lower batch.micro_seconds (50 now; it changes nothing but rounding)" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path, clips: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious", encoding="utf-8")
    assert "out: exists and is not empty; remove it or choose another folder" in refused(
        ExitCode.USAGE, "tools.pack", clips, tmp_path / "out"
    )
    assert (tmp_path / "out/mine.txt").read_text(encoding="utf-8") == "precious"
