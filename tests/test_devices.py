"""Which device a rank takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError, EarwitnessError, UnfitNode
from configs.load import validate
from configs.ports import free_ports
from launch import doctor
from launch.gpus import count_visible
from tests.making import config_values
from trainer import devices, distributed
from trainer.engines import zero2

CPU = torch.device("cpu")
NODES = ["n1", "n1", "n2", "n2"]


def first_gpu() -> torch.device:
    return torch.device("cuda", 0)


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("visible", "local_rank", "asked", "device"),
    [
        (8, 5, 8, torch.device("cuda", 5)),
        (8, 5, 0, CPU),  # a job on the CPUs of a node whose GPUs it may see all the same
        (1, 5, 8, torch.device("cuda", 0)),  # the site binds a GPU to each task
        (1, 0, 1, torch.device("cuda", 0)),
        (2, 1, None, torch.device("cuda", 1)),
        (0, 1, None, CPU),
    ],
)
def test_a_rank_takes_its_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, asked: int | None, device: torch.device
) -> None:
    have_gpus(monkeypatch, visible)
    assert devices.choose_device(local_rank, "n1", asked) == device


@pytest.mark.parametrize("visible", [0, 3])
def test_a_node_with_too_few_gpus_for_a_job_is_unfit(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    have_gpus(monkeypatch, visible)
    with pytest.raises(UnfitNode, match=f"^n7: only {visible} of 8 GPUs answer$") as caught:
        devices.choose_device(3, "n7", 8)
    assert caught.value.node == "n7"


def test_more_processes_than_gpus_on_this_machine_are_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match="has 1 GPUs, and each process needs one: --procs 1, or"):
        devices.choose_device(1, "here", None)


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (
            RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore"),
            "exclusive mode",
        ),
        (RuntimeError("CUDA error: out of memory"), "filled up"),
        ((3 << 30, 80 << 30), "only 3.2 of 85.9 GB are free, other processes have the rest"),
        ((40 << 30, 80 << 30), ""),
    ],
)
def test_a_gpu_that_others_have_is_told_apart(memory: RuntimeError | tuple[int, int], said: str) -> None:
    def ask() -> tuple[int, int]:
        if isinstance(memory, RuntimeError):
            raise memory
        return memory

    trouble = devices.trouble_with(ask)
    assert said in trouble and bool(trouble) == bool(said)


def test_an_error_of_another_kind_is_no_gpu_that_others_have() -> None:
    def ask() -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        devices.trouble_with(ask)


@pytest.mark.parametrize(
    ("node", "listed", "error", "said"),
    [
        (None, None, ConfigError, r"^GPU 1 \(H100\): only .* leave it out: CUDA_VISIBLE_DEVICES=0,2$"),
        (None, "4,GPU-8a,6", ConfigError, "leave it out: CUDA_VISIBLE_DEVICES=4,6$"),
        ("n7", None, UnfitNode, r"^n7: GPU 1 \(H100\): only 1.1 of 85.9 GB are free"),
    ],
)
def test_a_gpu_that_others_have_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, node: str | None, listed: str | None, error: type[Exception], said: str
) -> None:
    """On a node of a job the chain goes on elsewhere."""
    have_gpus(monkeypatch, 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    with pytest.raises(error, match=said):
        devices.take(torch.device("cuda", 1), node)


def test_of_one_gpu_none_is_left() -> None:
    assert devices.leave_out("GPU-8a", 0) == (
        "train on another machine, or with CUDA_VISIBLE_DEVICES= on the CPU"
    )


UUIDS = ["GPU-1a2b", "GPU-1c3d", "GPU-5e6f"]


@pytest.mark.parametrize(
    ("listed", "count"),
    [
        ("0,2", 2),
        (" 1 , 0", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),  # CUDA reads up to the first one that is none
        ("0,7,1", 1),
        ("NoDevFiles", 0),  # as Slurm had it for a job without GPUs
        ("1,1", 0),
        ("GPU-5e6f,GPU-1a", 2),
        ("GPU-1", 0),  # of which one?
        ("GPU-5e6f,GPU-9999", 1),
        ("GPU-5e6f,GPU-5e6f", 0),
        ("MIG-b1,MIG-b2", 1),  # a process can use one part of a GPU
    ],
)
def test_as_many_processes_as_gpus_that_cuda_sees(listed: str, count: int) -> None:
    assert count_visible(listed, UUIDS) == count


def test_gpus_are_counted_where_the_driver_does_not_list_them() -> None:
    assert count_visible("0,3", []) == 2 and count_visible("GPU-1a,GPU-2b,GPU-1a", []) == 0


def outcomes(gpus: list[str], nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What each rank raises when all meet, whose GPUs have these UUIDs."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    stores: list[Any] = []  # kept until all have met: the others ask that of rank 0

    def come(rank: int) -> Exception | None:
        try:
            stores.append(distributed.meet(rank, nodes, gpu=gpus[rank]))
        except (EarwitnessError, torch.distributed.DistError) as error:  # rank 0, and those that lose it
            return error
        return None

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(come, range(len(gpus))))


def test_ranks_whose_gpus_are_their_own_or_who_have_none_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes(["a", "b", "c", "d"], NODES, monkeypatch) == [None] * 4
    assert outcomes([""] * 4, NODES, monkeypatch) == [None] * 4


@pytest.mark.parametrize(
    ("gpus", "nodes", "node", "said"),
    [
        (["a", "b", "c", "c"], NODES, "n2", "n2: ranks 2, 3 have one GPU between them .c."),
        (["a", "a"], ["n1", "n1"], "n1", "n1: ranks 0, 1 have one GPU between them .a."),
        (["a", "a", "c", "c"], NODES, None, "on all nodes, as on n1: ranks 0, 1 have one GPU"),
    ],
)
def test_ranks_with_one_gpu_between_them_are_found_before_nccl_is(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], nodes: list[str], node: str | None, said: str
) -> None:
    """A node all of whose other GPUs have died looks as if the site had bound one to each task."""
    error = outcomes(gpus, nodes, monkeypatch)[0]
    assert error is not None
    with pytest.raises(EarwitnessError, match=said):
        raise error
    assert getattr(error, "node", None) == node


class Properties:
    """Of a GPU, as a torch without UUIDs gives them."""


class KnownProperties(Properties):
    uuid = "4b5a"


@pytest.mark.parametrize(("properties", "uuid"), [(Properties, ""), (KnownProperties, "4b5a")])
def test_ranks_join_with_the_device_they_were_given(
    monkeypatch: pytest.MonkeyPatch, properties: Callable[[], Properties], uuid: str
) -> None:
    taken: list[torch.device] = []
    met: list[str] = []
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties())
    monkeypatch.setattr(distributed, "meet", lambda rank, nodes, gpu: met.append(gpu))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **given: joined.append({backend: given})
    )
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    devices.take(first_gpu(), "n1")
    world = distributed.start(["n1", "n1"], first_gpu())
    assert (world.rank, world.size, world.device) == (1, 2, first_gpu())
    assert taken == [first_gpu()] and met == [uuid]
    (backend,) = joined[0]
    assert backend == "cpu:gloo,cuda:nccl", "what ranks tell each other must not wait for their GPUs"
    assert joined[0][backend]["device_id"] == first_gpu()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_network_that_a_node_does_not_have_is_said_so() -> None:
    """As GLOO_SOCKET_IFNAME=ib0 of a shell says, to a node without one."""
    distributed.check_networks("lo", "n1")
    with pytest.raises(ConfigError, match=r"n1 has no network ib7 .*only .*lo.*env -u GLOO_SOCKET_IFNAME"):
        distributed.check_networks("lo,ib7", "n1")


class Begun(Exception):
    """DeepSpeed was begun."""


def test_deepspeed_takes_the_gpu_of_its_rank_where_each_task_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    """It takes the GPU whose number is LOCAL_RANK, but all tasks of a site that binds them have number 0."""
    numbers: list[str] = []

    def initialize(**given: Any) -> None:
        numbers.append(os.environ["LOCAL_RANK"])
        raise Begun

    monkeypatch.setattr(zero2.deepspeed, "initialize", initialize)
    monkeypatch.setenv("LOCAL_RANK", "3")
    config = validate(config_values("run", tmp_path, model, "x.tar"), "test")
    for device in (first_gpu(), CPU):
        with pytest.raises(Begun):
            zero2.Zero2Engine(torch.nn.Linear(2, 2), config, distributed.World(3, 8, device))
    assert numbers == ["0", "3"] and os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(
    ("backends", "accelerator"), [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cuda")]
)
def test_deepspeed_computes_on_what_the_ranks_do(
    monkeypatch: pytest.MonkeyPatch, backends: str, accelerator: str
) -> None:
    """Left alone, it takes a GPU of a node where the job has asked for none."""
    have_gpus(monkeypatch, 8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    assert zero2._accelerator() == accelerator


@pytest.mark.parametrize(
    ("version", "verdict"), [("2.9.1+cu128", "bad"), ("2.10.0", "ok"), ("2.13.0+cpu", "ok")]
)
def test_doctor_says_whether_a_gpu_has_attention_for_packed_clips(version: str, verdict: str) -> None:
    assert doctor._attention(version).verdict == verdict
