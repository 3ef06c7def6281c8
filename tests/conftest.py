from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.making import make_clips, make_model, run_program
from tools.sandbox import s3

LONGEST_FIRST = ("test_demo.py", "test_ends.py", "test_chain.py")
"""Files of tests that take minutes: begun last, they would keep one core busy and leave the others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; all else stays as it is."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper, without weights."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSV of 60 clips."""
    return make_clips(tmp_path_factory.mktemp("clips"), range(60))


@pytest.fixture(scope="session")
def shards(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Glob of the shards of those clips, as `tools.pack` writes them."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    done = run_program("tools.pack", clips, out, "--shard-mb", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    return f"{out}/*.tar"


@pytest.fixture(scope="session")
def launch() -> Iterator[forks.Launcher]:
    """Runs attempts without seconds of imports."""
    with forks.serve() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.Server]:
    """A real S3 server on loopback."""
    with s3.serve() as server:
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other after each small product take minutes on cores that are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of real clips with captions."""
    return _named_folder("EARWITNESS_CLIPS", "real clips")


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """Folder with the real Whispers `tiny.en` and `base`."""
    return _named_folder("EARWITNESS_MODELS", "the real Whispers tiny.en and base")


def _named_folder(variable: str, what: str) -> Path:
    """The folder that an environment variable names; without it the test is skipped, but in CI it fails."""
    if folder := os.environ.get(variable):
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail(f"CI must set {variable} to the folder of {what}")
    pytest.skip(f"{variable} names no folder of {what}")
