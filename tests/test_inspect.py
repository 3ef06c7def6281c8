"""`tools.inspect` tells what is in shards and checkpoints, and finds what is damaged."""

from __future__ import annotations

from pathlib import Path

import yaml

from configs.errors import ExitCode
from tests.making import caption_of, config_values, run_program
from tests.test_checkpoint import save


def test_shards_are_counted_and_shown(clips: Path, shards: str, tmp_path: Path) -> None:
    """60 clips of four formats, three sample rates, one or two channels, as tests/making.py writes them."""
    done = run_program("tools.inspect", *sorted(Path(shards).parent.glob("*.tar")), "--index-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("60 samples", "opened    60 of 60 samples", "problems  none"):
        assert words in done.stdout
    endings = ("flac x 15", "wav x 15", "ogg x 15", "mp3 x 15")
    rates = ("16,000 Hz x 20", "44,100 Hz x 20", "8,000 Hz x 20")
    for words in (*endings, *rates, "mono x 30", "stereo x 30"):
        assert words in done.stdout
    lengths = sorted(len(caption_of(number)) for number in range(60))
    assert f"shortest {lengths[0]}, " in done.stdout and f"longest {lengths[-1]} characters" in done.stdout
    assert "shortest 0.5, " in done.stdout and "longest 1.4 s" in done.stdout
    assert any(f"(0.5 s): {caption_of(number)}" in done.stdout for number in range(60))


def test_a_config_names_the_tokenizer_and_a_part_is_said_to_be_one(
    model: Path, shards: str, tmp_path: Path
) -> None:
    values = config_values("run", tmp_path, model, shards)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run_program("tools.inspect", tmp_path / "mine.yaml", "--samples", 10)
    assert done.returncode == 0, done.stderr
    assert "source sounds: 2 shards, 60 samples" in done.stdout
    assert "opened    10 of 60 samples, spread evenly (--samples 0 opens all)" in done.stdout
    assert " tokens\n" in done.stdout


def test_a_shard_that_is_cut_off_or_whose_captions_are_elsewhere_is_told(shards: str, tmp_path: Path) -> None:
    whole = min(Path(shards).parent.glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    options = ("--index-dir", tmp_path, "--caption-key", "text")
    done = run_program("tools.inspect", tmp_path / "cut.tar", *options)
    assert done.returncode == 0, done.stderr
    assert "DAMAGED" in done.stdout and "what came after is lost" in done.stdout
    assert "x no caption under 'text' (keys there: licence, caption); e.g. cut.tar/clip0000" in done.stdout


def test_every_byte_of_a_checkpoint_is_verified(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run/checkpoints", step, metrics={"validation/loss": 0.5 / step})
    sound = run_program("tools.inspect", tmp_path / "run")
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.count("every byte verified (XXH3)") == 2
    assert "step 2, 2 updates, 1 files, 72.0 MB" in sound.stdout
    assert "6,000,026 numbers in 3 parameters" in sound.stdout and "validation/loss 0.2500" in sound.stdout

    file = tmp_path / "run/checkpoints/step-00000002/rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    damaged = run_program("tools.inspect", file.parent)
    assert damaged.returncode == 1 and "1 blocks DAMAGED" in damaged.stdout
    assert f"{file}: damaged between bytes 67108864 and" in damaged.stderr
    assert "goes on from the newest sound one" in damaged.stderr


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    done = run_program("tools.inspect", tmp_path)
    assert done.returncode == ExitCode.USAGE
    assert "neither a checkpoint (no manifest.json) nor a run" in done.stderr
