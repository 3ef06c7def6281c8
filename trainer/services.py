"""Weights & Biases and Trackio: one run with one id, whatever attempt tells of it.

Keys, projects and addresses come from the environment (WANDB_*, TRACKIO_*) or from ~/.netrc.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.run.files import write_atomic
from configs.run.folder import RunDir
from configs.schema import RunConfig
from trainer.courier import Row, Service

PROJECT = "earwitness"
"""Without WANDB_PROJECT or TRACKIO_PROJECT."""
INIT_SECONDS = 30
"""After which a server that does not answer is taken for gone."""
ID_LOCK = threading.Lock()
"""Held while the id is read or made: each service has a thread of its own."""


def shown(config: RunConfig) -> dict[str, Any]:
    """The settings that others may see: none that hold secrets, or tell where things lie."""
    places: dict[str, Any] = {
        "run": {"dir"},
        "model": {"name_or_path", "init_from"},
        "data": {
            "index_dir": True,
            "cache_dir": True,
            "sources": {"__all__": {"shards", "storage_options", "validation"}},
        },
        "checkpoint": {"mirror"},
        "evaluate": {"parts"},
    }
    return config.model_dump(mode="json", exclude={**places, "slurm": True})


class Wandb:
    """Weights & Biases. Steps of its own (`_step`) number the rows, so that they never go back, and it can
    say how many it has; the x-axis of all curves is `step`.

    It cannot resume a run offline: a later folder takes the place of an earlier one when it is synced. So
    each folder that is written offline is told the whole run.
    """

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self._config, self._dir = config, run

    def begin(self, past: list[Row]) -> int:
        """Take up the run, offline if the server cannot be reached."""
        import wandb

        self._wandb: Any = wandb
        arguments: dict[str, Any] = {
            "id": identity(self._config, self._dir),
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": self._config.run.name,
            "config": shown(self._config),
            "dir": os.environ.get("WANDB_DIR", str(self._dir.path)),
            # It would take this process's output apart, which goes to the run's logs.
            "settings": wandb.Settings(console="off", quiet=True, init_timeout=INIT_SECONDS),
        }
        try:
            self._run = wandb.init(**arguments, resume="allow")
        except wandb.errors.Error as error:
            said = " ".join(str(error).split())
            print(
                f"wandb goes on offline: {said}. Later: `wandb sync` of the newest folder that it names",
                flush=True,
            )
            wandb.teardown()  # which holds the id
            self._run = wandb.init(**arguments, mode="offline")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return min(self._run.step, len(past))

    def send(self, number: int, row: Row) -> None:
        """Tell it a row; texts as a table."""
        values: dict[str, Any] = {**row.scalars, "step": row.step}
        if row.texts:
            values["texts"] = self._wandb.Table(
                columns=["what", "text"], data=[*map(list, row.texts.items())]
            )
        for name, (waveform, rate) in row.audio.items():
            values[f"{name}/audio"] = self._wandb.Audio(_pcm(waveform), sample_rate=rate)
        for name, picture in row.images.items():
            values[name] = self._wandb.Image(picture.permute(1, 2, 0).numpy())
        self._run.log(values, step=number, commit=True)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """Trackio: a database on this machine, or a Space or a server that it is told of."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self._config, self._dir = config, run

    def begin(self, past: list[Row]) -> int:
        """Take up the run, which its name tells from others."""
        import trackio

        self._trackio: Any = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=identity(self._config, self._dir),
            config=shown(self._config),
            resume="allow",
            embed=False,
        )
        next_step = self._run._next_step
        return next((number for number, row in enumerate(past) if row.step >= next_step), len(past))

    def send(self, number: int, row: Row) -> None:
        """Tell it a row."""
        values: dict[str, Any] = dict(row.scalars)
        values |= {name: self._trackio.Markdown(text) for name, text in row.texts.items()}
        for name, (waveform, rate) in row.audio.items():
            values[f"{name}/audio"] = self._trackio.Audio(_pcm(waveform), sample_rate=rate)
        for name, picture in row.images.items():
            values[name] = self._trackio.Image(picture.permute(1, 2, 0).numpy())
        self._run.log(values, step=row.step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


SERVICES: dict[str, Callable[[RunConfig, RunDir], Service]] = {"wandb": Wandb, "trackio": Trackio}


def identity(config: RunConfig, run: RunDir) -> str:
    """The run's id with all services, as NAME-1f2e3d4c, from its first attempt on."""
    path = run.trackers / "id"
    with ID_LOCK:
        if not path.exists():
            run.trackers.mkdir(exist_ok=True)
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", config.run.name)[:50]
            write_atomic(path, f"{name}-{secrets.token_hex(4)}")
        return path.read_text(encoding="utf-8")


def _pcm(waveform: torch.Tensor) -> npt.NDArray[np.int16]:
    """(1, n) float32 -> (n,) int16."""
    return (waveform[0] * 32767).clamp(-32768, 32767).to(torch.int16).numpy()
