"""A real Slurm cluster of several nodes on this machine, from Debian's packages, in a folder that is thrown
away.

Every process of the cluster, daemons and jobs alike, has SLURM_CONF and SLURMD_NODENAME in its environment:
Slurm sets both for jobs, and the daemons are started with them. These two tell which processes to end, so
that other clusters, and a shell that exports SLURM_CONF, are left alone; only Slurm's commands that wait for
the cluster in such a shell are ended with it. Daemons listen on all interfaces, as names need not resolve;
the cluster's own munge key keeps strangers out.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import EarwitnessError
from configs.ports import free_ports
from slurm import shell
from slurm.cluster import run

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sinfo": "slurm-client"}
"""Debian's package of each program."""
ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
FIRST_LINE = "# A cluster of tools.sandbox, to be thrown away."
CONTROLLER = "controller"
"""SLURMD_NODENAME of the daemons that belong to no node."""
CLIENTS = ("srun", "salloc", "sbatch")
"""Commands that wait for the cluster, and are ended with it."""
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.02
LONGEST_PATH = 80
"""Characters of the folder's path: a Unix socket's has 107 bytes at most, and slurmstepd's is
FOLDER/n1/n1_12.4294967291."""
MAIL_PROGRAM = """#!/bin/bash
# What Slurm would mail goes into a file: -s SUBJECT ADDRESS
echo "to $3: $2" >>{file}
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the ways to break it."""

    folder: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """All that Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command such as sbatch; returns what it prints. Raises EarwitnessError with its complaint if
        it fails."""
        return run(*command, environment=_outside_of_jobs() | self.environment)

    @property
    def mail(self) -> list[str]:
        """What Slurm has mailed, as `to ADDRESS: SUBJECT`."""
        file = self.folder / "mail"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node; what runs on the node lives on."""
        _kill_all(
            lambda: [pid for pid in _processes(self.folder, node) if _program_of(pid).startswith("slurmd")]
        )

    def kill_node(self, node: str) -> None:
        """Kill the daemon and all job processes of a node at once, as when a machine loses power."""
        _kill_all(lambda: _processes(self.folder, node))

    def start_slurmd(self, node: str) -> None:
        """Bring a node back; returns when Slurm takes it."""
        _start_daemon(self.folder, node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        _await(
            lambda: not re.search(r"\*|down|unk", self._states(node)),
            f"node {node} did not come back",
            self.folder / node / "slurmd.log",
        )

    def _states(self, *nodes: str) -> str:
        return self.run("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format", "%t")


def check_packages(*, accounting: bool = False) -> None:
    """Raises EarwitnessError, with the line to type, if Debian's packages are missing."""
    programs = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    missing = sorted({package for program, package in programs.items() if not _find(program)})
    if missing:
        raise EarwitnessError(
            "a Slurm cluster needs packages that are missing here: apt-get install -y"
            f" --no-install-recommends {' '.join(missing)}"
        )


def start(
    folder: Path,
    nodes: int = 4,
    *,
    gpus: int = 0,
    cpus: int = 16,
    grace_seconds: int = 0,
    kill_wait: int = 5,
    accounting: bool = False,
    extra: Sequence[str] = (),
) -> Cluster:
    """Start a cluster in `folder` (new or empty) and wait until all nodes are idle.

    Partitions: `low`, the default, whose jobs are requeued after `grace_seconds` when `high` wants their
    nodes. gpus, cpus: of each node; the machine need not have them. kill_wait: seconds from TERM to KILL.
    extra: lines of slurm.conf, in place of those of the same setting or beside them.
    """
    folder = folder.resolve()
    check_packages(accounting=accounting)
    _check_folder(folder)
    cluster = Cluster(folder, tuple(f"n{number}" for number in range(1, nodes + 1)))
    controller_port, accounting_port, *node_ports = free_ports(nodes + 2)
    name = f"sandbox{controller_port}"
    settings = _settings(folder, name, controller_port) | {"KillWait": kill_wait}
    if accounting:
        settings |= _accounting_settings(folder, accounting_port)
    node_names = f"n[1-{nodes}]"
    node_line = (
        f"NodeName={node_names} NodeHostname={_hostname()} NodeAddr=127.0.0.1"
        f" Port=[{node_ports[0]}-{node_ports[-1]}] CPUs={cpus} RealMemory=16000"
    )
    gres = ""
    if gpus:
        settings["GresTypes"] = "gpu"
        node_line += f" Gres=gpu:{gpus}"
        gres = f"NodeName={node_names} Name=gpu File={folder}/gpu[0-{gpus - 1}]\n"
    replaced = {line.partition("=")[0].strip().lower() for line in extra}
    lines = [
        FIRST_LINE,
        *(f"{key}={value}" for key, value in settings.items() if key.lower() not in replaced),
        *extra,
        node_line,
        "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE"
        f" GraceTime={grace_seconds}",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        folder.chmod(0o755)  # whatever the umask is: munged wants its socket within everybody's reach
        for number in range(gpus):  # Slurm wants a character device, and only looks at it
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(gres, encoding="utf-8")
        (folder / "mail.sh").write_text(MAIL_PROGRAM.format(file=folder / "mail"), encoding="utf-8")
        (folder / "mail.sh").chmod(0o755)
        _start_munge(folder)
        if accounting:
            _start_accounting(cluster, name, accounting_port)
        _start_daemon(folder, CONTROLLER, "slurmctld", "-f", cluster.environment["SLURM_CONF"])
        for node in cluster.nodes:
            (folder / node).mkdir(mode=0o755)
            _start_daemon(folder, node, "slurmd", "-f", cluster.environment["SLURM_CONF"], "-N", node)
        _await(
            lambda: set(cluster._states(*cluster.nodes).split()) == {"idle"},
            "not all nodes are idle",
            folder / "slurmctld.log",
        )
    except BaseException:
        stop(folder)
        raise
    return cluster


def stop(folder: Path) -> None:
    """Kill every process of the cluster in `folder`, those of jobs too, and remove the folder. The cluster
    may be half started, or gone."""
    folder = folder.resolve()
    conf = folder / "slurm.conf"
    existed = folder.exists()
    is_ours = conf.is_file() and conf.read_text(encoding="utf-8").startswith(FIRST_LINE)
    if existed and not is_ours:
        raise EarwitnessError(
            f"{folder}: no cluster of tools.sandbox is in it; nothing is stopped or removed"
        )
    _kill_all(lambda: _processes(folder))
    if existed:
        shutil.rmtree(folder)


@contextmanager
def serve(folder: Path, nodes: int = 4, **options: Any) -> Iterator[Cluster]:
    """A cluster as `start` makes it, stopped at the end, also after an error."""
    cluster = start(folder, nodes, **options)
    try:
        yield cluster
    finally:
        stop(folder)


def _check_folder(folder: Path) -> None:
    """Raises EarwitnessError if a cluster cannot be started in this folder."""
    if not re.fullmatch(r"[\w./+-]+", str(folder), re.ASCII) or len(str(folder)) > LONGEST_PATH:
        raise EarwitnessError(
            f"{folder}: Slurm takes a folder of letters, digits and _ . + - only, and of {LONGEST_PATH}"
            " characters at most: choose another one"
        )
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty:
        raise EarwitnessError(
            f"{folder} is there already: choose another folder, or, if it is a cluster, stop it: python -m"
            f" tools.sandbox stop {folder}"
        )


def _settings(folder: Path, name: str, port: int) -> dict[str, object]:
    """Settings of slurm.conf. name: of the cluster; port: of its controller."""
    return {
        "ClusterName": name,
        "SlurmctldHost": f"{_hostname()}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": _user(),
        "SlurmdUser": _user(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.sock",
        "StateSaveLocation": folder / "state",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdSpoolDir": folder / "%n",
        "SlurmdPidFile": folder / "%n/slurmd.pid",
        "SlurmdLogFile": folder / "%n/slurmd.log",
        "SlurmdParameters": "config_overrides",  # nodes have the CPUs that they say
        "SlurmdTimeout": 30,
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "MailProg": folder / "mail.sh",
        "ReturnToService": 2,  # a node that was down comes back by itself
    }


def _accounting_settings(folder: Path, port: int) -> dict[str, object]:
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": port,
        "AccountingStoragePass": folder / "munge.sock",
    }


def _start_munge(folder: Path) -> None:
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    files = {
        "socket": "munge.sock",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge.seed",
    }
    # --force: the folder may lie where a group can write
    _start_daemon(
        folder,
        CONTROLLER,
        "munged",
        "--force",
        "--origin=127.0.0.1",
        *(f"--{flag}={folder / name}" for flag, name in files.items()),
    )


def _start_accounting(cluster: Cluster, name: str, port: int) -> None:
    """Start a slurmdbd with a MariaDB of its own, which only its user can reach: its socket lies in its data
    folder, of mode 0700. name: of the cluster."""
    data = cluster.folder / "mariadb"
    data.mkdir(mode=0o700)
    database = ("--no-defaults", f"--datadir={data}", f"--user={_user()}")
    _start_daemon(
        cluster.folder,
        CONTROLLER,
        "mariadb-install-db",
        *database,
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    )
    running = (
        f"--socket={data}/socket",
        f"--pid-file={data}/pid",
        "--skip-networking",
        "--innodb-flush-log-at-trx-commit=0",
    )
    _start_daemon(cluster.folder, CONTROLLER, "mariadbd", *database, *running, background=True)
    _await(
        lambda: _listens(socket.AF_UNIX, f"{data}/socket"),
        "MariaDB did not come up",
        cluster.folder / "mariadbd.log",
    )
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={cluster.folder}/munge.sock",
        "DbdHost": _hostname(),
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": _user(),
        "LogFile": cluster.folder / "slurmdbd.log",
        "PidFile": cluster.folder / "slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
    }
    conf = cluster.folder / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
    _start_daemon(cluster.folder, CONTROLLER, "slurmdbd", variables={"MYSQL_UNIX_PORT": f"{data}/socket"})
    _await(
        lambda: _listens(socket.AF_INET, ("127.0.0.1", port)),
        "slurmdbd did not come up",
        cluster.folder / "slurmdbd.log",
    )
    cluster.run("sacctmgr", "--immediate", "add", "cluster", name)


def _start_daemon(
    folder: Path,
    node: str,
    program: str,
    *arguments: str,
    background: bool = False,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a program until it has put itself into the background; or, with `background`, put it there."""
    log_folder = folder if node == CONTROLLER else folder / node
    log = log_folder / f"{program}.log"
    environment = _outside_of_jobs()
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "SLURMD_NODENAME": node}
    environment |= variables or {}
    command = [str(_find(program)), *arguments]
    if background:
        command = ["setsid", "--fork", *command]
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            umask=0o022,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if done.returncode:
        raise EarwitnessError(f"{program} did not start:\n{_last_lines(log)}")


def _processes(folder: Path, node: str | None = None) -> list[int]:
    """The PIDs of one node, or of the whole cluster and of the commands that wait for it, oldest first; never
    this process."""
    pids = []
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            variables = _environment_of(pid)
        except OSError:  # it has ended, or is another user's
            continue
        if pid == os.getpid() or variables.get("SLURM_CONF") != f"{folder}/slurm.conf":
            continue
        process_node = variables.get("SLURMD_NODENAME", "")
        if node is None:
            is_wanted = process_node != "" or _program_of(pid) in CLIENTS
        else:
            is_wanted = process_node == node
        if is_wanted:
            pids.append(pid)
    return pids


def _environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with. Raises OSError."""
    variables = {}
    for line in os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0"):
        name, _, value = line.partition("=")
        variables[name] = value
    return variables


def _kill_all(list_pids: Callable[[], list[int]]) -> None:
    """Kill the listed processes until the list is empty."""
    deadline = time.monotonic() + STOP_SECONDS
    while pids := list_pids():
        if time.monotonic() > deadline:
            raise EarwitnessError(
                f"processes {', '.join(map(str, pids))} do not die: look at them with ps, and stop the"
                " cluster again"
            )
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _await(condition: Callable[[], bool], trouble: str, log: Path) -> None:
    """Wait until a condition holds. Raises EarwitnessError, with the end of a log, if that takes too long."""
    deadline = time.monotonic() + START_SECONDS
    complaint = ""
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except EarwitnessError as error:
            complaint = f" ({error})"
        time.sleep(POLL_SECONDS)
    raise EarwitnessError(f"{trouble} in {START_SECONDS:.0f} s{complaint}:\n{_last_lines(log)}")


def _listens(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def _outside_of_jobs() -> dict[str, str]:
    """The environment without the variables by which a job of another cluster, if this runs in one, would
    steer Slurm's commands."""
    return shell.without(os.environ, [*shell.OF_SLURM, "SLURMD_*"])


def _find(program: str) -> str | None:
    """The path of a program; daemons lie in folders that only root has in its PATH."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(program, path=path)


def _program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def _last_lines(log: Path) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])


def _hostname() -> str:
    return socket.gethostname().split(".")[0]


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
