"""`python -m launch`: train on this machine, show a config, look the machine over. No torch is imported here,
so that it answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from configs.errors import ConfigError, run_command
from configs.streams import open_streams
from launch.launchers import refuse_launchers

if TYPE_CHECKING:
    from configs.run.folder import RunDir

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Earwitness: trains Whisper to caption what it hears.",
)

Config = Annotated[Path, typer.Argument(help="YAML file, as configs/turbo.yaml", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, as optim.lr=1e-5", metavar="[KEY=VALUE]...")
]
Procs = Annotated[Optional[int], typer.Option(min=1, help="Processes; default 1 per GPU or 1")]  # noqa: UP045
Run = Annotated[Path, typer.Argument(help="Folder of a run, as runs/NAME", metavar="RUN", readable=False)]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    procs: Procs = None,
) -> None:
    """Train on this machine. The same command again resumes. Ctrl-C saves and leaves (exit code 85)."""
    open_streams(unheeded=True)
    from configs.load import load
    from configs.run.folder import RunDir
    from configs.trackers import check_trackers
    from data.dataset import index_missing, list_shards
    from launch.gpus import visible_gpus
    from launch.local import run_ranks

    settings = load(config, overrides or [])
    procs = procs or visible_gpus() or 1
    if procs > settings.batch.global_size:
        raise ConfigError(
            f"--procs {procs}: more processes than samples in a step (batch.global_size is"
            f" {settings.batch.global_size})"
        )
    check_trackers(settings.monitor.trackers)
    index_missing(settings, list_shards(settings))  # before any rank waits for it
    raise typer.Exit(run_ranks(RunDir.create(settings), settings, procs))


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the script that sbatch would get, and put the run's folder in order for it.",
        ),
    ] = False,
) -> None:
    """Train on Slurm: submit the first job of a chain that goes on until the run is finished."""
    from configs.load import load
    from launch.submit import submit_run

    submit_run(load(config, overrides or []), dry_run=dry_run)


@app.command()
def status(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run; default all below runs/.", metavar="[RUN]", readable=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    events: Annotated[
        bool, typer.Option(help="Print the ledger of a run, a JSON line for each event.")
    ] = False,
) -> None:
    """Attempts, why each ended, and where the time went."""
    from launch.status import print_events, status

    if events and run is None:
        raise ConfigError("--events: of which run? python -m launch status RUN --events")
    if events and run is not None:
        print_events(_rundir(run))
    else:
        status(_rundir(run) if run else None, as_json=as_json)


@app.command()
def stop(run: Run) -> None:
    """Save, then end the chain of a run's jobs."""
    from launch.control import stop

    stop(_rundir(run))


@app.command()
def drill(run: Run) -> None:
    """Send a running attempt the signal of a preemption, and report the seconds to save, to restart and to
    the first step."""
    from launch.control import drill

    drill(_rundir(run))


@app.command()
def profile(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="The rank that writes it.")] = 0,
    minutes: Annotated[float, typer.Option(help="Give up after so long.")] = 10,
) -> None:
    """Let a run at work write a trace of its next three steps, and show what took longest."""
    from launch.profile import profile

    profile(_rundir(run), rank, minutes)


@app.command()
def selftest(
    config: Config,
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="Give up after so long; time in the queue counts.")] = 60,
) -> None:
    """On a new cluster: 20 real steps of a config, a kill, going on with fewer processes, an export; one
    table."""
    from configs.load import load
    from launch.selftest import selftest

    raise typer.Exit(selftest(load(config, overrides or []), minutes))


@app.command()
def config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved settings."""
    from configs.load import dump, load

    resolved = load(config, overrides or [])
    print(dump(resolved), end="")
    if resolved.data.temperature != 1:
        from launch.samples import passes_of

        print(f"# {passes_of(resolved)}")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also check what this config needs.", metavar="[CONFIG]")
    ] = None,
) -> None:
    """Look over driver, CUDA, torch, DeepSpeed, FFmpeg, S3 and Slurm, and say what to mend."""
    from launch.doctor import examine

    raise typer.Exit(examine(config))


def _rundir(path: Path) -> RunDir:
    """The folder of a run that exists. Raises OSError, which says whose it is, where it is closed."""
    from configs.run.folder import RunDir

    if path.is_dir():
        next(path.iterdir(), None)
    run = RunDir(path)
    if not run.exists:
        raise ConfigError(f"{path}: not the folder of a run (as runs/NAME)")
    return run


def main() -> None:
    """Before options are read, as some launchers add one in front of the command."""
    commands = [word for word in sys.argv[1:] if not word.startswith("-")]
    if commands[:1] == ["train"]:
        refuse_launchers(os.environ)
    app()


if __name__ == "__main__":
    run_command(main)
