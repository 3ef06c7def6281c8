"""A look at every node before the model loads: what differs from the others, or does not answer, is named."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, DataError, EarwitnessError, PeerFailed, UnfitNode
from configs.run.events import Preflight
from configs.run.folder import PACKAGES, RunDir
from configs.run.lease import file_system_time
from configs.schema import RunConfig
from data import storage
from data.sources import expand
from trainer.distributed import World

CODE = Path(__file__).parents[1]
LEAST_FREE = 1 << 30
"""Bytes that must be free for temporary files."""
LARGEST_SKEW = 30.0
"""Seconds that a clock may be off that of the run's file system; S3 refuses requests that are 15 minutes
off."""
SLOWEST = 0.7
"""Share of the median speed of all GPUs below which one counts as broken."""
MATRIX = 4096
ALL_REDUCE_BYTES = 16 << 20
PATIENCE = 10.0
"""Seconds that a file written elsewhere may take to appear."""


@dataclass(frozen=True)
class Finding:
    """What a rank found. problems: by check; values: to be compared with those of the others."""

    node: str
    problems: dict[str, str]
    values: dict[str, Any]
    error_type: type[EarwitnessError] = EarwitnessError
    """Of a problem that would be the same on any node: DataError for credentials."""

    @property
    def is_fatal(self) -> bool:
        """Whether another node would not help."""
        return self.error_type is not EarwitnessError


def look_over(config: RunConfig, run: RunDir, attempt: int, node: str, world: World) -> None:
    """Check this rank's node, and compare it with the others; all ranks call it.

    On rank 0 raises UnfitNode for a node that is worse than the others, EarwitnessError where all are; on the
    others PeerFailed.
    """
    began = time.monotonic()
    token = run.logs / f"attempt-{attempt:06d}" / "token"
    if world.rank == 0:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(str(attempt), encoding="utf-8")
    world.barrier()
    problems: dict[str, str] = {}
    values: dict[str, Any] = {"code": _code_digest(), "versions": _versions()}
    error_type = EarwitnessError
    checks: dict[str, Callable[[], None]] = {
        "file system": lambda: _sees(token, str(attempt)),
        "clock": lambda: _check_clock(token.parent),
        "disk": _check_disk,
        "code": _check_packages,
    }
    if int(os.environ["LOCAL_RANK"]) == 0:
        checks["storage"] = lambda: _check_storage(config)
    if world.device.type == "cuda":
        checks["GPU"] = lambda: values.update(tflops=_matmul_tflops(world.device))
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            problems[name] = str(error) or type(error).__name__
            if isinstance(error, ConfigError | DataError):
                error_type = type(error)
    reduced, seconds = _all_reduce(world)
    if reduced is not None:
        problems["all-reduce"] = reduced
    findings: Any = world.gather(Finding(node, problems, values, error_type))
    worst = _compare(findings) if findings is not None else None
    if world.share(worst is not None):
        raise worst or PeerFailed("a node is unfit; rank 0 names it")
    if world.rank == 0:
        token.unlink(missing_ok=True)
        speeds = [round(f.values["tflops"], 1) for f in findings if "tflops" in f.values]
        gigabytes = ALL_REDUCE_BYTES / 1e9 / seconds
        run.ledger.record(
            Preflight(
                attempt=attempt,
                seconds=round(time.monotonic() - began, 2),
                all_reduce_gb_per_second=round(gigabytes, 3),
                tflops=speeds,
            )
        )


def _compare(findings: list[Finding]) -> EarwitnessError | None:
    """What is wrong with a node, or with all."""
    nodes = {finding.node for finding in findings}
    bad = [finding for finding in findings if finding.problems]
    if bad and {finding.node for finding in bad} == nodes and (len(nodes) > 1 or bad[0].is_fatal):
        return bad[0].error_type(f"before the start, on all nodes: {_words(bad[0])}")
    if bad:
        return UnfitNode(bad[0].node, f"{bad[0].node} is unfit: {_words(bad[0])}")
    for what in ("code", "versions"):
        common = statistics.mode(str(finding.values[what]) for finding in findings)
        for finding in findings:
            if str(finding.values[what]) != common:
                return UnfitNode(
                    finding.node,
                    f"{finding.node} has other {what} than most: {finding.values[what]} instead of {common}",
                )
    speeds = [finding.values["tflops"] for finding in findings if "tflops" in finding.values]
    for finding in findings if speeds else []:
        if finding.values["tflops"] < SLOWEST * statistics.median(speeds):
            speed, usual = finding.values["tflops"], statistics.median(speeds)
            return UnfitNode(
                finding.node,
                f"{finding.node}: a GPU does {speed:.0f} TFLOP/s in a matrix product, {usual:.0f} are usual"
                " here",
            )
    return None


def _words(finding: Finding) -> str:
    return "; ".join(f"{name}: {problem}" for name, problem in finding.problems.items())


def _sees(token: Path, content: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (token.is_file() and token.read_text(encoding="utf-8") == content):
        if time.monotonic() > deadline:
            raise OSError(
                f"does not see {token}, which rank 0 has written: is the run's folder on a file system that"
                " all nodes share?"
            )
        time.sleep(0.1)


def _check_clock(folder: Path) -> None:
    skew = time.time() - file_system_time(folder)
    if abs(skew) > LARGEST_SKEW:
        raise OSError(f"{skew:+.0f} s off that of the file system of {folder}")


def _check_disk() -> None:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"0" * 4096)
    if (free := shutil.disk_usage(folder).free) < LEAST_FREE:
        raise OSError(f"{folder}: only {free / 1e6:.0f} MB are free")


def _check_packages() -> None:
    """Other packages are called data or trainer, too: all must come from one folder."""
    for name in filter(sys.modules.__contains__, PACKAGES):
        place = Path(sys.modules[name].__file__ or "")
        if not place.is_relative_to(CODE):
            raise ImportError(
                f"package {name} comes from {place}, not from {CODE}: something on PYTHONPATH hides it"
            )


def _check_storage(config: RunConfig) -> None:
    for source in config.data.sources:
        storage.stat(expand(source)[0].location)


def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((CODE / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> str:
    return ", ".join(
        [
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "numpy")),
        ]
    )


def _matmul_tflops(device: torch.device) -> float:
    """Speed of a matrix product, whose result must be right."""
    ones = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    product = ones @ ones
    if not bool((product == MATRIX).all()):
        raise ArithmeticError(f"{torch.cuda.get_device_name(device)}: a matrix product is wrong")
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(20):
        torch.mm(ones, ones, out=product)
    torch.cuda.synchronize(device)
    return 20 * 2 * MATRIX**3 / (time.perf_counter() - began) / 1e12


def _all_reduce(world: World) -> tuple[str | None, float]:
    """A problem, if the sum over all ranks is wrong, and the seconds that it took."""
    content = torch.full((ALL_REDUCE_BYTES // 4,), float(world.rank + 1), device=world.device)
    torch.distributed.all_reduce(content[:1])
    began = time.perf_counter()
    torch.distributed.all_reduce(content)
    right = bool((content[1:] == world.size * (world.size + 1) / 2).all())
    return None if right else "the sum over all ranks is wrong", time.perf_counter() - began
