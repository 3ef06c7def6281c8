"""The ranks of a job: start, agree, end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from configs.errors import CannotMeet, ConfigError, EarwitnessError, UnfitNode

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")
PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one another: at a start, rank 0 may merge indexes or bring a checkpoint back from
its mirror."""

MEETING = timedelta(minutes=10)
"""How long they wait for one another at first: imports from a network file system may take minutes."""


@dataclass(frozen=True)
class World:
    """This rank and its device."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64. Every rank must call it at the same point."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_fields(self, numbers: D) -> D:
        """Sums over all ranks of each field of a dataclass of numbers. Every rank must call it at the same
        point."""
        names = [field.name for field in dataclasses.fields(numbers)]
        sums = self.sum([float(getattr(numbers, name)) for name in names])
        return dataclasses.replace(numbers, **dict(zip(names, sums, strict=True)))

    def any(self, flag: bool) -> bool:
        """Whether something is so on any rank. Every rank must call it at the same point."""
        return self.sum([flag])[0] > 0

    def any_of_each(self, flags: torch.Tensor) -> torch.Tensor:
        """(n,) bool: true where it is true on any rank."""
        maxima = flags.to(self.device, torch.uint8)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return maxima.cpu().bool()

    def share(self, value: T) -> T:
        """The value of rank 0, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T] | None:
        """Values of all ranks on rank 0, None elsewhere."""
        values: Any = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        gathered: list[T] | None = values
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


def start(nodes: Sequence[str]) -> World:
    """Join the job that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe. nodes: that of
    each rank.

    Raises ConfigError for a GPU without BF16, EarwitnessError if the ranks cannot meet, UnfitNode if those of
    one node do not come.
    """
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"--procs {size}: this machine has {torch.cuda.device_count()} GPUs, and each process needs"
                " one; leave --procs out, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ConfigError(
                f"{name}: this GPU has no BF16 arithmetic, which training uses; take one of the Ampere"
                " generation or newer (A100, H100)"
            )
    else:
        device = torch.device("cpu")
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meet(rank, nodes),
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
            timeout=PATIENCE,
        )
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = (
            "another program has taken that port; start again" if "EADDRINUSE" in str(error) else str(error)
        )
        raise CannotMeet(f"rank {rank} cannot meet the others at {place}: {hint}") from None
    return World(rank, size, device)


def meet(rank: int, nodes: Sequence[str], patience: timedelta = MEETING) -> Any:
    """The store of rank 0, once all ranks have come to it. Raises DistError; on rank 0 UnfitNode or
    EarwitnessError for those that did not come."""
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store_at: Any = dist.TCPStore  # type: ignore[attr-defined]
    store = store_at(place, port, len(nodes), rank == 0, patience, wait_for_workers=False)
    signs = [f"arrived/{number}" for number in range(len(nodes))]
    store.set(signs[rank], "")
    try:
        store.wait(signs, patience)
    except dist.DistError:
        if rank != 0:
            raise
        absent = [number for number, sign in enumerate(signs) if not store.check([sign])]
        of_nodes = list(dict.fromkeys(nodes[number] for number in absent))
        said = (
            f"{len(absent)} of {len(nodes)} ranks did not come within {patience.total_seconds():.0f} s: those"
            f" of {', '.join(of_nodes)}"
        )
        raise (
            UnfitNode(of_nodes[0], said) if len(of_nodes) == 1 < len(set(nodes)) else EarwitnessError(said)
        ) from None
    return store


def has_bf16(device: torch.device) -> bool:
    """Whether a device has BF16 arithmetic. A CPU without it (AVX2 only) takes a hundred times longer for
    BF16 than for fp32."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def end() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
