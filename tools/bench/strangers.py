"""`PYTHON tools/bench/strangers.py WAY MODEL < FILES > CAPTIONS`: captions an export's users get, by what the
model card tells them to type. It needs nothing of Earwitness: any Python that has the library will do.

FILES: a JSON list of audio files; CAPTIONS: one of their captions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Captions = Callable[[list[str]], list[str]]


def plain(model: str) -> Captions:
    """transformers' pipeline, without any argument."""
    from transformers import pipeline

    captioner: Any = pipeline("automatic-speech-recognition", model=model)
    return lambda files: [captioner(file)["text"] for file in files]


def batched(model: str) -> Captions:
    """The same, four clips at a time."""
    from transformers import pipeline

    captioner: Any = pipeline("automatic-speech-recognition", model=model, batch_size=4)
    return lambda files: [said["text"] for said in captioner(files)]


def generate(model: str) -> Captions:
    """Processor, model and `generate`."""
    import torch
    from transformers import AutoProcessor, WhisperForConditionalGeneration
    from transformers.pipelines.audio_utils import ffmpeg_read

    processor = AutoProcessor.from_pretrained(model)
    whisper = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)

    def caption(file: str) -> str:
        sound = ffmpeg_read(Path(file).read_bytes(), 16_000)
        features = processor(sound, sampling_rate=16_000, return_tensors="pt").input_features
        said: list[str] = processor.batch_decode(whisper.generate(features), skip_special_tokens=True)
        return said[0]

    return lambda files: [caption(file) for file in files]


def faster_whisper(model: str) -> Captions:
    """faster-whisper on what ct2-transformers-converter made of the export."""
    from faster_whisper import WhisperModel, decode_audio
    from faster_whisper.audio import pad_or_trim

    captioner = WhisperModel(model)
    # It ends captions at half of this; with the prefix they then may fill the decoder.
    captioner.max_length = 2 * (448 - (4 if captioner.model.is_multilingual else 2))
    greedily: dict[str, Any] = {"beam_size": 1, "temperature": 0, "without_timestamps": True}
    banned = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["suppress_ids"] or []
    as_trained: dict[str, Any] = {"language": "en", "suppress_tokens": banned, "no_speech_threshold": None}

    def caption(file: str) -> str:
        sound = pad_or_trim(decode_audio(file), 480_000)
        segments, _ = captioner.transcribe(sound, **greedily, **as_trained)
        return "".join(segment.text for segment in segments)

    return lambda files: [caption(file) for file in files]


WAYS = {"pipeline": plain, "batched": batched, "generate": generate, "faster-whisper": faster_whisper}


if __name__ == "__main__":
    way, folder = sys.argv[1:]
    json.dump([text.strip() for text in WAYS[way](folder)(json.load(sys.stdin))], sys.stdout)
