"""The benchmark of readers: clips are made, put where they shall lie, and read by each reader in turn
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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
from webdataset import ShardWriter

from configs.errors import EarwitnessError
from tools.bench.report import ROOT, Figures, Summary, environment, say, summary
from tools.sandbox import faults, s3
from tools.sandbox.whisper import make_whisper


class Pipeline(StrEnum):
    """The ways from shards to batches: the modules of tools/bench/readers."""

    earwitness = "earwitness"
    waveforms = "waveforms"
    webdataset = "webdataset"
    datasets = "datasets"
    litdata = "litdata"


NEEDED = {Pipeline.webdataset: "webdataset", Pipeline.datasets: "torchcodec", Pipeline.litdata: "litdata"}
"""The package that a reader needs, if it is none of Earwitness' own."""
INSTALL = {
    Pipeline.datasets: "pip install datasets torchcodec==0.13.0",
    Pipeline.litdata: "pip install litdata; pip uninstall torchvision",
}
"""Commands that were tried with torch 2.13 for CPUs: later torchcodecs need CUDA, and transformers cannot be
imported beside the torchvision that litdata brings."""
CAPTION = "A bell rings twice."
SHARDS = 8
BUCKET = "bench"
FAR = faults.Fault("far", times=0, seconds=0.05, rate=75e6)


class Audio(NamedTuple):
    """What a file of audio is."""

    ending: str
    seconds: int
    rate: int
    """Samples per second, in Hz."""
    channels: int


class Form(StrEnum):
    """Formats of clips."""

    speech = "flac-10s-16k-mono"
    mp3 = "mp3-10s-44k-stereo"
    music = "flac-30s-44k-stereo"

    @property
    def audio(self) -> Audio:
        """What its clips are."""
        return {
            Form.speech: Audio("flac", 10, 16_000, 1),
            Form.mp3: Audio("mp3", 10, 44_100, 2),
            Form.music: Audio("flac", 30, 44_100, 2),
        }[self]


class Store(StrEnum):
    """Where shards lie; `s3` and `far`: behind a proxy, which answers as the server does, or after 50 ms with
    75 MB/s per connection."""

    local = "local"
    s3 = "s3"
    far = "s3-far"


@dataclass(frozen=True)
class _Clips:
    """Where clips lie."""

    shards: Path
    """Folder of tars."""
    chunks: Path
    """Folder of litdata's chunks."""
    first: Path
    """File of the clip with the key 000000."""


def missing(readers: Sequence[Pipeline]) -> dict[Pipeline, str]:
    """Those readers that are not installed, each with the command that installs it."""
    return {
        reader: INSTALL[reader]
        for reader in readers
        if reader in NEEDED and not importlib.util.find_spec(NEEDED[reader])
    }


def measure(
    folder: Path,
    clips: int,
    rounds: int,
    forms: Sequence[Form],
    places: Sequence[Store],
    readers: Sequence[Pipeline],
) -> dict[str, Summary]:
    """Measure readers in turn; returns a summary for each form, place and reader. clips: a multiple of the
    batch."""
    rounds_of: dict[str, list[Figures]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name,
        s3.serve() as server,
        faults.serve(server.endpoint) as near,
        faults.serve(server.endpoint, [FAR]) as far,
    ):
        work = Path(name).resolve()
        model = make_whisper(work / "model", [CAPTION], seconds=30, mels=128)
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        variables_for = {
            Store.local: {},
            Store.s3: server.environment | {"AWS_ENDPOINT_URL": near.endpoint},
            Store.far: server.environment | {"AWS_ENDPOINT_URL": far.endpoint},
        }
        for form in forms:
            say(f"{clips} clips: {form.value}")
            made = _make(work / form.value, form, clips, chunks=Pipeline.litdata in readers)
            if any(place is not Store.local for place in places):
                for file in filter(Path.is_file, (work / form.value).glob("*/*")):
                    client.upload_file(str(file), BUCKET, str(file.relative_to(work)))
            for place in places:
                root = str(work) if place is Store.local else f"s3://{BUCKET}"
                shards = [f"{root}/{file.relative_to(work)}" for file in sorted(made.shards.iterdir())]
                task = {
                    "model": str(model),
                    "shards": shards,
                    "chunks": f"{root}/{made.chunks.relative_to(work)}",
                    "ending": form.audio.ending,
                    "index_dir": str(work / "index"),
                }
                variables = variables_for[place]
                _run(["tools.index", *shards, "--index-dir", str(work / "index")], variables)
                for number, reader in itertools.product(range(rounds), readers):
                    name = f"{form.value}, {place.value}, {reader}"
                    say(f"round {number + 1}: {name}")
                    with tempfile.TemporaryDirectory(dir=work) as run:
                        arguments = [json.dumps(task | {"work": run}), str(clips), str(made.first)]
                        command = ["tools.bench.readers", reader, *arguments]
                        output = _run(command, variables | {"HF_HOME": run})
                    rounds_of.setdefault(name, []).append(json.loads(output.splitlines()[-1]))
            shutil.rmtree(work / form.value)
    return {name: summary(figures) for name, figures in rounds_of.items()}


def _run(command: Sequence[str], variables: dict[str, str]) -> str:
    """Run a module of Earwitness in a fresh process; returns what it prints. Raises EarwitnessError if it
    fails."""
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
    """Write clips to SHARDS tars, and with `chunks` to litdata's format, too."""
    ending, seconds, rate, channels = form.audio
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
            content = file.getvalue()
            if number == 0:
                made.first.write_bytes(content)
            writer.write({"__key__": f"{number:06d}", ending: content, "json": {"caption": CAPTION}})
    if chunks:
        from tools.bench.readers import litdata

        litdata.convert(made.shards, made.chunks)
    return made


def _sound(random: np.random.Generator, length: int) -> npt.NDArray[np.float64]:
    """Noise that falls by 3 dB per octave, as music does, and swells. It is as quiet as recordings are, so
    that FLAC makes it as small as those."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    wave = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1000), length)
    return wave / np.abs(wave).max() * (0.055 + 0.04 * np.sin(np.arange(length) / 20_000))
