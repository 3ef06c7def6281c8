"""What srun tells a rank of itself."""

from __future__ import annotations

import os
import socket
import zlib

FIRST_PORT, LAST_PORT = 15_000, 32_000
"""Ports that ranks meet at: below those that systems give away (32768 and up)."""


def in_job() -> bool:
    """Whether this rank is a task of srun's: a launcher hands its own ranks nothing of a job around it."""
    return "SLURM_PROCID" in os.environ


def join_job() -> None:
    """Tell torch.distributed, through the environment, which rank this is, how many share its node and where
    all ranks meet, whatever was there before; nothing outside of srun's tasks.

    Node names may not resolve: the address is that of the node that the job runs its commands on, which is
    also that of rank 0.
    """
    if not in_job():
        return
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    seed = "/".join(
        os.environ.get(name, "")
        for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    port = FIRST_PORT + zlib.crc32(seed.encode()) % (LAST_PORT - FIRST_PORT)
    os.environ |= {name: os.environ[slurms_name] for name, slurms_name in names.items()}
    tasks_per_node = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # as 8, or 8(x4)
    os.environ["LOCAL_WORLD_SIZE"] = tasks_per_node.partition("(")[0]
    address = os.environ["SLURM_LAUNCH_NODE_IPADDR"].strip("[]")  # IPv6, as some versions write it
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def node_name() -> str:
    """This node, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
