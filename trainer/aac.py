"""CIDEr-D, BLEU and ROUGE-L of the library aac-metrics, imported without the rest of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from trainer.said import Figures, Metric, Said

PACKAGE = "aac_metrics"
FUNCTIONS = ("cider_d", "bleu", "rouge_l")
INSTALL = "pip install --no-deps -r requirements-metrics.txt"


@cache
def problem() -> str:
    """Why the library cannot be used, and what to type; empty if it can."""
    try:
        for name in FUNCTIONS:
            _function(name)
    except ImportError as error:
        return f"aac-metrics is not installed as it should be ({error}): {INSTALL}"
    return ""


def _metric(function: str, value: str, **options: object) -> Metric:
    """A metric that the function of a module of the same name gives, among its values."""

    def metric(clips: Sequence[Said]) -> Figures:
        captions, references = [clip.caption for clip in clips], [clip.references for clip in clips]
        of_all, of_each = _function(function)(captions, references, **options)
        return Figures(of_all[value].item(), of_each[value].tolist())

    return metric


def _of_two_or_more(metric: Metric) -> Metric:
    return lambda clips: metric(clips) if len(clips) > 1 else None


METRICS: dict[str, Metric] = {
    "cider_d": _of_two_or_more(_metric("cider_d", "cider_d")),  # asks how many clips a word is said of
    "bleu_1": _metric("bleu", "bleu_1", n=1),
    "bleu_4": _metric("bleu", "bleu_4", n=4),
    "rouge_l": _metric("rouge_l", "rouge_l"),
}


@cache
def _function(name: str) -> Callable[..., Any]:
    """A function of the library, from the module of its name. Raises ImportError.

    `import aac_metrics` imports all metrics, and so msclap and torchaudio, which fit one build of torch only.
    So empty packages stand in for the two whose __init__ does that, while a module is imported. They are gone
    afterwards: who imports the whole library gets it.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}'", name=PACKAGE)
    folder = spec.submodule_search_locations[0]
    before = _taken_out()
    for package, path in ((PACKAGE, folder), (f"{PACKAGE}.functional", f"{folder}/functional")):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [path]
    try:
        return getattr(importlib.import_module(f"{PACKAGE}.functional.{name}"), name)
    finally:
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict[str, ModuleType]:
    """The modules of the library that have been imported, which are so no longer."""
    names = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}
