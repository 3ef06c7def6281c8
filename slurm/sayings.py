"""What Slurm says of a job that it does not take, or lets wait, and what to do about it: the table of
docs/slurm.md."""

from __future__ import annotations

import re

MINE = "`sacctmgr show assoc user=$USER format=account,partition,qos`"
NODES = "`sinfo --format='%P %a %l %s %D %c %m %G'`"

IMPOSSIBLE = "node configuration is not available"
"""Said of a job that no node could take, free or busy; sbatch takes some such jobs, which wait."""
SAYINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "No partition specified or system default partition",
            "invalid partition specified",
            "Invalid partition",
        ),
        f"slurm.partition names none that there is: {NODES} shows them",
    ),
    (
        ("Required partition not available (inactive or drain)", "PartitionDown", "PartitionInactive"),
        f"the partition takes or starts no jobs now: another slurm.partition ({NODES}), or wait",
    ),
    (
        ("Invalid account", "InvalidAccount", "account not permitted to use this partition"),
        f"slurm.account (and slurm.partition) must be of yours: {MINE} lists them",
    ),
    (
        ("Invalid qos", "InvalidQOS", "QOS not permitted to use this partition"),
        f"slurm.qos must be of yours: {MINE} lists them",
    ),
    (
        ("group not permitted to use this partition", "group not permitted to use requested partition"),
        "another slurm.partition: this one is for other groups of users",
    ),
    (
        ("Requested time limit is invalid", "PartitionTimeLimit", "QOSMaxWall*", "AssocMaxWall*"),
        f"slurm.time_minutes is more than allowed: {NODES} (third column), `sacctmgr show qos"
        " format=name,maxwall`; the chain goes on over as many jobs as it takes",
    ),
    (
        ("PartitionConfig",),
        "the job does not fit the partition's limits of time, nodes or users: `scontrol show partition`",
    ),
    (
        ("QOS*Submit*", "Assoc*Submit*"),
        "too few jobs may be in the queue at a time: end others; a chain has two jobs, with slurm.resubmit:"
        " requeue one, and one more until shards are indexed (`python -m tools.index CONFIG` first)",
    ),
    (
        ("QOSGrp*Minutes*", "AssocGrp*Minutes*", "QOSGrpBilling*", "AssocGrpBilling*"),
        "the hours of the account or QOS are used up: another slurm.account or slurm.qos, or ask for more",
    ),
    (
        ("QOSMax*PerJob*", "AssocMax*PerJob*", "QOSMax*PerNode*", "AssocMax*PerNode*"),
        "one job asks for more than allowed: fewer slurm.nodes, gpus_per_node, cpus_per_task or memory_gb, or"
        " another slurm.qos: `sacctmgr show qos format=name,maxtres`",
    ),
    (
        ("QOSMin*", "AssocMin*"),
        "the QOS is for larger jobs: another slurm.qos, or more slurm.nodes or gpus_per_node",
    ),
    (
        ("QOSMax*Job*", "QOSGrp*", "QOSMax*", "AssocMax*", "AssocGrp*"),
        "a limit on what you, or the group, may use at a time: it starts when other jobs have ended, if it is"
        " not larger than the limit by itself",
    ),
    (
        (
            "Memory required by task is not available",
            "Memory specification can not be satisfied",
            "MaxMemPerLimit",
        ),
        "slurm.memory_gb, per node: set it, to what the nodes have or less",
    ),
    (
        (IMPOSSIBLE, "BadConstraints", "More processors requested than permitted"),
        "no node has so much: fewer slurm.gpus_per_node, cpus_per_task or memory_gb, another slurm.partition"
        f" or constraint: {NODES}; drained nodes count as absent: `sinfo -R` says why they are",
    ),
    (
        ("Node count specification invalid", "PartitionNodeLimit"),
        f"slurm.nodes: the partition lets a job have fewer, or wants more: {NODES} (fourth column)",
    ),
    (
        ("Invalid generic resource (gres) specification", "Invalid GRES specification"),
        "slurm.gpu_request: gpus_per_node, or a partition with GPUs",
    ),
    (
        ("Invalid feature specification",),
        "slurm.constraint names no feature that there is: `sinfo --format='%P %f'`",
    ),
    (
        ("reservation is invalid", "ReservationDeleted", "ReservationInvalid"),
        "slurm.reservation: `scontrol show reservation` lists them, and who may use them",
    ),
    (
        ("Nodes required for job are DOWN", "ReqNodeNotAvail"),
        "too few nodes are up or free of reservations: `sinfo -R` says why; it starts when they are back",
    ),
    (
        ("launch failed requeued held", "JobHeldAdmin", "JobHeldUser"),
        "it is held: `scontrol release JOB` lets it go on; after a failed launch the node may be at fault",
    ),
    (
        ("Access/permission denied", "Invalid user id"),
        "you, or this machine, may not submit: try a login node; where only compute nodes may not,"
        " slurm.resubmit: requeue",
    ),
    (
        ("I/O error writing script", "Pathname of a file"),
        "Slurm's own disk is full or takes no such path: tell the site; a shorter run.dir",
    ),
    (
        ("Unspecified error",),
        "the site's own check refuses it, in the words beside this: what it asks for is a setting of the"
        " section slurm (account, qos, memory_gb, ...), or an option in slurm.sbatch",
    ),
)
"""Texts, as they are printed (`*`: letters), and the advice. The first one that is found counts."""
NO_ANSWER = re.compile(
    "unable to contact slurm|timed out|temporarily|connection refused|try again|standby|zero bytes",
    re.IGNORECASE,
)
"""The controller is down or busy. It may have taken a job all the same. (job.sh hands it to grep -E.)"""
NO_CLUSTER = "configuration source"
"""In what Slurm's commands say where none is set up."""


def advice(said: str) -> str:
    """What to do about what Slurm has said; empty if it is not known, or nothing is to be done."""
    for texts, what in SAYINGS:
        if any(_pattern(text).search(said) for text in texts):
            return what
    return ""


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", r"\w*"), re.IGNORECASE)


def table() -> str:
    """The table of docs/slurm.md, in Markdown."""
    rows = [f"| {', '.join(f'`{text}`' for text in texts)} | {what} |" for texts, what in SAYINGS]
    return "\n".join(["| Slurm says | what to set |", "|---|---|", *rows])
