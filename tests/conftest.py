from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.making import make_clips, make_model, run_program
from tools.sandbox import s3


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
def s3_server() -> Iterator[s3.Server]:
    """A real S3 server on loopback."""
    with s3.serve() as server:
        yield server


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of real clips with captions, where EARWITNESS_CLIPS names one; in CI it must."""
    folder = os.environ.get("EARWITNESS_CLIPS")
    if folder is None:
        if os.environ.get("CI"):
            pytest.fail("CI must set EARWITNESS_CLIPS to the folder of real clips")
        pytest.skip("EARWITNESS_CLIPS names no folder of real clips")
    return Path(folder)
