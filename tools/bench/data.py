"""Clips made here, where they lie, and what each reader takes to make batches of them
(tools/bench/readers)."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from webdataset import ShardWriter

from configs.errors import EarwitnessError
from tools.bench.report import ROOT, Figures, environment, say, summary
from tools.sandbox import faults, s3
from tools.sandbox.whisper import make_whisper


class Reader(StrEnum):
    """The modules of tools/bench/readers."""

    earwitness = "earwitness"
    waveforms = "waveforms"
    webdataset = "webdataset"
    datasets = "datasets"
    litdata = "litdata"


NEEDED = {Reader.webdataset: "webdataset", Reader.datasets: "torchcodec", Reader.litdata: "litdata"}
"""A package that must be there."""
INSTALL = {
    Reader.datasets: "pip install datasets torchcodec==0.13.0",
    Reader.litdata: "pip install litdata; pip uninstall torchvision",
}
"""What is tried with torch 2.13 for CPUs: later torchcodecs need CUDA, and transformers does not import
beside the torchvision that litdata brings."""
SHARDS = 8
BUCKET = "bench"
FAR = faults.Fault("far", times=0, seconds=0.05, rate=75e6)


class Form(StrEnum):
    """Formats of clips."""

    speech = "flac-10s-16k-mono"
    mp3 = "mp3-10s-44k-stereo"
    music = "flac-30s-44k-stereo"

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """Ending, seconds, rate (Hz), channels."""
        return {
            Form.speech: ("flac", 10, 16_000, 1),
            Form.mp3: ("mp3", 10, 44_100, 2),
            Form.music: ("flac", 30, 44_100, 2),
        }[self]


class Place(StrEnum):
    """Where shards lie; `s3` and `far`: behind a proxy, which answers as the server does, or after 50 ms with
    75 MB/s per connection."""

    local = "local"
    s3 = "s3"
    far = "s3-far"


@dataclass(frozen=True)
class _Clips:
    """What `_make` has made: folders of tars and of litdata's chunks, and the file of the clip with the key
    000000."""

    shards: Path
    chunks: Path
    first: Path


def missing(wanted: Sequence[Reader]) -> dict[Reader, str]:
    """How to install the readers that are not installed."""
    return {
        reader: INSTALL[reader]
        for reader in wanted
        if reader in NEEDED and not importlib.util.find_spec(NEEDED[reader])
    }


def measure(
    folder: Path,
    clips: int,
    rounds: int,
    forms: Sequence[Form],
    places: Sequence[Place],
    readers: Sequence[Reader],
) -> dict[str, Any]:
    """Measure readers in turn. clips: a multiple of the batch. Returns summaries."""
    rows: dict[str, list[Figures]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name,
        s3.serve() as server,
        faults.serve(server.endpoint) as near,
        faults.serve(server.endpoint, [FAR]) as far,
    ):
        work = Path(name).resolve()
        model = make_whisper(work / "model", ["A bell rings twice."], seconds=30, mels=128)
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        reach = {
            Place.local: {},
            **{
                place: server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
                for place, proxy in ((Place.s3, near), (Place.far, far))
            },
        }
        for form in forms:
            say(f"{clips} clips: {form.value}")
            made = _make(work / form.value, form, clips, chunks=Reader.litdata in readers)
            if set(places) - {Place.local}:
                for file in filter(Path.is_file, (work / form.value).glob("*/*")):
                    client.upload_file(str(file), BUCKET, str(file.relative_to(work)))
            for place in places:
                root = str(work) if place is Place.local else f"s3://{BUCKET}"
                shards = [f"{root}/{file.relative_to(work)}" for file in sorted(made.shards.iterdir())]
                about = {
                    "model": str(model),
                    "shards": shards,
                    "chunks": f"{root}/{made.chunks.relative_to(work)}",
                    "ending": form.shape[0],
                }
                _run(["tools.index", *shards, "--index-dir", str(work / "index")], reach[place])
                for number, reader in itertools.product(range(rounds), readers):
                    say(f"round {number + 1}: {form.value}, {place.value}, {reader}")
                    with tempfile.TemporaryDirectory(dir=work) as run:
                        task = json.dumps(about | {"index_dir": str(work / "index"), "work": run})
                        said = _run(
                            ["tools.bench.readers", reader, task, str(clips), str(made.first)],
                            reach[place] | {"HF_HOME": run},
                        )
                    rows.setdefault(f"{form.value}, {place.value}, {reader}", []).append(
                        json.loads(said.splitlines()[-1])
                    )
            shutil.rmtree(work / form.value)
    return {name: summary(found) for name, found in rows.items()}


def _run(command: Sequence[str], variables: dict[str, str]) -> str:
    """What a module of ours prints in a fresh process. Raises EarwitnessError if it fails."""
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment() | threads | variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise EarwitnessError(f"{' '.join(command[:2])} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _make(folder: Path, form: Form, clips: int, *, chunks: bool) -> _Clips:
    """Write clips to SHARDS tars, and to chunks of litdata's if wanted."""
    ending, seconds, rate, channels = form.shape
    made = _Clips(folder / "shards", folder / "chunks", folder / "first")
    made.shards.mkdir(parents=True)
    random = np.random.default_rng(1)
    sound = _sound(random, 4 * seconds * rate)
    with ShardWriter(f"{made.shards}/%06d.tar", maxcount=-(-clips // SHARDS), verbose=0) as writer:
        for number in range(clips):
            starts = random.integers(3 * seconds * rate, size=channels)
            clip = np.stack([sound[start : start + seconds * rate] for start in starts], axis=1)
            file = io.BytesIO()
            soundfile.write(file, clip, rate, format=ending)
            if not number:
                made.first.write_bytes(file.getvalue())
            writer.write(
                {
                    "__key__": f"{number:06d}",
                    ending: file.getvalue(),
                    "json": {"caption": "A bell rings twice."},
                }
            )
    if chunks:
        from tools.bench.readers import litdata

        litdata.convert(made.shards, made.chunks)
    return made


def _sound(random: np.random.Generator, length: int) -> npt.NDArray[np.float64]:
    """Noise that falls by 3 dB per octave, as music does, and swells; as quiet as recordings are, of which
    FLAC gets smaller."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    wave = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1000), length)
    return wave / np.abs(wave).max() * (0.055 + 0.04 * np.sin(np.arange(length) / 20_000))
