"""What a model has said of clips, as an evaluation leaves it: a JSON object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import ConfigError
from configs.run.files import replacing

NAME = "step-{:08d}.jsonl"
"""Of the predictions of an evaluation, in the folder `evaluations` of a run."""


@dataclass(frozen=True)
class Sound:
    """Where the audio of a clip lies: bytes [start, end) of a shard. ending: of its file name, as `flac`;
    begins: seconds of it that lie before the clip."""

    url: str
    start: int
    end: int
    ending: str
    begins: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A clip, what people say of it, and what a model says.

    key: SOURCE/SHARD_FILE/KEY; seconds: of audio; references: captions of the clip, at least one; loss: mean
    over the tokens of its own caption; scores: of this clip alone, by the names of configs/metrics.py.
    """

    key: str
    source: str
    seconds: float
    references: list[str]
    caption: str
    loss: float
    sound: Sound
    scores: dict[str, float] = field(default_factory=dict)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a file of predictions. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False).encode() + b"\n")


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions in a file. Raises ConfigError if it is none of these."""
    predictions: list[Prediction] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # captions may hold other ends of lines
            for line in file:
                values = json.loads(line)
                predictions.append(Prediction(**{**values, "sound": Sound(**values["sound"])}))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path}:{len(predictions) + 1}: no prediction; files of predictions come from"
            " `python -m tools.evaluate ... --predictions FILE`, or from the folder evaluations of a run"
        ) from None
    return predictions


def steps_of(folder: Path) -> dict[int, Path]:
    """The files of predictions of a run, by step, in its order."""
    named = ((re.fullmatch(r"step-(\d+)\.jsonl", path.name), path) for path in sorted(folder.glob("*")))
    return {int(name[1]): path for name, path in named if name}
