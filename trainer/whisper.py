"""Whisper on clips that lie end to end, each at its own length: no padding, neither in the encoder nor in the
decoder.

The layers are those of the published model, and so are their names in a state dict, as transformers has them.
What a token sees is its own clip alone: neither its neighbours nor how many there are change its result.

    B clips    F mel frames    P = F / 2 audio positions    T text tokens, each over all clips    d width
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Segments

GAP = 2
"""Silent columns between clips in the convolutions: two, because the second one takes every other column."""


class Whisper(nn.Module):
    """Audio and the tokens before -> logits of the next token."""

    def __init__(self, config: Any) -> None:
        """config: transformers' WhisperConfig, or what has the same values."""
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"encoder": Encoder(config), "decoder": Decoder(config)})
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the output layer be the embedding of tokens, as in every Whisper."""
        self.proj_out.weight = self.decoder.embed_tokens.weight

    @property
    def encoder(self) -> Encoder:
        """Audio -> what the decoder attends to."""
        return cast(Encoder, self.model["encoder"])

    @property
    def decoder(self) -> Decoder:
        """Tokens -> what their successors are predicted from."""
        return cast(Decoder, self.model["decoder"])

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of encoder and decoder."""
        return [*self.encoder.layers, *self.decoder.layers]

    def forward(self, mel: Tensor, audio: Segments, tokens: Tensor, text: Segments) -> Tensor:
        """mel: (mels, F) log-mel spectrograms; audio: the clips' audio positions; tokens: (T,) int64; text:
        the clips' tokens. Returns logits (T, vocabulary)."""
        return self.proj_out(self.decoder(tokens, text, self.encoder(mel, audio), audio))


class Encoder(nn.Module):
    """Two convolutions, positions, and blocks that look at their whole clip."""

    checkpointing = False
    """Whether blocks are computed again in the backward pass, which takes less memory."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, d, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d, d, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, d)
        self.layers = nn.ModuleList(
            Block(d, config.encoder_attention_heads, config.encoder_ffn_dim, crosses=False)
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, mel: Tensor, audio: Segments) -> Tensor:
        """mel: (mels, F); audio: positions of each clip, half its frames. Returns (P, d)."""
        x = self._convolve(mel, audio)
        x = x + self.embed_positions(audio.positions)
        for block in self.layers:
            x = _run(block, self.checkpointing and self.training, x, audio, is_causal=False)
        return cast(Tensor, self.layer_norm(x))

    def _convolve(self, mel: Tensor, audio: Segments) -> Tensor:
        """Both convolutions over all clips at once: (mels, F) -> (P, d). Silent columns between the clips,
        and nothing in them before the second one, make it what each clip alone would give."""
        clip = audio.owners  # (P,): the clip of each position
        columns = torch.arange(mel.shape[1], device=mel.device) + GAP * clip.repeat_interleave(2)
        apart = mel.new_zeros(mel.shape[0], mel.shape[1] + GAP * audio.count)
        apart[:, columns] = mel
        is_sound = torch.zeros(apart.shape[1], dtype=torch.bool, device=mel.device)
        is_sound[columns] = True
        x = F.gelu(self.conv1(apart[None])) * is_sound
        x = F.gelu(self.conv2(x))[0].T  # (P + B, d): a column of each gap is left
        return x[torch.arange(len(clip), device=mel.device) + clip]


class Decoder(nn.Module):
    """Embedded tokens, positions, and blocks that look at the tokens before and at their clip's audio."""

    checkpointing = False
    """Whether blocks are computed again in the backward pass, which takes less memory."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, d, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_target_positions, d)
        self.layers = nn.ModuleList(
            Block(d, config.decoder_attention_heads, config.decoder_ffn_dim, crosses=True)
            for _ in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, tokens: Tensor, text: Segments, heard: Tensor, audio: Segments) -> Tensor:
        """tokens: (T,) int64; heard: (P, d), the encoder's. Returns (T, d)."""
        x = self.embed_tokens(tokens) + self.embed_positions(text.positions)
        for block in self.layers:
            x = _run(
                block, self.checkpointing and self.training, x, text, is_causal=True, heard=heard, audio=audio
            )
        return cast(Tensor, self.layer_norm(x))


class Block(nn.Module):
    """Attention to its own sequence, in the decoder to the audio, too, then two linear layers; each adds to
    what came in."""

    def __init__(self, d: int, heads: int, width: int, *, crosses: bool) -> None:
        super().__init__()
        self.self_attn = Attention(d, heads)
        self.self_attn_layer_norm = nn.LayerNorm(d)
        if crosses:
            self.encoder_attn = Attention(d, heads)
            self.encoder_attn_layer_norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, width)
        self.fc2 = nn.Linear(width, d)
        self.final_layer_norm = nn.LayerNorm(d)

    def forward(
        self,
        x: Tensor,
        own: Segments,
        *,
        is_causal: bool,
        heard: Tensor | None = None,
        audio: Segments | None = None,
    ) -> Tensor:
        """x: (N, d), sequences of the lengths `own`; is_causal: each position sees those up to itself; heard:
        (P, d) of the encoder, of the lengths `audio`. Returns (N, d)."""
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, own, y, own, is_causal=is_causal)
        if heard is not None:
            assert audio is not None
            y = self.encoder_attn_layer_norm(x)
            x = x + self.encoder_attn(y, own, heard, audio, is_causal=False)
        y = self.final_layer_norm(x)
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(y))))


class Attention(nn.Module):
    """Multi-head attention inside each clip."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d)
        self.q_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(
        self, x: Tensor, own: Segments, seen: Tensor, of_seen: Segments, *, is_causal: bool
    ) -> Tensor:
        """x: (N, d), which asks; seen: (M, d), which answers. Returns (N, d)."""
        q, k, v = (
            projection.unflatten(-1, (self.heads, -1))
            for projection in (self.q_proj(x), self.k_proj(seen), self.v_proj(seen))
        )
        return cast(Tensor, self.out_proj(attend(q, k, v, own, of_seen, is_causal).flatten(1)))


def attend(q: Tensor, k: Tensor, v: Tensor, own: Segments, of_seen: Segments, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d_head)) v inside each clip. q: (N, heads, d_head); k, v: (M, heads, d_head)."""
    if q.is_cuda and q.dtype != torch.float32:  # one kernel for all clips; it knows 16 bits only
        return _attend_at_once(q, k, v, own, of_seen, is_causal)
    return _attend_each(q, k, v, own, of_seen, is_causal)


def _attend_at_once(
    q: Tensor, k: Tensor, v: Tensor, own: Segments, of_seen: Segments, is_causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Until torch 2.10 the last argument was `is_causal`.
    how = {"window_size": (-1, 0 if is_causal else -1)} if VARLEN_HAS_WINDOWS else {"is_causal": is_causal}
    attended: Any = varlen_attn(q, k, v, own.bounds, of_seen.bounds, own.longest, of_seen.longest, **how)
    return cast(Tensor, attended)


VARLEN_HAS_WINDOWS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


# Lengths are others in every batch: compiled, it would be compiled for each of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, own: Segments, of_seen: Segments, is_causal: bool
) -> Tensor:
    """A call for each clip; one for all where they are equally long, as full windows are."""
    if own.are_equal and of_seen.are_equal:
        # (B, heads, n, d_head)
        q, k, v = (x.unflatten(0, (own.count, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return attended.transpose(1, 2).flatten(0, 1)
    of_k, of_v = (x.split(of_seen.lengths) for x in (k, v))
    out = []
    for clip in zip(q.split(own.lengths), of_k, of_v, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in clip)  # (1, heads, n, d_head)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0].transpose(0, 1))
    return torch.cat(out)


def from_transformers(model: nn.Module) -> Whisper:
    """A Whisper with the tensors of transformers' class."""
    with torch.device("meta"):
        ours = Whisper(model.config)
    _share(model, ours)
    return ours


def as_transformers(model: Whisper, generation: Any) -> Any:
    """transformers' class with the same tensors, to generate with. generation: its GenerationConfig."""
    # Takes long, and only captions need it.
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with torch.device("meta"):
        theirs = WhisperForConditionalGeneration(WhisperConfig.from_dict(_values(model.config)))
    _share(model, theirs)
    theirs.generation_config = generation
    return theirs


AUDIO_WINDOW = "audio_window"
"""Name, in an export's config.json, of what the model was trained on: `own` lengths or `full` windows."""
USUAL = {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True}
"""What `forward` takes for granted, by name in a WhisperConfig."""


def _share(source: nn.Module, target: nn.Module) -> None:
    """Give a module the parameters of another one, whose names are the same. Both then have the same ones."""
    parameters = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in parameters:  # load_state_dict lets the target's say whether they are trained
            parameter.requires_grad_(parameters[name].requires_grad)
    target.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    target.train(source.training)


def _values(config: Any) -> dict[str, Any]:
    """Of transformers' WhisperConfig, or of what has the same values."""
    return dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))


def _run(block: nn.Module, is_checkpointed: bool, x: Tensor, own: Segments, **rest: Any) -> Tensor:
    if is_checkpointed:
        return cast(Tensor, checkpoint(block, x, own, use_reentrant=False, **rest))
    return cast(Tensor, block(x, own, **rest))
