"""What a rank says when it ends by an error."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import CannotMeet, CheckpointError, ConfigError, DataError, PeerFailed, UnfitNode
from configs.load import validate
from configs.run.causes import Cause
from configs.run.events import MicroSeconds
from configs.run.lease import Superseded
from launch import worker
from launch.failures import diagnose
from tests.making import config_values


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_ran_out_is_told_whatever_raised_it(
    tmp_path: Path, model: Path, error: Exception
) -> None:
    config = validate(config_values("run", tmp_path, model, "x.tar"), "test")
    diagnosis = diagnose(error, config)
    assert diagnosis.cause is Cause.OUT_OF_MEMORY
    assert diagnosis.message.startswith("there is too little memory: ")
    assert "Lower batch.micro_seconds (4 now" in diagnosis.message
    assert diagnose(RuntimeError("another thing"), config).cause is Cause.ERROR


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore"),
        RuntimeError("CUDA error: out of memory\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_to_do_without_gpu_memory_depends_on_who_chose_the_micro_batch(
    tmp_path: Path, model: Path, error: Exception
) -> None:
    values = config_values("run", tmp_path, model, "x.tar")
    fixed = diagnose(error, validate(values, "test"))
    assert fixed.cause is Cause.OUT_OF_GPU_MEMORY
    assert "Lower batch.micro_seconds (4 now" in fixed.message and "or write auto" in fixed.message
    values["batch"]["micro_seconds"] = "auto"
    automatic = validate(values, "test")
    taken = MicroSeconds(attempt=0, device="H100", setup="1 ranks", seconds=480, least=30, why="it fits")
    assert "480 s of audio (batch.micro_seconds: auto); the next start takes half" in (
        diagnose(error, automatic, taken).message
    )
    least = diagnose(error, automatic, replace(taken, seconds=30)).message
    assert (
        "No less audio than a window" in least and "gradient_checkpointing" in least and "half" not in least
    )
    of_host = diagnose(MemoryError(), automatic, taken).message
    assert "data.read_ahead_mb" in of_host and "half" not in of_host, "the data's memory, not the GPU's"


@pytest.mark.parametrize(
    ("error", "cause", "exit_code"),
    [
        (ConfigError("wrong"), Cause.BAD_INPUT, 2),
        (DataError("gone"), Cause.BAD_INPUT, 3),
        (Superseded("a later one"), Cause.SUPERSEDED, 1),
        (UnfitNode("n1", "bad disk"), Cause.UNFIT_NODE, 1),
        (PeerFailed("another"), Cause.LOST_PEER, 1),
        (CannotMeet("nobody there"), Cause.LOST_PEER, 1),
        (torch.distributed.DistBackendError("NCCL says"), Cause.LOST_PEER, 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), Cause.LOST_PEER, 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Cause.OUT_OF_MEMORY, 1),
        (ZeroDivisionError("a bug"), Cause.ERROR, 1),
        (CheckpointError("there is too little memory, says somebody"), Cause.ERROR, 1),
    ],
)
def test_a_rank_says_why_it_fails_as_a_value(error: Exception, cause: Cause, exit_code: int) -> None:
    diagnosis = diagnose(error, None)
    assert (diagnosis.cause, diagnosis.exit_code) == (cause, exit_code)


@pytest.mark.parametrize(
    ("told", "alloc_conf", "huge_pages"),
    [
        ({}, "expandable_segments:True", "1"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64", "1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None, "1"),
        ({"THP_MEM_ALLOC_ENABLE": "0"}, "expandable_segments:True", "0"),
    ],
)
def test_torch_takes_memory_in_large_pieces_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], alloc_conf: str | None, huge_pages: str
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    worker._set_up_memory()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == alloc_conf
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == huge_pages
