"""Whisper's decoder token by token: it keeps the keys and values of the tokens before and of the audio."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.batch import Segments
from trainer.whisper import Attention, Block, Whisper

Kept = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a block: keys and values of the tokens, (B, heads, positions, d_head), and of the audio, (B, heads,
longest, d_head)."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of attention. cuDNN's, which torch prefers on Hopper GPUs, takes long at each new shape, and every token
brings one."""


class Decoding:
    """A decoder at work on B clips, all of which have as many tokens so far."""

    def __init__(self, model: Whisper, heard: Tensor, audio: Segments, positions: int) -> None:
        """heard: (P, d), the encoder's; audio: where each clip lies in it; positions: tokens that there may
        be of a clip."""
        self._model, self._past = model, 0
        self._blocks = cast(list[Block], list(model.decoder.layers))
        self._kept = [_beginning(block.encoder_attn, heard, audio, positions) for block in self._blocks]
        self._sounds = None  # (B, 1, 1, longest): where there is audio, unless it is everywhere
        if not audio.are_equal:
            sounds = torch.ones(audio.total, dtype=torch.bool, device=heard.device)
            self._sounds = _apart(sounds, audio)[:, None, None]

    @sdpa_kernel(KERNELS)
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: (B, n), the next ones of each clip; more than one at a time only at the beginning. Returns
        logits of the token after them, (B, vocabulary)."""
        begin, self._past = self._past, self._past + tokens.shape[1]
        decoder = self._model.decoder
        x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[begin : self._past]
        for block, kept in zip(self._blocks, self._kept, strict=True):
            keys, values, audio_keys, audio_values = kept
            y = block.self_attn_layer_norm(x)
            keys[:, :, begin : self._past] = _heads(block.self_attn, block.self_attn.k_proj(y))
            values[:, :, begin : self._past] = _heads(block.self_attn, block.self_attn.v_proj(y))
            keys, values = keys[:, :, : self._past], values[:, :, : self._past]
            x = x + _attend(block.self_attn, y, keys, values, is_causal=begin == 0)
            y = block.encoder_attn_layer_norm(x)
            x = x + _attend(block.encoder_attn, y, audio_keys, audio_values, mask=self._sounds)
            y = block.final_layer_norm(x)
            x = x + block.fc2(F.gelu(block.fc1(y)))
        return cast(Tensor, self._model.proj_out(decoder.layer_norm(x[:, -1])))

    def drop(self, row: int) -> None:
        """Leave a clip out. The last one takes its place, so that no other is moved."""
        self._kept = [cast(Kept, tuple(_without(tensor, row) for tensor in kept)) for kept in self._kept]
        if self._sounds is not None:
            self._sounds = _without(self._sounds, row)


def _beginning(attention: Attention, heard: Tensor, audio: Segments, positions: int) -> Kept:
    """What a block keeps before there are tokens. attention: its to the audio."""
    audio_keys, audio_values = (
        _heads(attention, _apart(projection(heard), audio))
        for projection in (attention.k_proj, attention.v_proj)
    )
    keys, values = (
        heard.new_empty(audio.count, attention.heads, positions, audio_keys.shape[-1]) for _ in range(2)
    )
    return keys, values, audio_keys, audio_values


def _apart(x: Tensor, of: Segments) -> Tensor:
    """Sequences that lie end to end, (N, ...) -> (B, longest, ...), zeros behind those that are shorter."""
    rows = x.new_zeros(of.count, of.longest, *x.shape[1:])
    rows[of.owners, of.positions] = x
    return rows


def _heads(attention: Attention, x: Tensor) -> Tensor:
    """(B, n, d) -> (B, heads, n, d_head)."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _attend(
    attention: Attention,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """x: (B, n, d), which asks; keys, values: (B, heads, m, d_head), which answer. Returns (B, n, d)."""
    asks = _heads(attention, attention.q_proj(x))
    attended = F.scaled_dot_product_attention(asks, keys, values, attn_mask=mask, is_causal=is_causal)
    return cast(Tensor, attention.out_proj(attended.transpose(1, 2).flatten(2)))


def _without(tensor: Tensor, row: int) -> Tensor:
    """The same memory with the last row in the place of another one: (B, ...) -> (B - 1, ...)."""
    tensor[row] = tensor[-1]
    return tensor[:-1]
