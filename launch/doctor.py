"""`launch doctor`: is this machine fit to train? Each finding with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.cores import remark_on_cores
from configs.errors import EarwitnessError
from configs.run.folder import RunDir
from configs.schema import RunConfig
from configs.trackers import check_network, check_trackers
from data.balance import remark_on_balance
from data.location import Location
from slurm import cluster
from slurm.sayings import IMPOSSIBLE
from slurm.shell import heed
from slurm.submit import cores_per_task, look_ahead, script_text

Verdict = Literal["ok", "note", "bad"]
COLORS = {"ok": "green", "note": "yellow", "bad": "red"}
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "safetensors",
    "webdataset",
    "s3fs",
    "boto3",
    "soundfile",
    "soxr",
    "pyarrow",
    "submitit",
)


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what came of it."""

    what: str
    verdict: Verdict
    details: str


def examine(config: Path | None) -> int:
    """Print the findings; 0 if nothing is bad, 1 otherwise."""
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _metrics, _device, _programs, _credentials]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except ImportError as error:  # _packages has said so
            findings.append(Finding(check.__name__.strip("_"), "bad", str(error)))
    if config is not None:
        findings += _config(config)
    table = Table("what", "", "found", title="earwitness doctor", title_justify="left")
    for finding in findings:
        table.add_row(finding.what, f"[{COLORS[finding.verdict]}]{finding.verdict}", escape(finding.details))
    Console().print(table)
    bad = [finding.what for finding in findings if finding.verdict == "bad"]
    print(f"verdict: mend {', '.join(bad)} first" if bad else "verdict: ready to train")
    return 1 if bad else 0


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed: pip install -r requirements.txt")


def _metrics() -> Iterator[Finding]:
    """Whether captions can be scored by all metrics that need no more than a library."""
    from trainer.aac import METRICS
    from trainer.parts import remark

    missing = remark()
    yield Finding("metrics of captions", "note" if missing else "ok", missing or ", ".join(METRICS))


def _device() -> Iterator[Finding]:
    import torch

    driver = _driver()
    if driver:
        yield Finding("NVIDIA driver", "ok", driver)
    else:
        yield Finding("NVIDIA driver", "note", "none: training will run on the CPU")
    if torch.version.cuda:
        yield Finding("CUDA of torch", "ok", torch.version.cuda)
    else:
        yield Finding("CUDA of torch", "note", "this torch is built without CUDA")
    if torch.cuda.is_available():
        yield from _gpus()
        return
    if driver:
        yield Finding(
            "GPU",
            "bad",
            "torch sees none: install a torch built for a CUDA that this driver supports, and check"
            " CUDA_VISIBLE_DEVICES",
        )
    gloo = "available" if torch.distributed.is_gloo_available() else "missing"
    yield Finding("CPU", "ok", f"{len(os.sched_getaffinity(0))} cores, gloo {gloo}")


def _driver() -> str:
    """Version of NVIDIA's driver; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, encoding="utf-8", check=False)
    return next(iter(done.stdout.split()), "")


def _gpus() -> Iterator[Finding]:
    import torch

    yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    yield _attention(torch.__version__)
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        details = f"{device.name}, {device.total_memory / 1e9:.0f} GB"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding(f"GPU {number}", "ok", details)
        else:
            needs = "no BF16, training needs it (Ampere or newer)"
            yield Finding(f"GPU {number}", "bad", f"{details}: {needs}")


def _attention(version: str) -> Finding:
    """Whether a torch has attention for clips of all lengths at once."""
    if tuple(map(int, version.split(".")[:2])) >= (2, 10):
        return Finding("attention", "ok", "FlashAttention, all clips of a batch at once")
    return Finding(
        "attention",
        "bad",
        f"torch {version} has none for clips of different lengths (varlen_attn); install 2.10 or newer",
    )


def _programs() -> Iterator[Finding]:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg:
        yield Finding("FFmpeg", "ok", ffmpeg)
    else:
        yield Finding("FFmpeg", "note", "not on the PATH: needed for M4A, AAC, MP4 and WebM clips only")
    if not cluster.can_submit():
        yield Finding("Slurm", "note", "no sbatch here: only `launch train` will work")
        return
    try:
        partitions = cluster.run("sinfo", "--noheader", "--format=%R", seconds=10).split()
        yield Finding("Slurm", "ok", f"partitions {', '.join(dict.fromkeys(partitions))}")
    except EarwitnessError as error:
        yield Finding("Slurm", "note", f"it does not answer: {str(error).splitlines()[-1]}")


def _job(config: RunConfig) -> Iterator[Finding]:
    """Whether Slurm would take the job."""
    if not cluster.can_submit():
        return
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        run = RunDir(config.run.dir)
        script.write_text(script_text(config, run, run.code), encoding="utf-8")
        refusal = look_ahead(script)
    if refusal is not None:
        is_taken = not refusal or IMPOSSIBLE in refusal
        verdict: Verdict = "bad" if not is_taken else "note" if refusal else "ok"
        yield Finding("job", verdict, refusal or "Slurm would take it")


def _cores(config: RunConfig) -> Iterator[Finding]:
    """Whether the GPUs of a job, and those of this machine, get their data decoded fast enough."""
    if config.slurm.gpus_per_node and cluster.can_submit():
        cores = cores_per_task(config.slurm)
        if cores is not None:
            yield _cores_of_each("cores in a job", config, cores)
    torch = sys.modules.get("torch")  # _packages says if it is not there
    gpus = torch.cuda.device_count() if torch else 0
    if gpus:
        yield _cores_of_each("cores here", config, max(1, len(os.sched_getaffinity(0)) // gpus))


def _cores_of_each(what: str, config: RunConfig, cores: int) -> Finding:
    remark = remark_on_cores(config.data, cores)
    if remark:
        return Finding(what, "note", remark)
    return Finding(what, "ok", f"{cores} for each process")


def _balance(config: RunConfig) -> Iterator[Finding]:
    """Whether the processes of a job, and those of this machine, have samples to even out their work with."""
    if cluster.can_submit():
        _, most = config.slurm.processes
        yield from _remark_on_balance("balance in a job", config, most)
    torch = sys.modules.get("torch")  # _packages says if it is not there
    gpus = torch.cuda.device_count() if torch else 0
    if gpus > 1:
        yield from _remark_on_balance("balance here", config, gpus)


def _remark_on_balance(what: str, config: RunConfig, ranks: int) -> Iterator[Finding]:
    remark = remark_on_balance(config, ranks)
    if remark:
        yield Finding(what, "note", remark)


def _credentials() -> Iterator[Finding]:
    import boto3

    credentials = boto3.Session().get_credentials()
    if credentials is None:
        yield Finding(
            "S3 credentials",
            "note",
            "none: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, if shards are on S3",
        )
        return
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    yield Finding("S3 credentials", "ok", f"from {credentials.method}, endpoint {endpoint}")


def _config(path: Path) -> Iterator[Finding]:
    from configs.load import load
    from data.dataset import list_shards, load_sidecars

    try:
        config = load(path)
        yield Finding("config", "ok", str(path))
        settings, said = heed(config.slurm, os.environ)
        config = config.model_copy(update={"slurm": settings})
        yield from (Finding("shell", "note", line) for line in said)
        yield from _job(config)
        yield from _cores(config)
        yield from _balance(config)
        yield from _trackers(config)
        yield _model(config)
        yield _scores(config)
        shards = list_shards(config)
        sources = [
            _source(source.name, [shard.location for shard in shards if shard.source is source])
            for source in config.data.sources
        ]
        yield from sources
        if any(source.verdict == "bad" for source in sources):
            return
        sidecars = load_sidecars(config, shards)
        for shard, sidecar in zip(shards, sidecars, strict=True):
            if sidecar and sidecar.damage:
                loss = f"{shard.location.url}: {sidecar.loss()}"
                yield Finding(f"source {shard.source.name}", "note", loss)
        missing = sidecars.count(None)
        if missing:
            todo = f"{missing} of {len(shards)} shards are not indexed: python -m tools.index {path}"
            yield Finding("index", "note", todo)
        else:
            yield Finding("index", "ok", "complete")
    except EarwitnessError as error:
        yield Finding("config", "bad", str(error))


def _scores(config: RunConfig) -> Finding:
    """Whether captions can be scored as a config asks for it."""
    from trainer.parts import check

    try:
        check(config.evaluate.parts, config.evaluate.best_metric)
    except EarwitnessError as error:
        return Finding("evaluation", "bad", str(error))
    return Finding("evaluation", "ok", f"the best checkpoint is that of {config.evaluate.best_metric}")


def _trackers(config: RunConfig) -> Iterator[Finding]:
    """Whether each tracker is there, and whom it speaks to."""
    for name in config.monitor.trackers:
        try:
            check_trackers([name])
            check_network([name])
        except EarwitnessError as error:
            yield Finding("trackers", "bad", str(error))
        else:
            yield Finding("trackers", "ok", f"{name} {importlib.metadata.version(name)}")


def _model(config: RunConfig) -> Finding:
    """Whether the model to start from can be trained; a run with a checkpoint has no need of it."""
    from trainer.hub import is_hub_name
    from trainer.model import examine_base
    from trainer.weights import examine_source

    name = config.model.name_or_path
    run = RunDir(config.run.dir)
    if run.has_checkpoint:
        return Finding("model", "ok", f"{run.path} goes on from its own checkpoint")
    if is_hub_name(name):
        return Finding("model", "note", f"{name}: `launch submit` or `launch train` fetches it from the hub")
    try:
        base = examine_base(config.model, config.run.seed)
        if config.model.init_from:
            examine_source(Path(config.model.init_from), base.config)
    except EarwitnessError as error:
        return Finding("model", "bad", str(error))
    return Finding("model", "note" if base.remarks else "ok", "; ".join(base.remarks) or name)


def _source(name: str, shards: Sequence[Location]) -> Finding:
    """Whether the first shard of a source can be read."""
    from data import storage

    first = shards[0]
    try:
        size = storage.taste(first).size
    except EarwitnessError as error:
        return Finding(f"source {name}", "bad", str(error))
    return Finding(f"source {name}", "ok", f"{len(shards)} shards; {first.url} has {size / 1e6:.1f} MB")
