"""Captions of many clips at once, greedily: those of transformers' `generate`, at the clips' own lengths or
padded to the whole window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from data.batch import Segments
from data.captions import LANGUAGE, TASK
from data.features import log_mel
from trainer.decoding import Decoding
from trainer.whisper import Whisper, as_transformers

if TYPE_CHECKING:
    from transformers import GenerationConfig

GREEDY: dict[str, object] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "return_timestamps": False,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
}
"""What else `generate` obeys for a Whisper, and the values with which the likeliest token is the next one."""


@dataclass(frozen=True)
class Heard:
    """A clip to be captioned. waveform: (n,) int16 at 16 kHz; frames: mel frames that the encoder takes;
    prompt: tokens of the style that is wanted, or none."""

    waveform: Tensor
    frames: int
    prompt: list[int]


def in_groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Clips of like length together, at most `size` of them; of each its place in `lengths`. The shortest
    come first."""
    places = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [places[begin : begin + size] for begin in range(0, len(places), size)]


class Generator:
    """Captions clips as the generation config says. It shares the model's tensors."""

    def __init__(self, model: Whisper, generation: GenerationConfig) -> None:
        self._model, self._generation = model, generation
        self._prefix = _prefix(generation)
        end: int | list[int] = generation.eos_token_id
        self._ends = {end} if isinstance(end, int) else set(end)
        asked = {name: getattr(generation, name, None) for name in GREEDY}
        self.beyond = [
            f"{name}={value!r}" for name, value in asked.items() if value not in (None, GREEDY[name])
        ]
        """What the generation config asks for besides the likeliest token: clips are then captioned by
        `generate` itself, one at a time."""

    @torch.no_grad()
    def __call__(self, clips: Sequence[Heard]) -> list[Tensor]:
        """Tokens of each clip's caption, (n,), without prompt, prefix and end. All clips are computed at the
        same time. Raises ConfigError for a prompt that leaves no room for a caption."""
        if not clips:
            return []
        prompts = [clip.prompt for clip in clips]
        self._check_room(prompts)
        config, weight = self._model.config, self._model.proj_out.weight
        waveforms = torch.cat([clip.waveform for clip in clips]).to(weight.device)
        sound = Segments.of([len(clip.waveform) for clip in clips]).to(weight.device)
        audio = Segments.of([clip.frames // 2 for clip in clips]).to(weight.device)
        mel = log_mel(waveforms, sound, audio, config.num_mel_bins, 2 * config.max_source_positions)
        heard = self._model.encoder(mel.to(weight.dtype), audio)
        return (self._by_transformers if self.beyond else self._greedily)(heard, audio, prompts)

    def _check_room(self, prompts: list[list[int]]) -> None:
        longest, positions = max(map(len, prompts)), self._model.config.max_target_positions
        if longest + len(self._prefix) >= positions:
            raise ConfigError(
                f"a style of {longest} tokens leaves no room for a caption in the {positions} positions of"
                " the decoder; say it in a few words"
            )

    def _greedily(self, heard: Tensor, audio: Segments, prompts: list[list[int]]) -> list[Tensor]:
        """heard: (P, d), the encoder's; audio: where each clip lies in it."""
        tokens = [[*prompt, *self._prefix] for prompt in prompts]
        begins = [len(before) for before in tokens]
        most = [self._most(begin) for begin in begins]
        never, not_first = self._bans(heard.device)
        decoding = Decoding(self._model, heard, audio, max(most))
        rows = list(range(len(tokens)))  # the clips whose captions have not ended
        done, known = 0, min(begins)
        while rows:
            new = torch.tensor([tokens[clip][done:known] for clip in rows], device=heard.device)
            scores = decoding(new).float() + never
            if first := [row for row, clip in enumerate(rows) if begins[clip] == known]:
                scores[first] += not_first
            likeliest = scores.argmax(-1).tolist()
            for row, clip in reversed(list(enumerate(rows))):
                if begins[clip] > known:  # the next one is of its prompt or of the prefix
                    continue
                has_ended = likeliest[row] in self._ends
                if not has_ended:
                    tokens[clip].append(likeliest[row])
                if has_ended or len(tokens[clip]) >= most[clip]:
                    rows[row] = rows[-1]
                    rows.pop()
                    decoding.drop(row)
            done, known = known, known + 1
        return [
            torch.tensor(each[begin:], dtype=torch.int64) for each, begin in zip(tokens, begins, strict=True)
        ]

    def _most(self, begin: int) -> int:
        """How many tokens a clip may have, those that a caption begins with included. begin: their number. As
        `generate` counts: these do not count for a limit, but for the decoder's positions."""
        positions, generation = self._model.config.max_target_positions, self._generation
        if generation.max_new_tokens is not None:
            return min(begin + generation.max_new_tokens, positions)
        return min((generation.max_length or positions) + min(begin, positions // 2 - 1), positions)

    def _bans(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What is added to logits, (vocabulary,), so that tokens are never chosen, and so that they are not
        the first one."""
        bans = []
        for banned in (self._generation.suppress_tokens, self._generation.begin_suppress_tokens):
            ban = torch.zeros(self._model.config.vocab_size)
            ban[banned or []] = -torch.inf
            bans.append(ban.to(device))
        never, not_first = bans
        return never, not_first

    def _by_transformers(self, heard: Tensor, audio: Segments, prompts: list[list[int]]) -> list[Tensor]:
        """The same by `generate`, which knows more than to be greedy."""
        from transformers.modeling_outputs import BaseModelOutput

        generate: Any = as_transformers(self._model, self._generation).eval().generate
        is_multilingual = getattr(self._generation, "is_multilingual", False)
        spoken = {"language": LANGUAGE, "task": TASK} if is_multilingual else {}
        captions = []
        for clip, prompt in zip(heard.split(audio.lengths), prompts, strict=True):
            tokens = generate(
                encoder_outputs=BaseModelOutput(clip[None]),
                generation_config=self._generation,
                prompt_ids=torch.tensor(prompt, device=clip.device) if prompt else None,
                **spoken,
            )
            captions.append(tokens[0].cpu())
        return captions


def _prefix(generation: Any) -> list[int]:
    """The tokens that `generate` begins with: `data.captions.prefix_tokens` has them from a tokenizer."""
    prefix = [generation.decoder_start_token_id]
    if getattr(generation, "is_multilingual", False):
        prefix += [generation.lang_to_id[f"<|{LANGUAGE}|>"], generation.task_to_id[TASK]]
    without_times = getattr(generation, "no_timestamps_token_id", None)
    return prefix if without_times is None else [*prefix, without_times]
