"""The README.md of an export: what the model is, what it was trained on and how, and how it is used; with the
header that the model hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.errors import ConfigError
from configs.run.events import TrainingBegan
from configs.run.folder import RunDir
from configs.schema import RunConfig
from data import dataset
from data.captions import LANGUAGE
from data.merged import Index
from data.passes import passes
from tools.card_styles import on_styles
from tools.hub_files import PIPELINE
from trainer.checkpoint import Manifest
from trainer.examine import Pretrained
from trainer.hub import is_hub_name

WHISPER_SECONDS = 30
"""The window that faster-whisper takes for granted."""
EMPTY_TOKEN = ""
CARD = """---
{header}
---

# {name}

A Whisper that says in {language} what it hears, trained with Earwitness. It began with {base}.
It hears the first {seconds:g} s of a clip.

## Data

{data}

## Training

{training}

## Validation

{validation}

## Use

{use}

## Limits

{limits}
"""
WITH_TRANSFORMERS = """With transformers (and FFmpeg, which reads the file):

```python
from transformers import pipeline

captioner = pipeline("automatic-speech-recognition", model="{name}")
print(captioner("clip.wav")["text"])
```

The same step by step; `sound` is an array of samples at 16 kHz:

```python
from transformers import AutoProcessor, WhisperForConditionalGeneration

processor = AutoProcessor.from_pretrained("{name}")
model = WhisperForConditionalGeneration.from_pretrained("{name}", dtype="float32")
features = processor(sound, sampling_rate=16_000, return_tensors="pt").input_features
print(processor.batch_decode(model.generate(features), skip_special_tokens=True)[0])
```
"""
WITH_FASTER_WHISPER = """
With CTranslate2 and faster-whisper (`--quantization int8` makes it smaller):

```
ct2-transformers-converter --model {name} --output_dir {name}-ct2 \\
  --copy_files tokenizer.json preprocessor_config.json
```

```python
import json

from faster_whisper import WhisperModel, decode_audio
from faster_whisper.audio import pad_or_trim

captioner = WhisperModel("{name}-ct2")
# It ends captions at half of this; with the prefix they then may fill the decoder.
captioner.max_length = 2 * ({positions} - (4 if captioner.model.is_multilingual else 2))
sound = pad_or_trim(decode_audio("clip.wav"), 480_000)  # 30 s with silence, as it was trained
greedily = dict(beam_size=1, temperature=0, without_timestamps=True)
# Captions may have quotes and colons, and tell of more than speech.
banned = json.load(open("{name}-ct2/config.json"))["suppress_ids"] or []
as_trained = dict(language="en", suppress_tokens=banned, no_speech_threshold=None)
segments, _ = captioner.transcribe(sound, **greedily, **as_trained)
print("".join(segment.text for segment in segments).strip())
```
"""
WITH_EARWITNESS = """
With Earwitness:

```
python -m tools.caption {name} clip.wav
```
"""


@dataclass(frozen=True)
class _Amount:
    """How much of a source was there to train on, and how often it came in an epoch. hours: None if its index
    does not know."""

    clips: int
    hours: float | None
    passes: float


def write_model_card(run: RunDir, model: Pretrained, manifest: Manifest, name: str, folder: Path) -> None:
    """Write README.md. model: the run's base; name: of the export."""
    config = run.read_config()
    seconds = model.config.max_source_positions / 50
    unfit = why_not_in_faster_whisper(model)
    base = _base(config)
    header = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE,
        "language": [LANGUAGE],
        "tags": ["whisper", "audio-captioning", "earwitness"],
    }
    if base == config.model.name_or_path:
        header["base_model"] = base
    use = WITH_TRANSFORMERS + ("" if unfit else WITH_FASTER_WHISPER) + WITH_EARWITNESS
    use = use.format(name=name, positions=model.config.max_target_positions) + on_styles(config.data, name)
    card = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        name=name,
        language="English",
        base=base,
        seconds=seconds,
        data=_data(run, config),
        training=_training(run, config, manifest),
        validation=_validation(manifest),
        use=use.strip(),
        limits=_limits(config, seconds, unfit),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def why_not_in_faster_whisper(model: Pretrained) -> str:
    """Why a model cannot be used there; empty if it can."""
    seconds = model.config.max_source_positions / 50
    if seconds != WHISPER_SECONDS:
        return f"it takes windows of {WHISPER_SECONDS} s for granted, and this model's is {seconds:g} s"
    # By this token CTranslate2 tells models for many languages from those for English, and so what to ask.
    taken_for_multilingual = EMPTY_TOKEN in model.tokenizer.get_vocab()
    if taken_for_multilingual == bool(model.generation.get("is_multilingual")):
        return ""
    has, kind = ("an", "many languages") if taken_for_multilingual else ("no", "English alone")
    return (
        f"the vocabulary has {has} empty token, as published Whispers for {kind}, for which it takes this one"
    )


def _base(config: RunConfig) -> str:
    """What the run began with: a name on the hub, or of a folder, whose path says nothing elsewhere."""
    name = config.model.name_or_path
    on_hub = is_hub_name(name) and "/" in name
    return name if on_hub else f"a Whisper of its owner's ({Path(name).name})"


def _data(run: RunDir, config: RunConfig) -> str:
    amounts = _amounts(run, config)
    rows = []
    for source in config.data.sources:
        amount = amounts.get(source.name)
        clips = f"{amount.clips:,}" if amount else "unknown"
        hours = f"{amount.hours:,.1f}" if amount and amount.hours is not None else "unknown"
        passes = f"{amount.passes:.4g}" if amount else "unknown"
        rows.append([source.name, clips, hours, passes, source.licence or "not stated"])
    return _table(["source", "clips to train on", "hours", "passes per epoch", "licence"], rows)


def _amounts(run: RunDir, config: RunConfig) -> dict[str, _Amount]:
    """By source; nothing where the run's index is gone."""
    try:
        training = dataset.open_dataset(config, run.path).training
    except (OSError, KeyError):
        return {}
    of_epoch = passes(config.data, training.samples_by_source())
    return {
        source.name: _amount(training, number, of_epoch[number])
        for number, source in enumerate(config.data.sources)
    }


def _amount(training: Index, source: int, of_epoch: float) -> _Amount:
    is_clip = (training.column("source") == source) & (training.column("caption") <= 0)
    seconds = training.column("seconds")[is_clip]
    hours = float(seconds.sum(dtype=np.float64)) / 3600
    return _Amount(int(is_clip.sum()), None if np.isnan(hours) else hours, of_epoch)


def _training(run: RunDir, config: RunConfig, manifest: Manifest) -> str:
    optim, data = config.optim, config.data
    window = "each padded to the whole window"
    if data.window == "own":
        window = f"each at its own length, {data.full_share:.0%} of them padded to the whole window"
    lines = [
        f"{manifest.step:,} steps of {config.batch.global_size:,} clips, {window}",
        f"AdamW, learning rate {optim.lr:g} ({optim.schedule}, warm-up {optim.warmup_fraction:.0%}), weight"
        f" decay {optim.weight_decay:g}, gradient norm at most {optim.clip_grad_norm:g}",
        f"computed in {config.engine.dtype}; master weights and optimizer in fp32",
        f"seed {config.run.seed}",
    ]
    if data.augment.is_on:
        changed = data.augment.model_dump(mode="json", exclude_defaults=True)
        lines.append(
            f"clips changed by chance: {', '.join(f'{key} {value}' for key, value in changed.items())}"
        )
    if config.model.init_from:
        lines.append(f"the weights of an earlier run, {Path(config.model.init_from).name}, to begin with")
    if config.model.freeze:
        lines.append(f"not trained: {', '.join(config.model.freeze)}")
    return _list([*lines, *_hardware(run, manifest)])


def _hardware(run: RunDir, manifest: Manifest) -> list[str]:
    try:
        starts = run.ledger.read().of(TrainingBegan)
    except ConfigError:  # of an earlier version
        return []
    starts = [start for start in starts if start.step < manifest.step]
    if not starts:
        return []
    on = dict.fromkeys(f"{start.ranks} x {start.device}" for start in starts)
    attempts = "1 attempt" if len(starts) == 1 else f"{len(starts)} attempts"
    return [f"{attempts}, on {', then '.join(on)}"]


def _validation(manifest: Manifest) -> str:
    metrics = manifest.metrics
    names = [name.removeprefix("validation/loss") for name in metrics if name.startswith("validation/loss")]
    sources = [name for name in names if not name.startswith("_own")]
    if not sources:
        return "There was none."
    rows = []
    for source in sources:
        own = metrics.get(f"validation/loss_own{source}")
        rows.append(
            [
                source.removeprefix("/") or "all",
                f"{metrics[f'validation/loss{source}']:.4f}",
                f"{own:.4f}" if own is not None else "",
            ]
        )
    table = _table(["source", "padded, as transformers does", "at own length, as Earwitness does"], rows)
    return f"Loss per token of captions that were held out, at the last evaluation:\n\n{table}"


def _limits(config: RunConfig, seconds: float, unfit: str) -> str:
    lines = [
        "It knows what its data knows (see above), and may be wrong with confidence.",
        f"Of a clip longer than {seconds:g} s, cut off the rest: transformers refuses it. No time stamps were"
        " trained.",
    ]
    if config.data.window == "own":
        lines.append(
            "`tools.caption` takes each clip at its own length, the other programs pad it: where the model is"
            " undecided, their captions may differ."
        )
    if unfit:
        lines.append(f"faster-whisper cannot use it: {unfit}.")
    else:
        lines.append("faster-whisper by itself ends a caption after 224 tokens: see above.")
    return _list(lines)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
