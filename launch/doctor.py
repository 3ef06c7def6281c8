"""`launch doctor`: is this machine fit to train? Each finding with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.errors import EarwitnessError
from slurm import cluster

Finding = tuple[str, str, str]
"""What, verdict (ok, note, bad), details."""
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


def examine(config: Path | None) -> int:
    """Print the findings; 0 if nothing is bad, 1 otherwise."""
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _device, _programs, _credentials]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except ImportError as error:  # _packages has said so
            findings.append((check.__name__.strip("_"), "bad", str(error)))
    if config is not None:
        findings += _config(config)
    table = Table("what", "", "found", title="earwitness doctor", title_justify="left")
    for what, verdict, details in findings:
        table.add_row(what, {"ok": "[green]ok", "note": "[yellow]note", "bad": "[red]bad"}[verdict], details)
    Console().print(table)
    bad = [what for what, verdict, _ in findings if verdict == "bad"]
    print(f"verdict: mend {', '.join(bad)} first" if bad else "verdict: ready to train")
    return 1 if bad else 0


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield name, "ok", importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "bad", "not installed: pip install -r requirements.txt"


def _device() -> Iterator[Finding]:
    import torch

    driver = (
        shutil.which("nvidia-smi")
        and subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            check=False,
        ).stdout.split()
    )
    yield (
        "NVIDIA driver",
        "ok" if driver else "note",
        driver[0] if driver else "none: training will run on the CPU",
    )
    yield (
        "CUDA of torch",
        "ok" if torch.version.cuda else "note",
        torch.version.cuda or "this torch is built without CUDA",
    )
    if not torch.cuda.is_available():
        if driver:
            yield (
                "GPU",
                "bad",
                (
                    "torch sees none: install a torch built for a CUDA that this driver supports, and check"
                    " CUDA_VISIBLE_DEVICES"
                ),
            )
        yield (
            "CPU",
            "ok",
            (
                f"{len(os.sched_getaffinity(0))} cores, gloo"
                f" {'available' if torch.distributed.is_gloo_available() else 'missing'}"
            ),
        )
        return
    yield "NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version()))
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        fit = torch.cuda.is_bf16_supported(including_emulation=False)
        details = f"{about.name}, {about.total_memory / 1e9:.0f} GB"
        yield (
            f"GPU {number}",
            "ok" if fit else "bad",
            details + ("" if fit else ": no BF16, training needs it (Ampere or newer)"),
        )


def _programs() -> Iterator[Finding]:
    yield (
        "FFmpeg",
        "ok" if shutil.which("ffmpeg") else "note",
        shutil.which("ffmpeg") or "not on the PATH: needed for M4A, AAC, MP4 and WebM clips only",
    )
    if not cluster.here():
        yield "Slurm", "note", "no sbatch here: only `launch train` will work"
        return
    try:
        partitions = cluster.run("sinfo", "--noheader", "--format=%R", seconds=10).split()
        yield "Slurm", "ok", f"partitions {', '.join(dict.fromkeys(partitions))}"
    except EarwitnessError as error:
        yield "Slurm", "note", f"it does not answer: {str(error).splitlines()[-1]}"


def _credentials() -> Iterator[Finding]:
    import boto3

    found = boto3.Session().get_credentials()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if found is None:
        yield (
            "S3 credentials",
            "note",
            "none: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, if shards are on S3",
        )
    else:
        yield "S3 credentials", "ok", f"from {found.method}, endpoint {endpoint}"


def _config(path: Path) -> Iterator[Finding]:
    from configs.load import load
    from data import storage
    from data.dataset import list_shards, load_sidecars

    try:
        config = load(path)
        yield "config", "ok", str(path)
        shards = list_shards(config)
        for source in config.data.sources:
            first = next(shard for shard in shards if shard.source is source)
            size = storage.stat(first.location).size
            count = sum(shard.source is source for shard in shards)
            yield (
                f"source {source.name}",
                "ok",
                f"{count} shards; {first.location.url} has {size / 1e6:.1f} MB",
            )
        sidecars = load_sidecars(config, shards)
        for shard, sidecar in zip(shards, sidecars, strict=True):
            if sidecar and sidecar.damage:
                yield f"source {shard.source.name}", "note", f"{shard.location.url}: {sidecar.loss()}"
        missing = sidecars.count(None)
        todo = f"{missing} of {len(shards)} shards are not indexed: python -m tools.index {path}"
        yield "index", "note" if missing else "ok", todo if missing else "complete"
    except EarwitnessError as error:
        yield "config", "bad", str(error)
