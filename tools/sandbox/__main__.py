"""`python -m tools.sandbox slurm|s3|stop`: a Slurm cluster or an S3 server on this machine alone, to try
Earwitness and to break it."""

from __future__ import annotations

import signal
import tempfile
from contextlib import suppress
from getpass import getuser
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import run_command

FOLDER = Path(tempfile.gettempdir()) / f"earwitness-slurm-{getuser()}"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Real services for this machine alone.",
)


@app.command("slurm")
def slurm_cluster(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes, all of them on this machine.")] = 4,
    gpus: Annotated[int, typer.Option(min=0, help="Made-up GPUs of each node, that jobs can ask for.")] = 0,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds between a preempted job's warning and its end.")
    ] = 0,
    accounting: Annotated[
        bool, typer.Option("--accounting", help="With slurmdbd, so that sacct works.")
    ] = False,
    dir: Annotated[Path, typer.Option(help="Its folder.", metavar="DIR")] = FOLDER,
) -> None:
    """Start a Slurm cluster in the background, and say how to use it."""
    from tools.sandbox import slurm

    cluster = slurm.start(dir, nodes, gpus=gpus, grace_seconds=grace, accounting=accounting)
    taken = min(2, nodes)
    print(f"""{nodes} nodes are idle. Use them:
  export {_as_exports(cluster.environment)}
  sinfo
  python -m tools.demo --data-only               (what configs/demo.yaml needs, if it is not there yet)
  python -m launch submit configs/demo.yaml run.name=on-slurm
Take {taken} of them away: partition high preempts jobs of low, the default:
  sbatch -p high -N{taken} --exclusive --wrap 'sleep 5'
Stop the cluster and all of its jobs, and remove its folder:
  python -m tools.sandbox stop {cluster.folder}""")


@app.command()
def stop(
    dir: Annotated[Path, typer.Argument(help="The cluster's folder.", metavar="[DIR]")] = FOLDER,
) -> None:
    """Stop a Slurm cluster, with all of its jobs, and remove its folder."""
    from tools.sandbox import slurm

    existed = dir.exists()
    slurm.stop(dir)
    print(f"{dir}: stopped and removed" if existed else f"{dir}: there is no cluster")


@app.command("s3")
def s3_server(
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--faults", help="As reset,after=1000000,times=6; several may be given.", metavar="FAULT"
        ),
    ] = None,
) -> None:
    """Run an S3 server until Ctrl-C, with a proxy before it that breaks answers as told; then what was stored
    is removed."""
    from tools.sandbox import faults, s3

    wanted = [faults.Fault.parse(text) for text in fault or []]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), s3.serve() as server, faults.serve(server.endpoint, wanted) as proxy:
        print(
            f"An S3 server runs until Ctrl-C. In another shell:\n  export {_as_exports(server.environment)}",
            flush=True,
        )
        if wanted:
            print(f"The same with faults:\n  export AWS_ENDPOINT_URL={proxy.endpoint}", flush=True)
        signal.pause()


def _as_exports(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


if __name__ == "__main__":
    run_command(app)
