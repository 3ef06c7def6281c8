"""What a rank says when it ends by an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.load import validate
from configs.rundir import RunDir
from launch.worker import out_of_memory
from tests.making import config_values


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore"),
    ],
)
def test_memory_that_ran_out_is_told_whatever_raised_it(
    tmp_path: Path, model: Path, error: Exception
) -> None:
    config = validate(config_values("run", tmp_path, model, "x.tar"), "test")
    run = RunDir.create(config)
    run.ask(config)
    said = out_of_memory(error, run)
    assert (
        said is not None
        and said.startswith("there is too little memory: ")
        and "Lower batch.micro_size (4 now" in said
    )
    assert out_of_memory(RuntimeError("another thing"), run) is None


def test_a_ledger_whose_last_line_was_cut_off_loses_that_line_alone(tmp_path: Path) -> None:
    """As by a full disk, in the middle of a letter."""
    run = RunDir(tmp_path)
    run.events.write_bytes(b'{"event": "attempt", "attempt": 3}\n{"event": "evaluation", "caption": "caf\xc3')
    run.record("attempt", attempt=4)
    assert [line["attempt"] for line in run.ledger()] == [3, 4] and run.next_attempt() == 5
