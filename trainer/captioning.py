"""Captions by Whisper's own `generate`, on clips at their own length or padded to the whole window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from data.batch import Segments
from data.captions import LANGUAGE, TASK
from data.features import log_mel
from trainer.whisper import Whisper, as_transformers

if TYPE_CHECKING:
    from transformers import GenerationConfig


class Generator:
    """Captions clips, one at a time, greedily as the generation config says. It shares the model's
    tensors."""

    def __init__(self, model: Whisper, generation: GenerationConfig) -> None:
        self._model, self._generation = model, generation
        self._transformers = as_transformers(model, generation).eval()
        self._spoken: dict[str, str] = {}
        if getattr(generation, "is_multilingual", False):
            self._spoken = {"language": LANGUAGE, "task": TASK}

    @torch.no_grad()
    def __call__(self, waveform: torch.Tensor, frames: int, prompt: list[int]) -> torch.Tensor:
        """Tokens of a clip's caption, (n,), prompt and prefix included. waveform: (n,) int16 at 16 kHz;
        frames: mel frames that the encoder takes; prompt: tokens of the style that is wanted, or none."""
        from transformers.modeling_outputs import BaseModelOutput

        config = self._model.config
        device = self._model.proj_out.weight.device
        waveform = waveform.to(device)
        sound, audio = (Segments.of([n]).to(device) for n in (len(waveform), frames // 2))
        mel = log_mel(waveform, sound, audio, config.num_mel_bins, 2 * config.max_source_positions)
        heard = self._model.encoder(mel.to(self._model.proj_out.weight.dtype), audio)
        generate: Any = self._transformers.generate
        tokens: torch.Tensor = generate(
            encoder_outputs=BaseModelOutput(heard[None]),
            generation_config=self._generation,
            prompt_ids=torch.tensor(prompt, device=device) if prompt else None,
            **self._spoken,
        )
        return tokens[0]
