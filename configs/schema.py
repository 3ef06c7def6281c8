"""Every setting, with its unit and its default. Frozen; unknown keys are refused (configs/load.py names the
nearest valid one)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from configs import sbatch, srun
from configs.deepspeed import DECIDED, DECIDED_IN_ZERO
from configs.metrics import is_higher_better

T = TypeVar("T")

SECRET_OPTIONS = {
    "key",
    "secret",
    "token",
    "password",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "authorization",
    "cookie",
    "ssecustomerkey",
    "account_key",
    "sas_token",
    "connection_string",
    "client_secret",
}
"""Options of fsspec, at any depth and in lower case, that hold secrets."""
SECRET_URL = re.compile(
    r"://[^/?\"]*:[^/?\"@]*@|[?&](x-amz-signature|x-goog-signature|signature|sig|token|access_token)=",
    re.IGNORECASE,
)
"""Of URLs, in JSON: user and password, or a signature."""


def as_meant(place: T) -> T | str:
    """The path of a place on this machine: without `file://`, and `~` is the home folder, unless something
    here is called so. Other places stay as they are."""
    path = re.sub("^(file|local)://", "", str(place))
    if not isinstance(place, str | Path) or "://" in path:
        return place
    with contextlib.suppress(RuntimeError):  # ~NAME of nobody
        return path if os.path.lexists(path) else str(Path(path).expanduser())
    return path


AS_MEANT = BeforeValidator(as_meant)


def public(value: T) -> T:
    """The same value. Raises ValueError if it holds a URL with a password or a signature."""
    if SECRET_URL.search(json.dumps(value)):
        raise ValueError(
            "URLs with passwords or signatures are not taken: they would be kept and shown, and signatures"
            " expire in the middle of a run; give s3://BUCKET/... with keys in the environment or a profile"
        )
    return value


def _keys(value: object) -> Iterator[str]:
    """All keys of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)


class Change(Enum):
    """Whether a run that has begun may go on with another value of a setting. Every field has one."""

    FREE = "at any time"
    """The run stays the same run."""
    ON_PURPOSE = "if `run.allow_change` names it"
    NEW_EPOCH = "if `run.allow_change` names it; a new epoch begins"
    """The order of the samples depends on it."""
    SEEN_IN_INDEX = "if `run.allow_change` names `index`; a new epoch begins"
    """What samples there are depends on it: the digest of the index tells, not the setting."""
    NEVER = "never; a new run may begin with the weights (`model.init_from`)"
    """The weights come from the run's base and checkpoint, whatever it says."""


FREE, ON_PURPOSE, NEW_EPOCH = Change.FREE, Change.ON_PURPOSE, Change.NEW_EPOCH
SEEN_IN_INDEX, NEVER = Change.SEEN_IN_INDEX, Change.NEVER

Urls = Annotated[list[str], AfterValidator(public)]


class Section(BaseModel):
    """Base of all sections. Numbers are finite, but for a few bounds: an infinite one is never reached."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    refused: ClassVar[dict[str, str]] = {}
    """Keys that are well known, but not taken, and why."""


class Run(Section):
    """What the run is called and where its folder is."""

    name: Annotated[str, FREE] = Field(min_length=1)
    """Name of the run."""
    dir: Annotated[Path, AS_MEANT, FREE] = Path("runs/NAME")
    """Folder of the run; NAME is `run.name`. Starting again with the same folder resumes."""
    seed: Annotated[int, NEW_EPOCH] = Field(0, ge=0)
    """Seed of the sample order and of weights that start at random."""
    allow_change: Annotated[list[str], FREE] = []
    """Settings in which this run may differ from its checkpoint, e.g. `[optim.lr]`; the refusal names them.
    New data or a new order begin with a new epoch."""

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("dir") is None and values.get("name"):
            return {**values, "dir": Path("runs") / str(values["name"])}
        return values


class Model(Section):
    """The Whisper to start from."""

    name_or_path: Annotated[str, AS_MEANT, NEVER]
    """A name on the model hub, a folder as `save_pretrained` writes it, or a folder with config.json and
    tokenizer, but no weights in any form (random start). See models.md."""
    init_from: Annotated[str | None, AS_MEANT, NEVER] = None
    """A run, a checkpoint or an export whose weights a new phase starts from, with a fresh optimizer and
    schedule; of the model of `name_or_path`."""
    freeze: Annotated[list[str], NEVER] = []
    """Prefixes of parameter names that are not trained, e.g. `model.encoder.conv`. The encoder's fixed
    positions never are."""
    gradient_checkpointing: Annotated[bool, FREE] = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    compile: Annotated[bool, FREE] = False
    """torch.compile the encoder (needs a C++ compiler where the job runs; the first step takes about a minute
    longer)."""


class Validation(Section):
    """Where a source's validation samples come from: a share of its keys, or shards of their own."""

    fraction: Annotated[float, SEEN_IN_INDEX] = Field(0.0, ge=0, lt=1)
    """Share of the samples, chosen by SHA-256 of the key alone, so that overlapping data sets split alike."""
    group: Annotated[str | None, SEEN_IN_INDEX] = None
    """Regular expression; its first group (or whole match) in the key is hashed instead, to keep segments of
    one recording together."""
    shards: Annotated[Urls, SEEN_IN_INDEX] = []
    """Shards that hold validation samples only."""

    @field_validator("group")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class Source(Section):
    """One data set: tar shards with an audio member and a caption per sample."""

    name: Annotated[str, NEW_EPOCH] = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in logs, curves and audit."""
    shards: Annotated[Urls, SEEN_IN_INDEX] = Field(min_length=1)
    """Paths or URLs, with {000..123} braces or globs: local, `s3://`, `https://`, `hf://`, whatever fsspec
    opens."""
    caption_key: Annotated[str | list[str], ON_PURPOSE] = "caption"
    """Dotted path into the sample's JSON, as `captions.0.text` (`captions.text`: of each), or the ending of a
    text member, as `.txt`. Of several, in order of preference, the first one that a sample has."""
    captions: Annotated[Literal["first", "all", "random"], ON_PURPOSE] = "first"
    """Of a clip with several captions: the first; all, each as a sample of its own; or one at random, another
    one in each epoch."""
    audio: Annotated[str | None, SEEN_IN_INDEX] = None
    """Ending of the audio member to use (`flac`, `16k.flac`) where samples have several."""
    weight: Annotated[float, NEW_EPOCH] = Field(1.0, gt=0)
    """Passes over this source per epoch: 0.5 is each sample every second epoch, 2 is twice."""
    style: Annotated[str | None, ON_PURPOSE] = None
    """Prompt text that says which style of caption is wanted; it stands before the start token and is not
    learnt."""
    loss_weight: Annotated[float, ON_PURPOSE] = Field(1.0, gt=0)
    """How much a token of its captions counts in what is learnt, beside one of a source with 1. Curves and
    validation losses do not weigh."""
    validation: Annotated[Validation, SEEN_IN_INDEX] = Validation()
    """Share held out for validation (`0.01`), or `{fraction, group}`, or `{shards: [...]}`."""
    licence: Annotated[str | None, FREE] = None
    """Of its audio and captions, as `CC-BY-4.0`, for the model card of an export."""
    storage_options: Annotated[dict[str, Any], FREE] = {}
    """Options for fsspec: `endpoint_url`, `profile`, `client_kwargs: {region_name: ...}`. Never keys or
    secrets: those come from the environment or a profile."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("caption_key")
    @classmethod
    def _are_of_one_member(cls, value: str | list[str]) -> str | list[str]:
        keys = [value] if isinstance(value, str) else value
        if not keys or not all(key.strip(".") for key in keys):
            raise ValueError("name a key of the JSON, or the ending of a text member, as .txt")
        if len({key.startswith(".") for key in keys}) > 1:
            raise ValueError("name keys of the JSON, or endings of text members, not both")
        return keys[0] if len(keys) == 1 else keys

    @property
    def caption_keys(self) -> list[str]:
        """Where the caption may be, in order of preference."""
        return [self.caption_key] if isinstance(self.caption_key, str) else self.caption_key

    @field_validator("validation", mode="before")
    @classmethod
    def _number_is_a_fraction(cls, value: Any) -> Any:
        return {"fraction": value} if isinstance(value, int | float) else value

    @field_validator("storage_options")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = sorted(key for key in _keys(value) if key.lower() in SECRET_OPTIONS)
        if found:
            raise ValueError(
                f"{', '.join(found)}: secrets do not belong in a config; set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, or `profile`; for http use ~/.netrc, with `client_kwargs:"
                " {trust_env: true}`"
            )
        return public(value)

    @field_validator("storage_options")
    @classmethod
    def _are_of_the_right_kind(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, given in value.items():
            if key.endswith("_kwargs") and not isinstance(given, dict | None):
                raise ValueError(f"{key}: settings by name are wanted here, as {{KEY: VALUE}}")
            if isinstance(given, str) and given.lower() in ("true", "false"):
                raise ValueError(f"{key}: write true or false, without quotation marks")
        return value


def ordered(value: tuple[float, float] | None) -> tuple[float, float] | None:
    """The same range. Raises ValueError if it ends before it begins."""
    if value and value[0] > value[1]:
        raise ValueError(f"a range is written [low, high]; {value[0]:g} is more than {value[1]:g}")
    return value


Decibels = Annotated[float, Field(ge=-20, le=100)]
Speed = Annotated[float, Field(ge=0.5, le=2)]


class SpecAugment(Section):
    """Stretches of time, and bands of mel, that are hidden: they take the clip's mean. Off with no masks."""

    time_masks: Annotated[int, ON_PURPOSE] = Field(0, ge=0, le=20)
    """Stretches of each clip that are hidden."""
    time_share: Annotated[float, ON_PURPOSE] = Field(0.1, gt=0, le=1)
    """Longest of them, as a share of the clip (its padding does not count)."""
    band_masks: Annotated[int, ON_PURPOSE] = Field(0, ge=0, le=20)
    """Bands of each clip that are hidden."""
    band_share: Annotated[float, ON_PURPOSE] = Field(0.15, gt=0, le=1)
    """Widest of them, as a share of the mel bands."""


class Augment(Section):
    """Clips changed by chance, in training only; by seed, epoch and sample alone. All is off by default."""

    gain_db: Annotated[float, ON_PURPOSE] = Field(0.0, ge=0, le=60)
    """Each clip is made louder or quieter by up to so many dB; what exceeds full scale is clipped."""
    noise_snr_db: Annotated[tuple[Decibels, Decibels] | None, AfterValidator(ordered), ON_PURPOSE] = None
    """White noise, below the clip by so many dB: a range, as `[10, 40]`, from -20 to 100."""
    noise_share: Annotated[float, ON_PURPOSE] = Field(0.5, gt=0, le=1)
    """Share of the samples that get noise, where `noise_snr_db` says how much."""
    speed: Annotated[tuple[Speed, Speed] | None, AfterValidator(ordered), ON_PURPOSE] = None
    """Speed of playback, and so pitch: a range, as `[0.9, 1.1]`, from 0.5 to 2. No clip is played so slowly
    that it would exceed `max_seconds`."""
    mix: Annotated[float, ON_PURPOSE] = Field(0.0, ge=0, le=1)
    """Share of the samples that another clip of the same source is mixed into; captions are joined: `A ...
    and b ...`. For sounds that may well occur together."""
    spec_augment: Annotated[SpecAugment, ON_PURPOSE] = SpecAugment()

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        masks = self.spec_augment.time_masks or self.spec_augment.band_masks
        return bool(self.gain_db or self.noise_snr_db or self.speed or self.mix or masks)


class Data(Section):
    """From shards to batches."""

    sources: Annotated[list[Source], NEW_EPOCH] = Field(min_length=1)
    """The data sets; each epoch passes over all of them."""
    temperature: Annotated[float, NEW_EPOCH] = Field(1.0, gt=0, allow_inf_nan=True)
    """Evens sources out, beside their weights: a source's share of an epoch is proportional to (samples x
    weight)^(1/temperature), and the epoch keeps its size. 1 changes nothing, `.inf` gives equal shares."""
    style_drop: Annotated[float, ON_PURPOSE] = Field(0.0, ge=0, le=1)
    """Share of samples, others in each epoch, that are trained without their source's `style`, so that the
    model works without one, too. Validation keeps it."""
    augment: Annotated[Augment, ON_PURPOSE] = Augment()
    index_dir: Annotated[str, AS_MEANT, AfterValidator(public), FREE] = "index"
    """Where the shards' indexes are kept, which runs may share: a folder, `s3://BUCKET/PREFIX`, or `beside`:
    the shards, in a folder `index`."""
    cache_dir: Annotated[Path | None, AS_MEANT, FREE] = None
    """A folder on each node's own disk that keeps what was read from a bucket; the ranks of the node share
    it, and so may runs."""
    cache_gb: Annotated[float, FREE] = Field(100, gt=0)
    """What it may hold, in gigabytes; what was not used for longest is removed."""
    window: Annotated[Literal["own", "full"], ON_PURPOSE] = "own"
    """`own`: each clip is encoded at its own length, without padding. `full`: each is padded to the model's
    window (30 s for Whisper), as Whisper was trained."""
    full_share: Annotated[float, ON_PURPOSE] = Field(0.2, ge=0, le=1)
    """With `window: own`, the share of samples that are padded to the whole window all the same, chosen anew
    in each epoch: programs that use the export pad always."""
    max_seconds: Annotated[float | None, ON_PURPOSE] = Field(None, gt=0)
    """Longest clip, in seconds; default the model's window (30 for Whisper)."""
    overlong: Annotated[Literal["skip", "start", "crop"], ON_PURPOSE] = "skip"
    """What to do with longer clips: leave them out, or take of each the first `max_seconds` (`start`, as
    Whisper's own feature extractor does), or a random stretch of that length (`crop`)."""
    long_caption: Annotated[Literal["truncate", "skip"], ON_PURPOSE] = "truncate"
    """What to do with captions that exceed the decoder's positions (448 for Whisper, prompt included)."""
    shuffle_window: Annotated[int, NEW_EPOCH] = Field(256, ge=1)
    """Samples of one lane that are shuffled together; larger mixes better and buffers more."""
    read_ahead_mb: Annotated[int, FREE] = Field(512, ge=1)
    """Megabytes of undecoded samples that each rank may hold."""
    max_bad_fraction: Annotated[float, FREE] = Field(0.01, ge=0, le=1)
    """Share of samples with unreadable content above which the run stops (of 1,000 at least; of fewer, half
    of them are too many)."""
    threads: Annotated[int | None, FREE] = Field(None, ge=1)
    """Decoding threads per rank; default one for each of its cores but one, at least 1 and at most 8."""
    audit: Annotated[bool, FREE] = False
    """Write the keys of every step and rank to audit/*.jsonl in the run's folder."""

    @model_validator(mode="after")
    def _distinct_sources(self) -> Data:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ: {', '.join(twice)}")
        return self


class Batch(Section):
    """How many samples a step takes."""

    global_size: Annotated[int, NEW_EPOCH] = Field(64, ge=1)
    """Samples per optimizer step, over all ranks. It stays the same on any number of ranks."""
    micro_seconds: Annotated[Literal["auto"] | float, FREE] = "auto"
    """Seconds of audio per forward pass of one rank, at least one clip; lower it when memory runs out. It
    changes nothing but rounding. `auto`: as much as the GPU's memory takes, found at the first start on each
    kind of GPU; 120 on a CPU."""

    @field_validator("micro_seconds", mode="before")
    @classmethod
    def _is_auto_or_a_length(cls, value: Any) -> Any:
        try:
            is_right = value == "auto" or 0 < float(value) < float("inf")
        except (TypeError, ValueError):
            is_right = False
        if not is_right:
            raise ValueError("write auto, or seconds of audio (more than 0)")
        return value

    @model_validator(mode="before")
    @classmethod
    def _seconds_instead_of_samples(cls, values: Any) -> Any:
        if isinstance(values, dict) and "micro_size" in values:
            raise ValueError(
                "micro_size (samples per forward pass) is gone, as clips are packed at their own lengths now:"
                " leave it out, or write micro_seconds, seconds of audio (8 clips of 30 s are 240)"
            )
        return values


class Optim(Section):
    """AdamW and its schedule."""

    lr: Annotated[float, ON_PURPOSE] = Field(5e-5, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], ON_PURPOSE] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: Annotated[float, ON_PURPOSE] = Field(1e-8, gt=0)
    """AdamW's epsilon. A large one (1e-4) leaves weights of small gradient nearly where they are, so that a
    small set of clips overwrites less of what the model knew."""
    weight_decay: Annotated[float, ON_PURPOSE] = Field(0.0, ge=0)
    """Decoupled weight decay; biases and norms have none."""
    clip_grad_norm: Annotated[float, ON_PURPOSE] = Field(1.0, gt=0, allow_inf_nan=True)
    """Largest norm of the whole gradient."""
    schedule: Annotated[Literal["linear", "cosine", "constant"], ON_PURPOSE] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_fraction: Annotated[float, ON_PURPOSE] = Field(0.05, ge=0, le=1)
    """Share of all steps over which the learning rate rises from 0."""
    epochs: Annotated[float | None, FREE] = Field(None, gt=0)
    """Passes over the data (give this or max_steps)."""
    max_steps: Annotated[int | None, FREE] = Field(None, ge=1)
    """Optimizer steps (give this or epochs)."""
    max_skips: Annotated[int, FREE] = Field(10, ge=0)
    """Updates in a row that may be skipped for a gradient that is not finite, before the run stops."""

    @model_validator(mode="after")
    def _one_length(self) -> Optim:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either epochs or max_steps")
        return self


class ZeroOptimization(Section):
    """What may be changed of DeepSpeed's config: how gradients and weights are sent. The sums stay the same;
    all else is Earwitness's to decide, and refused by name."""

    overlap_comm: Annotated[bool, FREE] = False
    """Reduce gradients while the backward pass goes on; of no use where a step has one reduction, as here
    since torch 2.10."""
    reduce_bucket_size: Annotated[int, FREE] = Field(200_000_000, ge=1_000_000, le=4_000_000_000)
    """Elements (not bytes) that are reduced at a time; fewer save memory, more save messages on slow
    networks."""
    allgather_bucket_size: Annotated[int, FREE] = Field(
        200_000_000, ge=1_000_000, le=4_000_000_000, multiple_of=2
    )
    """Elements of updated weights that are gathered at a time, for the same reasons."""
    contiguous_gradients: Annotated[bool, FREE] = True
    """Copy gradients into one buffer of `reduce_bucket_size` elements, so that memory is not fragmented;
    `false` saves the buffer."""
    reduce_scatter: Annotated[bool, FREE] = True
    """Send each process its own share of the sum only; `false` sends all of it to all, for networks that are
    tuned for all-reduce."""
    use_multi_rank_bucket_allreduce: Annotated[bool, FREE] = True
    """One message for the shares of all processes, which suits many of them; `false`: one for each share."""

    refused = DECIDED_IN_ZERO

    @field_validator("*", mode="before")
    @classmethod
    def _says_what_is_meant(cls, value: Any, field: ValidationInfo) -> Any:
        if value == "auto":
            raise ValueError("`auto` is for other trainers to fill in; leave the key out for the default")
        name = field.field_name or ""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith("_size") and not is_number:
            raise ValueError("write a number of elements without quotation marks, as 200000000 or 2e8")
        if not name.endswith("_size") and not isinstance(value, bool):
            raise ValueError("write true or false, without quotation marks")
        return value


class Zero2(Section):
    """DeepSpeed's config, under its own names."""

    zero_optimization: Annotated[ZeroOptimization, FREE] = ZeroOptimization()

    refused = (
        DECIDED_IN_ZERO
        | dict.fromkeys(ZeroOptimization.model_fields, "it stands in zero_optimization")
        | DECIDED
    )


class EngineSettings(Section):
    """How training is spread over the ranks."""

    backend: Annotated[Literal["zero2", "fsdp2"], FREE] = "zero2"
    """DeepSpeed ZeRO-2 or PyTorch's FSDP2: both divide optimizer state and gradients among the ranks; a run
    may go on with the other one."""
    dtype: Annotated[Literal["bf16", "fp32"], ON_PURPOSE] = "bf16"
    """Of the weights that compute. Master weights, gradients and optimizer state are fp32 in any case."""
    zero2: Annotated[Zero2, FREE] = Zero2()


class Checkpoint(Section):
    """When the state is saved, and what is kept."""

    every_steps: Annotated[int, FREE] = Field(500, ge=1)
    """Optimizer steps between saves."""
    every_minutes: Annotated[float | None, FREE] = Field(None, gt=0, allow_inf_nan=True)
    """Minutes after which a save is due in any case."""
    keep_last: Annotated[int, FREE] = Field(2, ge=1)
    """Checkpoints kept, newest first; the best by `evaluate.best_metric` is kept besides."""
    keep_every: Annotated[int | None, FREE] = Field(None, ge=1)
    """Keep each checkpoint whose step is a multiple of this."""
    mirror: Annotated[str | None, AS_MEANT, AfterValidator(public), FREE] = None
    """URL, e.g. `s3://bucket/mirror`, below which complete checkpoints are copied to MIRROR/NAME; a run whose
    own folder is gone goes on from there."""


class Evaluate(Section):
    """Validation loss per source, and captions of clips of each: scored, and some shown in a panel."""

    every_steps: Annotated[int, FREE] = Field(500, ge=1)
    """Optimizer steps between evaluations; there is one at the start and one at the end, too."""
    max_samples: Annotated[int, FREE] = Field(1000, ge=1)
    """Validation samples per source."""
    captions: Annotated[int, FREE] = Field(8, ge=0)
    """Clips in the panel of captions, over all sources."""
    scored: Annotated[int, FREE] = Field(64, ge=0)
    """Validation samples of each source whose captions are scored: a choice by seed, of which the panel is a
    part."""
    share: Annotated[float, FREE] = Field(0.05, gt=0, allow_inf_nan=True)
    """The most that captions may take of the time of training. Fewer clips are scored where all would take
    more, and it is said; at the beginning, when that time is not known, the panel alone. `.inf`: always
    all."""
    parts: Annotated[dict[str, str], FREE] = {}
    """Folders of metrics that need more than a library, by metric: `meteor`, `sbert_sim` (evaluation.md)."""
    best_metric: Annotated[str, FREE] = "validation/loss"
    """Metric whose best value marks the best checkpoint: `validation/loss`, `validation/cider_d` (or another
    of evaluation.md), or that of one source, `validation/loss/SOURCE`. Which way is better is known."""


class Monitor(Section):
    """What is reported."""

    every_steps: Annotated[int, FREE] = Field(10, ge=1)
    """Optimizer steps between points of the curves."""
    trackers: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], FREE] = ["tensorboard"]
    """Where curves and captions are shown. Weights & Biases and Trackio are packages of their own, and take
    keys and projects from the environment alone; see monitoring.md."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("name each tracker once")
        return value

    peak_tflops: Annotated[float | None, FREE] = Field(None, gt=0)
    """Peak BF16 TFLOP/s of one device, for MFU; default from a table of known cards, without one MFU stays
    blank."""
    spike_sigma: Annotated[float, FREE] = Field(6.0, gt=0, allow_inf_nan=True)
    """A step's loss this many standard deviations above the mean of the last 100 is told, and its samples are
    named in the ledger."""


class Slurm(Section):
    """What `launch submit` asks Slurm for, and how the chain of attempts goes on."""

    partition: Annotated[str | None, FREE] = None
    """Partition; default the cluster's."""
    account: Annotated[str | None, FREE] = None
    """Account that is charged."""
    qos: Annotated[str | None, FREE] = None
    """Quality of service."""
    constraint: Annotated[str | None, FREE] = None
    """Features that nodes must have."""
    reservation: Annotated[str | None, FREE] = None
    """Reservation to run in."""
    nodes: Annotated[int | str, FREE] = 1
    """Nodes, or a range as `2-8`: each attempt then takes what it gets, and the run is the same."""
    gpus_per_node: Annotated[int, FREE] = Field(8, ge=0)
    """GPUs per node, and one process for each; 0 trains on the CPU."""
    gpu_request: Annotated[Literal["gres", "gpus_per_node"], FREE] = "gres"
    """How GPUs are asked for: `--gres=gpu:N`, or `--gpus-per-node=N`."""
    tasks_per_node: Annotated[int | None, FREE] = Field(None, ge=1)
    """Processes per node; default one per GPU, or 1."""
    cpus_per_task: Annotated[int | None, FREE] = Field(None, ge=1)
    """CPU cores per process; default as large a share of a node's cores as of its GPUs is asked for, by what
    `sinfo` says of the partition; without GPUs the cluster's default."""
    memory_gb: Annotated[int | None, FREE] = Field(None, ge=1)
    """Memory per node, in GB; default the cluster's."""
    time_minutes: Annotated[int, FREE] = Field(24 * 60, ge=1)
    """Time limit of one attempt; the chain goes on over as many as it takes."""
    signal_seconds: Annotated[int, FREE] = Field(120, ge=1)
    """Seconds before the time limit at which Slurm asks to save; a save that takes more than half of it is
    told in the ledger."""
    resubmit: Annotated[Literal["chain", "requeue", "none"], FREE] = "chain"
    """`chain`: every attempt queues the next one first, which starts if this one ends in any way but success.
    `requeue`: the job requeues itself, where compute nodes may not submit; Slurm lets it wait for two
    minutes. `none`: one attempt."""
    max_attempts_without_progress: Annotated[int, FREE] = Field(5, ge=1)
    """Attempts that may fail in a row without a new checkpoint, before the chain ends."""
    exclude_minutes: Annotated[int, FREE] = Field(240, ge=0)
    """Minutes for which a node is left out whose ranks have crashed or hung twice, which was lost twice, or
    that was unfit before the start."""
    hang_seconds: Annotated[float | None, FREE] = Field(None, gt=0)
    """Seconds without a sign of progress after which an attempt counts as hung; default 20 times the longest
    seen so far, at least two minutes, and half an hour before there is one."""
    python: Annotated[str | None, FREE] = None
    """Python on the compute nodes, as in a container; default the one that submits."""
    setup: Annotated[list[str], FREE] = []
    """Lines of shell before the start: modules, conda, `source` of a file with credentials."""
    sbatch: Annotated[list[str], FREE] = []
    """Further options of sbatch, e.g. `[--exclusive, --comment=captions]`. Those that the chain decides
    itself are refused, and the refusal names the setting."""
    srun_args: Annotated[list[str], FREE] = []
    """Further options of srun, a word each, e.g. `[--container-image=...]`; refused as those of sbatch."""
    notify: Annotated[str | None, FREE] = None
    """A mail address, or the URL of a webhook (it gets JSON): told once, when the chain ends."""

    @field_validator("nodes")
    @classmethod
    def _is_a_range(cls, value: int | str) -> int | str:
        low, high = node_range(value)
        if not 1 <= low <= high:
            raise ValueError("write a number of nodes, or a range as 2-8")
        return value

    @field_validator("sbatch")
    @classmethod
    def _are_not_decided_here(cls, value: list[str], info: ValidationInfo) -> list[str]:
        sbatch.check(value, info.data)
        return value

    @field_validator("srun_args")
    @classmethod
    def _are_options_of_a_step(cls, value: list[str]) -> list[str]:
        srun.check(value)
        return value

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> tuple[int, int]:
        """Fewest and most of an attempt."""
        fewest, most = node_range(self.nodes)
        return fewest * self.tasks, most * self.tasks


def node_range(nodes: int | str) -> tuple[int, int]:
    """Fewest and most nodes of a setting as 4 or 2-8; (0, 0) if it is neither."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(nodes))
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


class RunConfig(Section):
    """A whole run."""

    run: Run
    model: Model
    data: Data
    batch: Batch = Batch()
    optim: Optim
    engine: EngineSettings = EngineSettings()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    monitor: Monitor = Monitor()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _best_metric_is_one(self) -> RunConfig:
        try:
            is_higher_better(self.evaluate.best_metric, [source.name for source in self.data.sources])
        except ValueError as error:
            raise ValueError(f"evaluate.best_metric: {error}") from None
        return self
