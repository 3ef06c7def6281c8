"""`python -m tools.bench step|scaling|compare|checkpoint|export|exports|data|index|balance|augment|start|
trace`: measures here what steps, saves, exports, data and the start of a run cost, in turn with what the same
costs with other programs.

`step`: `launch train` on a Whisper with random weights in the shape of a published one, and clips of the
reference's mix of lengths, made here; with `--window full` the same clips, padded to 30 s. The figures are
those of the run's own curves, after the warm-up: median of the intervals between their points.

    mfu                 of all frames that the encoder takes; FLOPs of matrix products (trainer/flops.py)
    useful mfu          the same without padding. The peak is that of the card's data sheet; on a CPU it is
                        what a large matrix product reaches there ("matrix tflops")
    data wait seconds   of a step, on rank 0; training: all else, until the next step; saving: waiting for a
                        checkpoint's snapshot
    host gigabytes      most memory of rank 0; device: most that tensors took of a GPU; reserved: by torch
    device              the device alone, at the shapes of large-v3-turbo, in a process of its own: matrix
                        product, attention forward and backward, log-mel of 30 s, copies from pinned memory

`scaling`: the same on several numbers of ranks. efficiency: samples per second and rank, as a share of those
of the first number. Ranks on a CPU share its cores.

`compare`: Earwitness and transformers' Seq2SeqTrainer fine-tune the same Whisper in turn, each in a process
of its own: same clips, number of samples, precision (BF16 where there is arithmetic for it; the Trainer by
autocast), AdamW, linear rate without warm-up, norm of 1.0, global batch of 16. `--only` and `--out` do it in
parts. What is specific to the Trainer favours it: its features are computed, and kept in memory, before the
time is taken, where Earwitness decodes and transforms as it trains.

    samples/s    from the beginning of training to the end of its last step, without evaluations and saves
    loss         of a caption token on the validation clips, in fp32 at full windows, by transformers: the
                 same judge for both

`trace`: what a trace of torch's profiler says of a GPU: idle share, kernels by time, waits of the host.

`checkpoint`: ranks with gloo train a Whisper with random weights on ZeRO-2. They save the same state, the
fp32 weights and AdamW's two moments, in turn with Earwitness' Writer, DeepSpeed's save_checkpoint (which adds
the BF16 weights) and PyTorch's DCP async_save (the fragments of each rank as tensors, with a stager that
keeps its memory and a process group of its own). Then fresh processes load a checkpoint whose files are in
the page cache: as many ranks as saved it, and one rank more, which DeepSpeed refuses.

    blocking   seconds until training may go on, on the slowest rank
    hidden     seconds by which all steps taken while it is written are longer than undisturbed ones just
               before
    total      seconds until it is durable. Writer and DCP fsync their files, DeepSpeed does not: here that is
               done after it, and counted
    cpu        user and system time of all ranks, from the beginning until it is durable, where no step is
               taken in between ("sync", and DeepSpeed)
    first      the first save of a process, left out of the medians

`export`: tools.export and DeepSpeed's zero_to_fp32, each in a fresh process, with the files of the checkpoint
in the page cache. total: the whole process; work: without start, imports and exit; peak: VmHWM, mapped files
included. tools.export also checks digests, fsyncs, loads what it has written, and compares it. zero_to_fp32
writes pytorch_model.bin: its --safe_serialization fails on Whisper's tied weights.

`exports`: an export's captions of clips by transformers and, where they are installed, by CTranslate2 and
faster-whisper, as its model card tells to use them; how many of them are those of tools.caption, which hears
clips as the model was trained, and, where that is at own lengths, of tools.caption --window full.

`data`: from shards to shuffled batches of 16 (labels, and log-mel of 30 s windows with 128 bins, on the CPU
by one thread), each reader in a fresh process on the same clips. A first pass does not count, the second one
is measured. The index of the shards, and the chunks of litdata, are made before. With so few clips a request
brings one or a few of them, where large sets are read in runs of 5 MB: here that costs Earwitness more.
"waveforms" is Earwitness without log-mel, which a GPU computes from the waveforms where there is one: it is
not to be compared with the others, but shows what is left to the CPUs of a node.

    samples per core second   samples per CPU second, user and system, of all threads and processes of the
                              reader, without servers and proxy
    samples per second        by the clock, on a machine that the servers share
    first batch               seconds from the construction (after the imports) to the first batch
    distinct samples          in the first pass, which has as many samples as there are clips
    largest mel difference    to WhisperFeatureExtractor fed by soundfile and soxr, on one clip. Earwitness
                              keeps waveforms as int16: a file of 16 bits and 16 kHz stays as it is; a clip
                              that is resampled, or was MP3, differs; so do other decoders

`index`: sidecars of empty shards of seven sources, as full indexes have them. Then, in fresh processes that
have imported what they need: the first start of a run, which merges the sidecars, and later starts, with one
rank and with several at a time. The files are in the page cache.

    merge         from the list of shards to the merged indexes; peak is VmHWM, less the memory after the
                  imports
    check         the same at a later start: rank 0 looks whether shards, sidecars and settings have changed
    open          every rank maps the merged indexes, and cuts the samples into runs; the slowest rank
    plan          the first batch from the start, the middle and the end of an epoch, with all that is to be
                  read for it
    first batch   check, open and the slowest plan
    memory        of all ranks together, beyond that after the imports: private, and PSS, which counts once
                  what ranks share; peak: of one rank other than rank 0

`balance`: the planner of a run (order, dealing, reads) on made clips of seven sources with the reference's
mix of lengths, for whisper-large-v3-turbo. Nothing is read, and no second process is started.

    fullest       work of the fullest rank over the mean, by FLOPs, mean of the steps: with the samples as
                  shuffled, and with some dealt to other ranks; and that in the worst of a hundred steps
    share moved   of the samples, to another rank
    requests      reads per sample
    milliseconds  CPU time of planning on one rank: of a step, all steps taken together, and until the first
                  one is planned

`augment`: CPU time of one thread that each part of `data.augment` takes for a clip of 10 s (noise), in
milliseconds; for comparison, that of decoding it from FLAC, and of its log-mel. What it costs to read the
clips that are mixed into others, `balance --mix 0.3` tells in requests.

`start`: `launch train` on a run of a Whisper with random weights, which goes on from its checkpoint for one
step; as the run itself tells it of rank 0 (event `first_step`, docs/status.md). Code and files are in the
page cache.

    launch        from the command to the process of rank 0
    total         from the command to the first step
    the others    parts of the way in between, one after the other
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import EarwitnessError, run_command
from configs.ports import free_ports
from configs.schema import RunConfig
from tools.bench import augment, balance, compare, data, exported, restarts, starts, step, trace
from tools.bench.data import Form, Pipeline, Store
from tools.bench.ranks import SECONDS
from tools.bench.report import ROOT, Figures, Summary, aims, describe, environment, report, say, summary
from tools.bench.step import Backend
from tools.sandbox import s3
from tools.sandbox.whisper import make_whisper

SAVERS = ("earwitness", "deepspeed", "dcp", "earwitness sync", "dcp sync")
AIMS = {"blocking": 0.05, "load": 1.0, "export time": 0.5, "export work": 0.5, "export memory": 0.5}
"""The most that Earwitness may take, as a share of what DeepSpeed takes."""
INDEX_AIMS = {"ready_seconds": 2.0, "first_batch_seconds": 2.0, "node_megabytes": 500.0}
"""The most that a later start may take: check and open; check, open and plan; PSS of all ranks."""
OF_DEEPSPEED = " of DeepSpeed's"
EXPORT = """
import json, time
from pathlib import Path
began = time.perf_counter()
{imports}
imported = time.perf_counter()
{work}
ended = time.perf_counter()
status = Path("/proc/self/status").read_text(encoding="utf-8")
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
seconds = {{"import_seconds": imported - began, "work_seconds": ended - imported}}
print(json.dumps({{**seconds, "peak_gigabytes": peak / 1e9}}))
"""
EXPORT_IMPORTS = {
    "earwitness": "from tools.export import export",
    "deepspeed": (
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert"
    ),
}
EXPORT_WORK = {
    "earwitness": "export(Path({source!r}), {out!r})",
    "deepspeed": "convert({source!r}, {out!r})",
}


class Shape(StrEnum):
    """Sizes of Whisper; `sandbox` is that of the tests."""

    sandbox = "sandbox"
    base = "base"
    small = "small"
    medium = "medium"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes, as `make_whisper` takes them."""
        return {
            Shape.sandbox: {"width": 64, "layers": 2, "vocabulary": 400},
            Shape.base: {"width": 512, "layers": 6, "vocabulary": 51_865},
            Shape.small: {"width": 768, "layers": 12, "vocabulary": 51_865},
            Shape.medium: {"width": 1024, "layers": 24, "vocabulary": 51_865},
        }[self]


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure steps, checkpoints, exports, data and starts on this machine.",
)
Procs = Annotated[int, typer.Option(min=1, help="Ranks that save.")]
Model = Annotated[Shape, typer.Option(help="Shape of the Whisper.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, in turn.")]
Dir = Annotated[
    Path, typer.Option(help="Where a temporary folder is made: on the disk that is to be measured.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


ALL_FORMS, ALL_PLACES, ALL_READERS = list(Form), list(Store), list(Pipeline)
ALL_BACKENDS = list(Backend)


@app.command("exports")
def bench_exports(
    export: Annotated[Path, typer.Argument(help="Folder made by tools.export.", metavar="EXPORT")],
    clips: Annotated[list[Path], typer.Argument(help="Audio files.", metavar="CLIP...")],
) -> None:
    """Captions of an export in other programs, beside those of tools.caption."""
    ways = exported.TRANSFORMERS + (exported.FASTER_WHISPERS if find_spec("faster_whisper") else ())
    for way, same in exported.agreement(export.resolve(), clips, ways):
        counts = ", ".join(f"{count} those of {command}" for command, count in same.items())
        print(f"{way}: of {len(clips)} captions, {counts}", flush=True)


@app.command("checkpoint")
def bench_checkpoint(
    procs: Procs = 2, model: Model = Shape.small, rounds: Rounds = 3, dir: Dir = Path(), as_json: Json = False
) -> None:
    """Measure saving and loading."""
    loading = [("earwitness", procs), ("deepspeed", procs), ("earwitness", procs + 1)]
    load_rounds: dict[str, list[Figures]] = {}
    with _workspace(dir, model) as work:
        result = _run_ranks(work, procs, "save", str(1 + rounds), *SAVERS)
        for _ in range(rounds):
            for method, ranks in loading:
                _warm(work / method)
                seconds = _run_ranks(work, ranks, "load", method)["load"]
                load_rounds.setdefault(f"{method} {procs} -> {ranks}", []).append({"seconds": seconds})
    saves: dict[str, Summary] = {}
    for method, (first, *counted) in result["save"].items():
        saves[method] = {**summary(counted), "first": first}
    loads = {name: summary(figures) for name, figures in load_rounds.items()}
    same_ranks, more_ranks, deepspeed = (
        loads[name]["median"]["seconds"]
        for name in (
            f"earwitness {procs} -> {procs}",
            f"earwitness {procs} -> {procs + 1}",
            f"deepspeed {procs} -> {procs}",
        )
    )
    ours, theirs = (saves[method]["median"]["blocking_seconds"] for method in ("earwitness", "deepspeed"))
    shares = {"blocking": ours / theirs, "load": max(same_ranks, more_ranks) / deepspeed}
    report(
        _conditions(model, result, procs),
        {"save": saves, "load": loads},
        aims(shares, AIMS),
        unit=OF_DEEPSPEED,
        as_json=as_json,
    )


@app.command("export")
def bench_export(
    procs: Procs = 2, model: Model = Shape.small, rounds: Rounds = 3, dir: Dir = Path(), as_json: Json = False
) -> None:
    """Measure the way from a checkpoint to fp32 weights."""
    with _workspace(dir, model) as work:
        result = _run_ranks(work, procs, "save", "1", "earwitness sync", "deepspeed")
        checkpoints = {
            "earwitness": next((work / "earwitness/checkpoints").iterdir()),
            "deepspeed": work / "deepspeed",
        }
        export_rounds: dict[str, list[Figures]] = {method: [] for method in checkpoints}
        for _ in range(rounds):
            for method, checkpoint in checkpoints.items():
                _warm(checkpoint)
                export_rounds[method].append(_export(method, checkpoint, work / "out"))
    exports = {method: summary(figures) for method, figures in export_rounds.items()}
    ours, theirs = exports["earwitness"]["median"], exports["deepspeed"]["median"]
    shares = {
        "export time": ours["total_seconds"] / theirs["total_seconds"],
        "export work": ours["work_seconds"] / theirs["work_seconds"],
        "export memory": ours["peak_gigabytes"] / theirs["peak_gigabytes"],
    }
    report(
        _conditions(model, result, procs),
        {"export": exports},
        aims(shares, AIMS),
        unit=OF_DEEPSPEED,
        as_json=as_json,
    )


@app.command("data")
def bench_data(
    clips: Annotated[
        int, typer.Option(min=16, help="Clips of each format, rounded down to whole batches of 16.")
    ] = 256,
    format: Annotated[list[Form], typer.Option(help="Of the clips; may be given several times.")] = ALL_FORMS,
    place: Annotated[
        list[Store], typer.Option(help="Where they lie; may be given several times.")
    ] = ALL_PLACES,
    reader: Annotated[
        list[Pipeline], typer.Option(help="What reads them; may be given several times.")
    ] = ALL_READERS,
    rounds: Rounds = 3,
    dir: Dir = Path(),
    as_json: Json = False,
) -> None:
    """Measure the way from shards to batches, in turn with webdataset, datasets and litdata."""
    skipped = data.missing(reader)
    readers = [name for name in reader if name not in skipped]
    summaries = data.measure(dir, clips // 16 * 16, rounds, format, place, readers)
    conditions = describe("torch", "transformers", *(name for name in readers if name in data.NEEDED))
    conditions["clips"] = clips
    conditions |= {f"skipped {name}": f"({command})" for name, command in skipped.items()}
    report(conditions, {"data": summaries}, {}, as_json=as_json)


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
    """Measure the first start of a run and later ones, up to the first batch that is planned."""
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
        merge_rounds: list[Figures] = []
        start_rounds: dict[int, list[Figures]] = {1: [], procs: []}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            merge_rounds.append(starts.measure_merge(work))
            for ranks, figures in start_rounds.items():
                figures.append(starts.measure_start(work, ranks))
        megabytes = sum(file.stat().st_size for file in (work / "run").iterdir()) / 1e6
    later = {f"ranks {ranks}": summary(figures) for ranks, figures in start_rounds.items()}
    worst = {name: max(start["median"][name] for start in later.values()) for name in INDEX_AIMS}
    conditions = describe("pyarrow", "numpy") | {
        "samples": samples,
        "shards": shards,
        "held_out": held_out,
        "procs": procs,
        "on_s3": on_s3,
        "file_megabytes": round(megabytes, 1),
    }
    tables = {"first start": {"merge": summary(merge_rounds)}, "later start": later}
    report(conditions, tables, aims(worst, INDEX_AIMS), as_json=as_json)


@app.command("balance")
def bench_balance(
    samples: Annotated[int, typer.Option(min=1000, help="Samples in all sources.")] = 3_100_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are planned.")] = 1024,
    global_size: Annotated[int, typer.Option(min=2, help="Samples of a step.")] = 64,
    full_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the samples that are padded to the whole window.")
    ] = 0.2,
    mix: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the samples that another clip is mixed into.")
    ] = 0.0,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Measure how even the work of ranks is, and what it costs to make it so."""
    sections = {
        "run": {"name": "bench"},
        "model": {"name_or_path": "none"},
        "optim": {"max_steps": steps},
        "batch": {"global_size": global_size},
        "data": {
            "sources": [{"name": "made", "shards": "none"}],
            "full_share": full_share,
            "augment": {"mix": mix},
        },
    }
    config = RunConfig.model_validate(sections)
    course = balance.Course(samples, steps, config)
    by_ranks: dict[int, list[Figures]] = {
        ranks: [] for ranks in (2, 4, 8, 16, 32, 64, 128, 256) if ranks <= global_size
    }
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for ranks, figures in by_ranks.items():
            figures.append(course.measure(ranks))
    summaries = {f"ranks {ranks}": summary(figures) for ranks, figures in by_ranks.items()}
    conditions = describe("numpy") | {
        "samples": samples,
        "steps": steps,
        "global_size": global_size,
        "full_share": full_share,
        "mix": mix,
    }
    report(conditions, {"balance": summaries}, {}, as_json=as_json)


app.command("augment")(augment.bench_augment)
app.command("step")(step.bench_step)
app.command("scaling")(step.bench_scaling)
app.command("compare")(compare.bench_compare)
app.command("trace")(trace.bench_trace)


@app.command("start")
def bench_start(
    procs: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 1,
    backend: Annotated[
        list[Backend], typer.Option(help="Its engine; may be given several times.")
    ] = ALL_BACKENDS,
    model: Annotated[Shape, typer.Option(help="Shape of the Whisper.")] = Shape.sandbox,
    rounds: Rounds = 5,
    dir: Dir = Path(),
    as_json: Json = False,
) -> None:
    """Measure the restart of a run, from the command to the first step, by part."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=dir) as name:
        runs = {
            engine: restarts.make(Path(name).resolve() / engine, engine.value, procs, model.sizes)
            for engine in backend
        }
        for config in runs.values():
            restarts.measure(config, procs, step=1)
        start_rounds: dict[str, list[Figures]] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for engine, config in runs.items():
                start_rounds.setdefault(engine, []).append(restarts.measure(config, procs, step=number + 2))
    conditions = describe("torch", "deepspeed", "transformers") | {"model": model.value, "procs": procs}
    report(conditions, {"start": _by_part(start_rounds)}, {}, as_json=as_json)


def _by_part(start_rounds: dict[str, list[Figures]]) -> dict[str, Summary]:
    """A summary of each part of a start, in the order in which they come, with a figure for each engine."""
    parts = list(dict.fromkeys(part for starts in start_rounds.values() for part in starts[0]))
    by_part = {}
    for part in parts:
        engines = [engine for engine, starts in start_rounds.items() if part in starts[0]]
        rounds = zip(*(start_rounds[engine] for engine in engines), strict=True)
        by_part[part] = summary(
            [
                {engine: start[part] for engine, start in zip(engines, one_each, strict=True)}
                for one_each in rounds
            ]
        )
    return by_part


@contextmanager
def _workspace(folder: Path, shape: Shape) -> Iterator[Path]:
    """A temporary folder with a Whisper without weights in it."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as name:
        work = Path(name).resolve()
        make_whisper(work / "model", ["A bell rings twice."], seconds=SECONDS, **shape.sizes)
        yield work


def _run_ranks(work: Path, procs: int, *arguments: str) -> dict[str, Any]:
    """Run `procs` ranks of tools/bench/ranks.py; returns the result that rank 0 writes.

    Raises EarwitnessError if one of them fails.
    """
    say(f"{procs} ranks: {' '.join(arguments)}")
    command = [sys.executable, "-m", "tools.bench.ranks", str(work), *arguments]
    job = {"WORLD_SIZE": str(procs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    processes = []
    for rank in range(procs):
        variables = environment() | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (work / f"rank-{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log))
    try:
        failed = _await_ranks(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed is not None:
        output = (work / f"rank-{failed}.log").read_text(encoding="utf-8", errors="replace")
        raise EarwitnessError(f"rank {failed} of the benchmark failed:\n{output[-3000:]}")
    return dict(json.loads((work / "result.json").read_text(encoding="utf-8")))


def _await_ranks(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks have ended well, or one has failed; returns the number of that one."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        time.sleep(0.1)


def _export(method: str, checkpoint: Path, out: Path) -> Figures:
    """Export in a fresh process. Raises EarwitnessError if it fails."""
    say(f"export: {method}")
    work = EXPORT_WORK[method].format(source=str(checkpoint), out=str(out))
    program = EXPORT.format(imports=EXPORT_IMPORTS[method], work=work)
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
        raise EarwitnessError(f"the export by {method} failed:\n{done.stderr[-3000:]}")
    shutil.rmtree(out)
    return {"total_seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def _warm(folder: Path) -> None:
    """Read all files, so that they are in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                while content.read(1 << 24):
                    pass


def _conditions(model: Shape, result: dict[str, Any], procs: int) -> dict[str, Any]:
    return describe("torch", "deepspeed", "transformers") | {
        "model": model.value,
        "parameters": result["parameters"],
        "procs": procs,
    }


if __name__ == "__main__":
    run_command(app)
