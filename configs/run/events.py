"""Everything that the ledger of a run can tell: one class per event, with units.

In a file of the ledger an event is a JSON object: `event`, its name, and its fields.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from configs.run.causes import Cause

KINDS: dict[str, type[Event]] = {}
"""Classes of events by name."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. attempt: the start of the run that it belongs to; time: when, in seconds since
    the epoch, by the clock of the machine that tells of it."""

    attempt: int
    time: float = field(default_factory=lambda: round(time.time(), 3))
    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str) -> None:
        cls.name = name
        KINDS[name] = cls

    def as_json(self) -> dict[str, Any]:
        """The line of the ledger."""
        return {"time": self.time, "event": self.name, **dataclasses.asdict(self)}


def parse(line: dict[str, Any]) -> Event:
    """The event that a line of the ledger tells of. Raises ValueError for a line that is none."""
    kind = KINDS.get(str(line.get("event")))
    if kind is None:
        raise ValueError(f"no event: {line.get('event')}")
    try:
        return _adapter(kind.name).validate_python(line)
    except ValidationError as error:
        raise ValueError(f"{kind.name}: {error.errors()[0]['msg']}") from None


@functools.cache
def _adapter(name: str) -> TypeAdapter[Event]:
    return TypeAdapter(KINDS[name])


@dataclass(frozen=True, kw_only=True)
class Submitted(Event, name="submitted"):
    """`launch submit` has handed the first job of a chain to Slurm, which `attempt` will run in."""

    job: str
    nodes: str
    """As 4 or 2-8."""
    tasks_per_node: int
    index_log: str = ""
    """What the job that indexes the shards first writes; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class AttemptBegan(Event, name="attempt"):
    """An attempt has taken the run; its ranks are about to start."""

    ranks: int
    nodes: list[str]
    """One for each machine; each has as many ranks."""
    job: str = ""
    """Slurm's; empty for `launch train`."""
    chain: str = ""
    """The first job of its chain; empty for `launch train`."""


@dataclass(frozen=True, kw_only=True)
class CouldNotBegin(Event, name="could_not_begin"):
    """A job that ended before it was an attempt, because its node could not even run Python.
    attempt: the next one that began."""

    job: str
    node: str


@dataclass(frozen=True, kw_only=True)
class Preflight(Event, name="preflight"):
    """All nodes were looked over, and are fit."""

    seconds: float
    all_reduce_gb_per_second: float
    tflops: list[float] = field(default_factory=list)
    """Of a matrix product, by rank; empty without GPUs."""
    notes: list[str] = field(default_factory=list)
    """What nobody is unfit for, but somebody should look at."""


@dataclass(frozen=True, kw_only=True)
class TrainingBegan(Event, name="start"):
    """The model is loaded; training begins or goes on."""

    step: int
    """Optimizer steps taken before."""
    total_steps: int
    global_size: int
    """Samples of a step."""
    ranks: int
    device: str


@dataclass(frozen=True, kw_only=True)
class FirstStep(Event, name="first_step"):
    """The first step of this attempt is taken."""

    step: int
    """Optimizer steps taken, this one included."""
    seconds: dict[str, float]
    """From the beginning of rank 0's process until then, by part, one after the other (docs/status.md)."""


@dataclass(frozen=True, kw_only=True)
class MicroSeconds(Event, name="micro_seconds"):
    """How much audio a forward pass of this attempt takes at most, by `batch.micro_seconds: auto`."""

    device: str
    """`cpu`, or the name of the GPUs."""
    setup: str
    """What else decides on what fits, as "2 ranks, zero2, bf16"."""
    seconds: float
    least: float
    """Seconds of one window; less is never asked for."""
    why: str


@dataclass(frozen=True, kw_only=True)
class InitFrom(Event, name="init_from"):
    """The weights that this run begins with."""

    source: str
    """`model.init_from`, as it was written."""
    checkpoint: str
    """The checkpoint that it meant then."""


@dataclass(frozen=True, kw_only=True)
class LeftOut(Event, name="left_out"):
    """What is known at the start of samples that are unusable or too long."""

    what: str


@dataclass(frozen=True)
class SourceSamples:
    """The samples of a source, by what the index knows of them."""

    source: str
    samples: int
    """All that its shards hold: the sum of those that follow."""
    training: int
    validation: int
    unusable: int
    """Left out, as something is wrong with them."""
    too_long: int
    """Left out for their length; a quick index does not know it."""
    passes: float | None = None
    """Over those for training, per epoch; None in what earlier versions have told."""


@dataclass(frozen=True, kw_only=True)
class Samples(Event, name="samples"):
    """The index is merged: what this attempt has to train on."""

    sources: list[SourceSamples]


@dataclass(frozen=True, kw_only=True)
class Changed(Event, name="changed"):
    """Settings or data that were changed on purpose (`run.allow_change`)."""

    step: int
    what: list[str]
    epoch_base: tuple[int, int]
    """Step at which the order of the samples begins now, and its first epoch."""


@dataclass(frozen=True, kw_only=True)
class CaptionCut(Event, name="cut_caption"):
    """The first caption of a source in this attempt that was cut off because it is too long."""

    rank: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Progress(Event, name="progress"):
    """Where the time of the attempt went until this step."""

    step: int
    samples_per_second: float | None
    """Of all steps but the first, evaluations left out; None before the second."""
    seconds: dict[str, float]
    """By phase (configs/run/goodput.py)."""


@dataclass(frozen=True, kw_only=True)
class Skipped(Event, name="skip"):
    """A step whose gradient was not finite: the weights stayed as they were."""

    step: int
    keys: list[str]
    """Of its samples, in the order of lanes."""


@dataclass(frozen=True, kw_only=True)
class Spike(Event, name="spike"):
    """A step whose loss stands out from those before."""

    step: int
    loss: float
    """Per caption token."""
    keys: list[str]
    """Of its samples, in the order of lanes."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event, name="evaluation"):
    """Validation, and captions of the panel."""

    step: int
    metrics: dict[str, float]
    captions: list[dict[str, str]]
    """`key`, `reference` and `caption` of each clip of the panel."""
    captioned: int = 0
    """Clips that were captioned."""
    captioning_seconds: float = 0.0
    """That it took."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event, name="checkpoint"):
    """A checkpoint is complete."""

    step: int
    reason: str
    """interval, best, stop or finished."""
    folder: str
    """Its name in `checkpoints/`."""
    blocking_seconds: float
    """For which training stopped."""
    total_seconds: float
    """From the beginning until it was durable."""
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    """Of this step, if it was evaluated before."""


@dataclass(frozen=True, kw_only=True)
class SlowSave(Event, name="slow_save"):
    """A save that took more than half of the time that a signal leaves."""

    step: int
    seconds: float
    grace_seconds: float
    """`slurm.signal_seconds`."""
    advice: str


@dataclass(frozen=True, kw_only=True)
class Damaged(Event, name="damaged"):
    """A checkpoint that is damaged was set aside."""

    folder: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Restored(Event, name="restored"):
    """A checkpoint was brought back from the mirror."""

    folder: str
    mirror: str


@dataclass(frozen=True, kw_only=True)
class Mirrored(Event, name="mirrored"):
    """A checkpoint was copied to the mirror."""

    folder: str
    mirror: str
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class MirrorFailed(Event, name="mirror_failed"):
    """A checkpoint could not be copied to the mirror; training goes on."""

    folder: str
    mirror: str
    message: str


@dataclass(frozen=True, kw_only=True)
class TrainingEnded(Event, name="stop"):
    """All ranks leave, and what they have is durable."""

    step: int
    outcome: str
    """finished or saved."""
    signal: str = ""
    """What asked for it, as SIGTERM; empty if nothing did."""


@dataclass(frozen=True, kw_only=True)
class RankFailed(Event, name="error"):
    """A rank has failed, and says why."""

    rank: int
    node: str
    """The one at fault, by what the rank knows: as a rule its own."""
    cause: Cause
    exit_code: int
    message: str
    """All that it has to say: a paragraph, or a traceback."""

    @property
    def words(self) -> str:
        """The first line of a paragraph, or the last one of a traceback."""
        lines = self.message.strip().splitlines() or [""]
        return lines[-1] if lines[0].startswith("Traceback") else lines[0]


@dataclass(frozen=True, kw_only=True)
class Hung(Event, name="hang"):
    """The watchdog found the ranks stuck."""

    words: str
    node: str
    """The one that seems to be at fault; empty if none does."""
    suspects: list[int]
    """Ranks."""


@dataclass(frozen=True, kw_only=True)
class DeathInHand(Event, name="death_in_hand"):
    """A sample that its decoder has not survived."""

    rank: int
    key: str
    shard: str
    how: str
    """As in "Segmentation fault"."""

    def __str__(self) -> str:
        return f"{self.how} while sample {self.key} of {self.shard} was decoded"


@dataclass(frozen=True, kw_only=True)
class Ended(Event, name="ended"):
    """How an attempt ended, by all that there was to read (configs/run/ends.py)."""

    cause: Cause
    words: str
    at: float
    """When it ended, or was last heard of, in seconds since the epoch."""
    node: str = ""
    """The one at fault, if one is."""
    saved: int = 0
    """Step of the newest checkpoint then."""


@dataclass(frozen=True, kw_only=True)
class ChainEnded(Event, name="chain_ended"):
    """No further attempt follows. attempt: the last one that there was, -1 if there was none."""

    chain: str
    why: str
