"""What a rank says when it ends by an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.load import validate
from configs.rundir import RunDir
from launch.worker import out_of_memory
from tests.making import config_values


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 9 GiB"), torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore")])
def test_memory_that_ran_out_is_told_whatever_raised_it(tmp_path: Path, model: Path, error: Exception) -> None:
    run = RunDir.create(validate(config_values("run", tmp_path, model, "x.tar"), "test"))
    said = out_of_memory(error, run)
    assert said is not None and said.startswith("there is too little memory: ") and "Lower batch.micro_size (4 now" in said
    assert out_of_memory(RuntimeError("another thing"), run) is None
