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

import torch

from configs.errors import ConfigError, DataError, EarwitnessError, PeerFailed, UnfitNode
from configs.run.events import Preflight
from configs.run.folder import PACKAGES, RunDir
from configs.run.lease import file_system_time
from configs.schema import RunConfig
from data import storage
from data.sources import expand
from trainer.distributed import World
from trainer.flops import data_sheet_tflops

CODE = Path(__file__).parents[1]
LEAST_FREE = 1 << 30
"""Bytes that must be free for temporary files."""
LARGEST_SKEW = 30.0
"""Seconds that a clock may be off that of the run's file system; S3 refuses requests that are 15 minutes
off."""
SLOWEST = 0.7
"""Share of the median speed of all GPUs of the same name below which one is slow."""
EXPECTED = 1 / 3
"""Share of the data sheet's speed that any sound GPU reaches; one that does is not slow."""
MATRIX = 4096
"""Rows and columns of the matrices whose product is timed."""
WARM_UP = 20
"""Products before time is taken: libraries load, and clocks rise."""
MEASURED_SECONDS = 0.2
"""Least time that the products must take together."""
CHECKED_ROWS = 16
"""Rows of a product that are compared with the CPU's."""
TOLERANCE = 2**-6
"""Of a product in BF16, which has 8 significant bits and may round partial sums, too."""
ALL_REDUCE_BYTES = 16 << 20
PATIENCE = 10.0
"""Seconds that a file written elsewhere may take to appear."""


@dataclass(frozen=True)
class Gpu:
    """The GPU of a rank. tflops: TFLOP/s in a matrix product."""

    name: str
    tflops: float


@dataclass(frozen=True)
class Finding:
    """What a rank found. problems: by check; code, versions, gpu: to be compared with those of the others."""

    node: str
    problems: dict[str, str]
    code: str
    versions: str
    gpu: Gpu | None = None
    error_type: type[EarwitnessError] = EarwitnessError
    """Of a problem that would be the same on any node: DataError for credentials."""

    @property
    def is_fatal(self) -> bool:
        """Whether another node would not help."""
        return self.error_type is not EarwitnessError

    @property
    def words(self) -> str:
        """All its problems in a line."""
        return "; ".join(f"{check}: {problem}" for check, problem in self.problems.items())


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
    error_type = EarwitnessError
    checks: dict[str, Callable[[], None]] = {
        "file system": lambda: _sees(token, str(attempt)),
        "clock": lambda: _check_clock(token.parent),
        "disk": _check_disk,
        "code": _check_packages,
    }
    if int(os.environ["LOCAL_RANK"]) == 0:
        checks["storage"] = lambda: _check_storage(config)
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            problems[name] = _words(error)
            if isinstance(error, ConfigError | DataError):
                error_type = type(error)
    gpu = None
    if world.device.type == "cuda":
        try:
            gpu = Gpu(torch.cuda.get_device_name(world.device), matmul_tflops(world.device))
        except Exception as error:
            problems["GPU"] = _words(error)
    # No error is caught around a collective: this rank would go on while the others wait in it.
    all_reduce_seconds = _all_reduce(world)
    if all_reduce_seconds is None:
        problems["all-reduce"] = "the sum over all ranks is wrong"
    findings = world.gather(Finding(node, problems, _code_digest(), _versions(), gpu, error_type))
    worst = _compare(findings) if findings else None
    if world.share(worst is not None):
        raise worst or PeerFailed("a node is unfit; rank 0 names it")
    if findings and all_reduce_seconds is not None:
        token.unlink(missing_ok=True)
        notes = _notes(findings)
        for note in notes:
            print(note, flush=True)
        run.ledger.record(
            Preflight(
                attempt=attempt,
                seconds=round(time.monotonic() - began, 2),
                all_reduce_gb_per_second=round(ALL_REDUCE_BYTES / 1e9 / all_reduce_seconds, 3),
                tflops=[round(finding.gpu.tflops, 1) for finding in findings if finding.gpu],
                notes=notes,
            )
        )


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _compare(findings: list[Finding]) -> EarwitnessError | None:
    """What is wrong with a node, or with all."""
    return _with_problems(findings) or _unlike_most(findings) or _with_slow_gpu(findings)


def _with_problems(findings: list[Finding]) -> EarwitnessError | None:
    troubled = [finding for finding in findings if finding.problems]
    if not troubled:
        return None
    worst = troubled[0]
    nodes = {finding.node for finding in findings}
    on_all_nodes = nodes == {finding.node for finding in troubled}
    # Of a single node nobody knows whether another one would do.
    if on_all_nodes and (len(nodes) > 1 or worst.is_fatal):
        return worst.error_type(f"before the start, on all nodes: {worst.words}")
    return UnfitNode(worst.node, f"{worst.node} is unfit: {worst.words}")


def _unlike_most(findings: list[Finding]) -> UnfitNode | None:
    for what in ("code", "versions"):
        common = statistics.mode(getattr(finding, what) for finding in findings)
        for finding in findings:
            own = getattr(finding, what)
            if own != common:
                return UnfitNode(
                    finding.node, f"{finding.node} has other {what} than most: {own} instead of {common}"
                )
    return None


def _with_slow_gpu(findings: list[Finding]) -> UnfitNode | None:
    """The node of a GPU that is slow beside others of its name, and by what is known of such a card."""
    for name, speeds in _speeds_by_card(findings).items():
        usual = statistics.median(speeds)
        limit = SLOWEST * usual
        known = data_sheet_tflops(name)
        if known:
            limit = min(limit, EXPECTED * known)
        for finding in findings:
            if finding.gpu and finding.gpu.name == name and finding.gpu.tflops < limit:
                return UnfitNode(
                    finding.node,
                    f"{finding.node}: a GPU ({name}) does {finding.gpu.tflops:.0f} TFLOP/s in a matrix"
                    f" product, {usual:.0f} are usual here",
                )
    return None


def _notes(findings: list[Finding]) -> list[str]:
    """What should be looked at, though no node is worse than the others: cards all of which are slow."""
    notes = []
    for name, speeds in _speeds_by_card(findings).items():
        known = data_sheet_tflops(name)
        if known and max(speeds) < EXPECTED * known:
            notes.append(
                f"all GPUs are slow: {name} does {max(speeds):.0f} TFLOP/s at most in a matrix product,"
                f" {known:.0f} by its data sheet; are their clocks or their power limited, or others at work"
                " on them?"
            )
    return notes


def _speeds_by_card(findings: list[Finding]) -> dict[str, list[float]]:
    """TFLOP/s of all GPUs, by their name."""
    speeds: dict[str, list[float]] = {}
    for finding in findings:
        if finding.gpu:
            speeds.setdefault(finding.gpu.name, []).append(finding.gpu.tflops)
    return speeds


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


def matmul_tflops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a device that is warm, in a product of random matrices. Raises ArithmeticError if the result
    is wrong."""
    numbers = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(MATRIX, MATRIX, generator=numbers, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def seconds_of(products: int) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right, out=product)
        _synchronize(device)
        return time.perf_counter() - began

    seconds_of(WARM_UP)
    products = WARM_UP
    while (seconds := seconds_of(products)) < MEASURED_SECONDS:
        products *= 2
    rows = torch.arange(0, MATRIX, max(1, MATRIX // CHECKED_ROWS))
    exact = left.cpu()[rows].float() @ right.cpu().float()
    typical = MATRIX**0.5  # standard deviation of an element of the product
    if not torch.allclose(product.cpu()[rows].float(), exact, rtol=TOLERANCE, atol=TOLERANCE * typical):
        raise ArithmeticError("a matrix product is wrong")
    return products * 2 * MATRIX**3 / seconds / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_reduce(world: World) -> float | None:
    """Seconds of a sum over all ranks, of ALL_REDUCE_BYTES; None if it is wrong."""
    content = torch.full((ALL_REDUCE_BYTES // 4,), float(world.rank + 1), device=world.device)
    torch.distributed.all_reduce(content[:1])
    _synchronize(world.device)
    began = time.perf_counter()
    torch.distributed.all_reduce(content)
    _synchronize(world.device)
    seconds = time.perf_counter() - began
    is_right = bool((content[1:] == world.size * (world.size + 1) / 2).all())
    return seconds if is_right else None
