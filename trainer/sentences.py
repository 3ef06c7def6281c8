"""How alike captions are in meaning: the cosine of their embeddings by a model of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from trainer.said import Figures, Metric, Said

if TYPE_CHECKING:
    import torch

GET = "`hf download sentence-transformers/paraphrase-TinyBERT-L6-v2 --local-dir FOLDER` fetches one"
BATCH = 64
"""Captions at once."""


class Embedder:
    """Embeds captions on the CPU, each once. Raises ConfigError if a folder holds no model whose embeddings
    are known to be right."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._known: dict[str, torch.Tensor] = {}
        where = f"evaluate.parts.sbert_sim: {folder}"
        try:
            _check_modules(folder)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            with torch.random.fork_rng(devices=[]):  # weights that the folder lacks are drawn
                model, found = AutoModel.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
                )
            lacking = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
            if lacking:
                raise ValueError(f"its weights lack {lacking[0]}")
            positions = model.config.max_position_embeddings - 2  # RoBERTa's begin at 2
            self._longest = min(_longest(folder), self._tokenizer.model_max_length, positions)
        except Exception as error:  # of any kind, as the files may hold anything
            raise ConfigError(
                f"{where} holds no usable model of sentence-transformers ({error}); {GET}"
            ) from None
        self._model: Any = model.eval()

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings of length 1, (n, width)."""
        import torch

        new = sorted(set(captions) - self._known.keys(), key=lambda caption: (len(caption), caption))
        for first in range(0, len(new), BATCH):
            batch = new[first : first + BATCH]
            self._known |= zip(batch, self._embed(batch), strict=True)
        return torch.stack([self._known[caption] for caption in captions])

    def _embed(self, captions: list[str]) -> torch.Tensor:
        import torch

        tokens = self._tokenizer(
            captions, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        with torch.inference_mode():
            heard = self._model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize(heard.sum(1), dim=1)


def check(folder: Path) -> None:
    """Raise ConfigError if a folder holds no model that can be used."""
    Embedder(folder)


@contextmanager
def opened(folder: Path) -> Iterator[Metric]:
    """The metric, with its model loaded."""
    embed = Embedder(folder)

    def metric(clips: Sequence[Said]) -> Figures:
        embed([text for clip in clips for text in (clip.prediction.caption, *clip.prediction.references)])
        return Figures.averaged(
            [
                (embed(clip.prediction.references) @ embed([clip.prediction.caption])[0]).mean().item()
                for clip in clips
            ]
        )

    yield metric


def _check_modules(folder: Path) -> None:
    """Raise ValueError if an embedding is not the mean over the tokens."""
    modules = [module["type"].rpartition(".")[2] for module in _read(folder / "modules.json")]
    if modules[:2] != ["Transformer", "Pooling"] or modules[2:] not in ([], ["Normalize"]):
        raise ValueError(f"it is made of {', '.join(modules)}, and only Transformer and Pooling are known")
    pooling = _read(folder / "1_Pooling" / "config.json")
    settings = {name: value for name, value in pooling.items() if name.startswith("pooling_mode")}
    modes = [settings.get("pooling_mode") or name for name, value in settings.items() if value]
    if modes not in (["mean"], ["pooling_mode_mean_tokens"]):
        raise ValueError(f"it pools tokens by {', '.join(map(str, modes))}, and only their mean is known")


def _longest(folder: Path) -> int:
    """Tokens of the longest text that a model was made for."""
    settings = folder / "sentence_bert_config.json"
    return (_read(settings).get("max_seq_length") if settings.is_file() else None) or 512


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
