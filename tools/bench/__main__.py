"""`python -m tools.bench checkpoint|export|data|index`: what checkpoints, data and starts cost here, in turn
with what others offer.

`checkpoint`: ranks with gloo train a Whisper with random weights on ZeRO-2 and save the same state, the fp32
weights and AdamW's two moments, in turn with Earwitness' Writer, DeepSpeed's save_checkpoint (which adds the
BF16 weights) and PyTorch's DCP async_save (each rank's fragments as tensors, with a stager that keeps its
memory and a process group of its own). Then fresh processes load a checkpoint whose files are in the page
cache: as many ranks as saved it, and one more, which DeepSpeed refuses.

    blocking   until training may go on, on the slowest rank
    hidden     by how much longer the steps take while it is written, all together, than undisturbed ones just
               before
    total      until it is durable. Writer and DCP fsync their files, DeepSpeed does not: here that is done
               after it and counted
    cpu        user and system time of all ranks, from beginning to durable, where no step is taken in between
               ("sync", and DeepSpeed)
    first      a process's first save, left out of the medians

`export`: tools.export and DeepSpeed's zero_to_fp32, each in a fresh process, with the checkpoint's files in
the page cache. total is the whole process, work what is left without start, imports and exit; peak is VmHWM,
mapped files included. Ours also checks digests, fsyncs, loads what it has written and compares it.
zero_to_fp32 writes pytorch_model.bin: its --safe_serialization fails on Whisper's tied weights.

`data`: from shards to shuffled batches of 16 (log-mel of 30 s windows, 128 bins, on the CPU by one thread,
and labels), each reader in a fresh process on the same clips. A first pass is left out, the second one is
measured. The shards have their index, and litdata its chunks, before. So few clips are read by a request for
each or a few of them, large sets in runs of 5 MB: that costs Earwitness more here. "waveforms" is Earwitness
without log-mel, which a GPU computes from the waveforms where there is one: no reader to compare, but what is
left to the CPUs of a node.

    samples per core second   samples by CPU second, user and system, of all threads and processes of the
                              reader; not of servers and proxy
    samples per second        by the clock, on a machine that the servers share
    first batch               seconds from the construction (imports are done) to the first batch
    distinct samples          in the first pass, of as many as there are
    largest mel difference    to WhisperFeatureExtractor fed by soundfile and soxr, on one clip. Ours keeps
                              waveforms as int16: what a file of 16 bits and 16 kHz holds stays as it is,
                              where a clip is resampled or was MP3 it differs; so do other decoders

`index`: sidecars of empty shards, as full indexes have them, of seven sources; then, in fresh processes that
have imported what they need, the first start of a run, which merges them, and later ones, with one rank and
with several at a time. The files are in the page cache.

    merge         from the list of shards to the merged indexes; peak is VmHWM, less what there was after the
                  imports
    check         the same at a later start: rank 0 looks whether shards, sidecars and settings are what they
                  were
    open          every rank maps the merged indexes, and cuts the samples into runs; the slowest one
    plan          the first batch from the start, the middle and the end of an epoch, with all that is to be
                  read for it
    first batch   check, open and the slowest plan
    memory        of all ranks together, more than after the imports: private, and PSS, which counts once what
                  ranks share; peak: of one rank but rank 0
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import EarwitnessError, run_command
from tools.bench import data, starts
from tools.bench.data import Form, Place, Reader
from tools.bench.ranks import SECONDS
from tools.bench.report import ROOT, Figures, describe, environment, report, say, summary
from tools.sandbox import s3
from tools.sandbox.whisper import make_whisper

SAVERS = ("earwitness", "deepspeed", "dcp", "earwitness sync", "dcp sync")
AIMS = {"blocking": 0.05, "load": 1.0, "export time": 0.5, "export work": 0.5, "export memory": 0.5}
"""Largest share of what DeepSpeed takes."""
INDEX_AIMS = {"ready_seconds": 2.0, "first_batch_seconds": 2.0, "node_megabytes": 500.0}
"""Of a later start: check and open; check, open and plan; PSS of all ranks."""
OF_DEEPSPEED = " of DeepSpeed's"
EXPORT = """
import json, time
from pathlib import Path
began = time.perf_counter()
{imports}
imported = time.perf_counter()
{work}
ended, status = time.perf_counter(), Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
seconds = {{"import_seconds": imported - began, "work_seconds": ended - imported}}
print(json.dumps({{**seconds, "peak_gigabytes": peak / 1e9}}))
"""
EXPORTS = {
    "earwitness": ("from tools.export import export", "export(Path({source!r}), {out!r})"),
    "deepspeed": (
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert",
        "convert({source!r}, {out!r})",
    ),
}


class Shape(StrEnum):
    """Sizes of Whisper; `sandbox` is that of the tests."""

    sandbox = "sandbox"
    base = "base"
    small = "small"
    medium = "medium"

    @property
    def sizes(self) -> dict[str, int]:
        """As `make_whisper` takes them."""
        width, layers = {"sandbox": (64, 2), "base": (512, 6), "small": (768, 12), "medium": (1024, 24)}[
            self.value
        ]
        return {"width": width, "layers": layers, "vocabulary": 400 if self.value == "sandbox" else 51_865}


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure checkpoints, exports, data and starts on this machine.",
)
Procs = Annotated[int, typer.Option(min=1, help="Ranks that save.")]
Model = Annotated[Shape, typer.Option(help="Shape of the Whisper.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, in turn.")]
Dir = Annotated[
    Path, typer.Option(help="Where a temporary folder is made: on the disk that is to be measured.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


ALL_FORMS, ALL_PLACES, ALL_READERS = list(Form), list(Place), list(Reader)


@app.command("checkpoint")
def bench_checkpoint(
    procs: Procs = 2, model: Model = Shape.small, rounds: Rounds = 3, dir: Dir = Path(), as_json: Json = False
) -> None:
    """Saving and loading."""
    with _workspace(dir, model) as work:
        saved = _ranks(work, procs, "save", str(1 + rounds), *SAVERS)
        loads: dict[str, list[Figures]] = {}
        for _ in range(rounds):
            for method, ranks in (("earwitness", procs), ("deepspeed", procs), ("earwitness", procs + 1)):
                _warm(work / method)
                loads.setdefault(f"{method} {procs} -> {ranks}", []).append(
                    {"seconds": _ranks(work, ranks, "load", method)["load"]}
                )
    saves = {method: summary(rows[1:]) | {"first": rows[0]} for method, rows in saved["save"].items()}
    loading = {name: summary(rows) for name, rows in loads.items()}
    native = loading[f"deepspeed {procs} -> {procs}"]["median"]["seconds"]
    ratios = {
        "blocking": (
            saves["earwitness"]["median"]["blocking_seconds"]
            / saves["deepspeed"]["median"]["blocking_seconds"]
        ),
        "load": (
            max(
                loading[f"earwitness {procs} -> {ranks}"]["median"]["seconds"] for ranks in (procs, procs + 1)
            )
            / native
        ),
    }
    report(
        _about(model, saved, procs), {"save": saves, "load": loading}, _aims(ratios), OF_DEEPSPEED, as_json
    )


@app.command("export")
def bench_export(
    procs: Procs = 2, model: Model = Shape.small, rounds: Rounds = 3, dir: Dir = Path(), as_json: Json = False
) -> None:
    """From a checkpoint to fp32 weights."""
    with _workspace(dir, model) as work:
        saved = _ranks(work, procs, "save", "1", "earwitness sync", "deepspeed")
        sources = {
            "earwitness": next((work / "earwitness/checkpoints").iterdir()),
            "deepspeed": work / "deepspeed",
        }
        rows: dict[str, list[Figures]] = {name: [] for name in sources}
        for _ in range(rounds):
            for name, source in sources.items():
                _warm(source)
                rows[name].append(_export(name, source, work / "out"))
    exports = {name: summary(found) for name, found in rows.items()}
    ours, theirs = (exports[name]["median"] for name in ("earwitness", "deepspeed"))
    measures = {"time": "total_seconds", "work": "work_seconds", "memory": "peak_gigabytes"}
    ratios = {f"export {name}": ours[measure] / theirs[measure] for name, measure in measures.items()}
    report(_about(model, saved, procs), {"export": exports}, _aims(ratios), OF_DEEPSPEED, as_json)


@app.command("data")
def bench_data(
    clips: Annotated[
        int, typer.Option(min=16, help="Clips of each format, rounded down to whole batches of 16.")
    ] = 256,
    format: Annotated[list[Form], typer.Option(help="Of the clips; may be given several times.")] = ALL_FORMS,
    place: Annotated[
        list[Place], typer.Option(help="Where they lie; may be given several times.")
    ] = ALL_PLACES,
    reader: Annotated[
        list[Reader], typer.Option(help="What reads them; may be given several times.")
    ] = ALL_READERS,
    rounds: Rounds = 3,
    dir: Dir = Path(),
    as_json: Json = False,
) -> None:
    """From shards to batches, in turn with webdataset, datasets and litdata."""
    skipped = data.missing(reader)
    readers = [one for one in reader if one not in skipped]
    found = data.measure(dir, clips // 16 * 16, rounds, format, place, readers)
    about = describe("torch", "transformers", *(one for one in readers if one in data.NEEDED)) | {
        "clips": clips
    }
    report(
        about | {f"skipped {name}": f"({line})" for name, line in skipped.items()},
        {"data": found},
        {},
        "",
        as_json,
    )


@app.command("index")
def bench_index(
    samples: Annotated[int, typer.Option(min=1000, help="Samples in all sources.")] = 3_100_000,
    shards: Annotated[int, typer.Option(min=7, help="Shards in all sources.")] = 3000,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the samples that is for validation.")
    ] = 0.01,
    procs: Annotated[int, typer.Option(min=1, help="Ranks of the node; one rank is measured, too.")] = 8,
    on_s3: Annotated[
        bool, typer.Option("--on-s3", help="The shards are in a bucket of a server on this machine.")
    ] = False,
    rounds: Rounds = 3,
    dir: Dir = Path(),
    as_json: Json = False,
) -> None:
    """The first and later starts, up to the first batch that is planned."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=dir))).resolve()
        root = f"{work}/shards"
        if on_s3:
            server = stack.enter_context(s3.serve())
            os.environ.update(server.environment)
            server.client().create_bucket(Bucket=data.BUCKET)
            root = f"s3://{data.BUCKET}"
        say(f"sidecars of {samples:,} samples in {shards:,} shards")
        starts.make(work, samples, shards, held_out, root)
        found: dict[str, list[Figures]] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            found.setdefault("merge", []).append(starts.measure_merge(work))
            for ranks in dict.fromkeys((1, procs)):
                found.setdefault(f"ranks {ranks}", []).append(starts.measure_start(work, ranks))
        megabytes = sum(file.stat().st_size for file in (work / "run").iterdir()) / 1e6
    tables = {name: summary(rows) for name, rows in found.items()}
    worst = {
        aim: max(about["median"][aim] for name, about in tables.items() if name != "merge")
        for aim in INDEX_AIMS
    }
    aims = {
        name: {"value": value, "at_most": INDEX_AIMS[name], "met": value <= INDEX_AIMS[name]}
        for name, value in worst.items()
    }
    about = describe("pyarrow", "numpy") | {
        "samples": samples,
        "shards": shards,
        "held_out": held_out,
        "procs": procs,
        "on_s3": on_s3,
        "file_megabytes": round(megabytes, 1),
    }
    report(about, {"first start": {"merge": tables.pop("merge")}, "later start": tables}, aims, "", as_json)


@contextmanager
def _workspace(folder: Path, shape: Shape) -> Iterator[Path]:
    """A temporary folder with a Whisper without weights in it."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name:
        work = Path(name).resolve()
        make_whisper(work / "model", ["A bell rings twice."], seconds=SECONDS, **shape.sizes)
        yield work


def _ranks(work: Path, procs: int, *arguments: str) -> dict[str, Any]:
    """What rank 0 of `procs` fresh processes finds (tools/bench/ranks.py). Raises EarwitnessError if one of
    them fails."""
    say(f"{procs} ranks: {' '.join(arguments)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": procs, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
    command, started = [sys.executable, "-m", "tools.bench.ranks", str(work), *arguments], []
    for rank in range(procs):
        variables = environment() | {
            name: str(value) for name, value in (job | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        with (work / f"rank-{rank}.log").open("w", encoding="utf-8") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log))
    try:
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        rank = next(rank for rank, code in enumerate(codes) if code)
        said = (work / f"rank-{rank}.log").read_text(encoding="utf-8")
        raise EarwitnessError(f"rank {rank} of the benchmark failed:\n{said[-3000:]}")
    return dict(json.loads((work / "found.json").read_text(encoding="utf-8")))


def _export(name: str, source: Path, out: Path) -> Figures:
    """Export in a fresh process. Raises EarwitnessError if it fails."""
    say(f"export: {name}")
    imports, work = EXPORTS[name]
    program = EXPORT.format(imports=imports, work=work.format(source=str(source), out=str(out)))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise EarwitnessError(f"the export by {name} failed:\n{done.stderr[-3000:]}")
    shutil.rmtree(out)
    return {"total_seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def _warm(folder: Path) -> None:
    """Have all files in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                while content.read(1 << 24):
                    pass


def _about(model: Shape, saved: dict[str, Any], procs: int) -> dict[str, Any]:
    return describe("torch", "deepspeed", "transformers") | {
        "model": model.value,
        "parameters": saved["parameters"],
        "procs": procs,
    }


def _aims(ratios: Figures) -> dict[str, dict[str, Any]]:
    return {
        name: {"value": ratio, "at_most": AIMS[name], "met": ratio <= AIMS[name]}
        for name, ratio in ratios.items()
    }


if __name__ == "__main__":
    run_command(app)
