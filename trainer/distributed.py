"""The ranks of a job: start, agree, end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
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
    """This rank and its device.

    What ranks tell each other here goes from host to host, past the GPUs: it does not wait for what they
    still have to do, nor they for it.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64. Every rank must call it at the same point."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_fields(self, numbers: D) -> D:
        """Sums over all ranks of each field of a dataclass: numbers, or tuples of as many on each rank. Every
        rank must call it at the same point."""
        return self.sum_fields_and_gather(numbers, 0.0)[0]

    def sum_fields_and_gather(self, numbers: D, number: float) -> tuple[D, list[float]]:
        """`sum_fields`, and another number of each rank by rank, in one collective. Every rank must call it
        at the same point."""
        by_rank = [0.0] * self.size
        by_rank[self.rank] = number
        fields = {field.name: getattr(numbers, field.name) for field in dataclasses.fields(numbers)}
        flat = [value if isinstance(value, tuple) else (value,) for value in fields.values()]
        sums = iter(self.sum([*itertools.chain(*flat), *by_rank]))
        summed = {
            name: tuple(itertools.islice(sums, len(value))) if isinstance(value, tuple) else next(sums)
            for name, value in fields.items()
        }
        return dataclasses.replace(numbers, **summed), list(sums)

    def any(self, flag: bool) -> bool:
        """Whether something is so on any rank. Every rank must call it at the same point."""
        return self.sum([flag])[0] > 0

    def lowest(self, number: int) -> int:
        """The lowest of all ranks' numbers. Every rank must call it at the same point."""
        lowest = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest)

    def any_of_each(self, flags: torch.Tensor) -> torch.Tensor:
        """(n,) bool: true where it is true on any rank."""
        maxima = flags.to("cpu", torch.uint8, copy=True)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return maxima.bool()

    def share(self, value: T) -> T:
        """The value of rank 0, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T] | None:
        """Values of all ranks on rank 0, None elsewhere."""
        values: Any = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        gathered: list[T] | None = values
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])  # dist.barrier would wait for the GPUs, too


def start(nodes: Sequence[str], device: torch.device) -> World:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. nodes: that of each rank;
    device: what this rank has taken (trainer/devices.py).

    Raises EarwitnessError if the ranks cannot meet, UnfitNode if those of one node do not come, or have one
    GPU between them, ConfigError for a network that is not there.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = device.type == "cuda"
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        check_networks(named, nodes[rank])
    else:
        os.environ |= _gloo_network(os.environ["MASTER_ADDR"])
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=meet(rank, nodes, gpu=_uuid(device)),
            rank=rank,
            world_size=size,
            device_id=device if on_gpu else None,
            timeout=PATIENCE,
        )
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = (
            "another program has taken that port; start again" if "EADDRINUSE" in str(error) else str(error)
        )
        raise CannotMeet(f"rank {rank} cannot meet the others at {place}: {hint}") from None
    return World(rank, size, device)


def alone(device: torch.device) -> World:
    """A world of one rank, which no launcher has started."""
    torch_distributed: Any = dist  # mypy knows no HashStore there
    dist.init_process_group("gloo", store=torch_distributed.HashStore(), rank=0, world_size=1)
    return World(0, 1, device)


def check_networks(named: str, node: str) -> None:
    """Raise ConfigError if one of the networks of GLOO_SOCKET_IFNAME is not there: it often comes from
    another machine's guide."""
    known = [
        interface
        for interface, addresses in psutil.net_if_addrs().items()
        if any(address.family in (socket.AF_INET, socket.AF_INET6) for address in addresses)
    ]
    absent = [name for name in named.split(",") if name not in known]
    if absent:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={named}: {node} has no network {', '.join(absent)} with an address, only"
            f" {', '.join(known)}: unset it (env -u GLOO_SOCKET_IFNAME, or `unset` in slurm.setup), and the"
            " one that leads to rank 0 is taken"
        )


def _gloo_network(master: str) -> dict[str, str]:
    """Lets gloo take the network that leads to rank 0; empty if its name is not found.

    On its own gloo takes the address that this node's own name stands for, which on many nodes is a loopback
    that no other node reaches, or none.
    """
    try:
        family, *_, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own_address = probe.getsockname()[0]
    except OSError:  # no such name
        return {}
    for interface, addresses in psutil.net_if_addrs().items():
        if own_address in (address.address for address in addresses):
            return {"GLOO_SOCKET_IFNAME": interface}
    return {}


def _uuid(device: torch.device) -> str:
    """What no other GPU is called; empty for the CPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def meet(rank: int, nodes: Sequence[str], patience: timedelta = MEETING, *, gpu: str = "") -> Any:
    """The store of rank 0, once all ranks have come to it. gpu: the UUID of the one that this rank takes.

    Raises DistError; on rank 0 UnfitNode or EarwitnessError for ranks that did not come, or that share a GPU.
    """
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store_at: Any = dist.TCPStore  # type: ignore[attr-defined]
    store = store_at(place, port, len(nodes), rank == 0, patience, wait_for_workers=False)
    signs = [f"arrived/{number}" for number in range(len(nodes))]
    store.set(signs[rank], gpu)
    try:
        store.wait(signs, patience)
    except dist.DistError:
        if rank != 0:
            raise
        absent = [nodes[number] for number, sign in enumerate(signs) if not store.check([sign])]
        silent = list(dict.fromkeys(absent))
        said = (
            f"{len(absent)} of {len(nodes)} ranks did not come within {patience.total_seconds():.0f} s: those"
            f" of {', '.join(silent)}"
        )
        if len(silent) == 1 and len(set(nodes)) > 1:
            raise UnfitNode(silent[0], said) from None
        raise EarwitnessError(said) from None
    if rank == 0:
        # Before NCCL begins, which refuses two ranks on one GPU, and does not say on which node.
        _check_gpus([store.get(sign).decode() for sign in signs], nodes)
    return store


def _check_gpus(gpus: Sequence[str], nodes: Sequence[str]) -> None:
    """Raise UnfitNode or, where all of several nodes are like that, EarwitnessError if ranks have one GPU
    between them. gpus: UUIDs by rank, empty for none.

    A node all of whose other GPUs have died looks like one that binds a GPU to each task.
    """
    ranks_by_gpu: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        ranks_by_gpu.setdefault(gpu, []).append(rank)
    shared = {gpu: ranks for gpu, ranks in ranks_by_gpu.items() if gpu and len(ranks) > 1}
    if not shared:
        return
    gpu, ranks = next(iter(shared.items()))
    node, at_fault = nodes[ranks[0]], {nodes[sharing[0]] for sharing in shared.values()}
    said = f"ranks {', '.join(map(str, ranks))} have one GPU between them ({gpu}); each needs its own"
    if len(at_fault) > 1 and at_fault == set(nodes):
        raise EarwitnessError(f"on all nodes, as on {node}: {said}")
    raise UnfitNode(node, f"{node}: {said}")


def has_bf16(device: torch.device) -> bool:
    """Whether a device has BF16 arithmetic. A CPU without it (AVX2 only) takes a hundred times longer for
    BF16 than for fp32."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def end() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
