"""Small Whispers with a tokenizer of their own: what the demo, the tests and the benchmarks start from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

# Last in the vocabulary, and <|notimestamps|> last of them, as in Whisper: what follows it is taken for time
# stamps.
SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
POSITIONS_PER_SECOND = 50
"""Encoder positions of a second of audio."""


def make_whisper(
    folder: Path,
    captions: Iterable[str],
    *,
    width: int = 64,
    layers: int = 2,
    seconds: int = 2,
    mels: int = 80,
    vocabulary: int | None = None,
    decoder_layers: int | None = None,
    positions: int = 64,
) -> Path:
    """Write config, processor and generation config of a Whisper without weights, so that training starts at
    random; returns `folder`.

    The tokenizer is a BPE trained on `captions`; `seconds`: the audio window; `vocabulary`: rows of the
    embedding, default the tokenizer's tokens; `decoder_layers`: default as many as the encoder's;
    `positions`: the decoder's.
    """
    fast = _tokenizer(captions)
    ids: dict[str, Any] = {token: fast.convert_tokens_to_ids(token) for token in SPECIAL}
    end = ids["<|endoftext|>"]
    special: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    heads = max(2, width // 64)
    config = WhisperConfig(
        vocab_size=vocabulary or len(fast),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=decoder_layers or layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=POSITIONS_PER_SECOND * seconds,
        max_target_positions=positions,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special,
    )
    # Published Whispers ban symbols, too.
    banned = sorted({fast.encode(symbol, add_special_tokens=False)[0] for symbol in '":([#'})
    generation = GenerationConfig(
        suppress_tokens=banned,
        begin_suppress_tokens=[end],
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_length=positions,
        return_timestamps=False,
        **special,
    )
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
    WhisperProcessor(extractor, fast).save_pretrained(folder)
    return folder


def _tokenizer(captions: Iterable[str]) -> WhisperTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    end = SPECIAL[0]
    return WhisperTokenizer(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
