from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from configs.errors import EarwitnessError
from tools.sandbox import slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A Slurm cluster of four nodes; who breaks nodes or fills it for long starts one of their own."""
    need_packages()
    with slurm.serve(tmp_path_factory.mktemp("slurm"), gpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    """For tests that start clusters of their own."""
    need_packages()


def need_packages(accounting: bool = False) -> None:
    """Without Slurm's packages a test is skipped, but in CI it fails."""
    try:
        slurm.check_packages(accounting=accounting)
    except EarwitnessError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
