"""Where the files of a model are: a folder that is named, or one that the model hub fills."""

from __future__ import annotations

import re
from pathlib import Path

from configs.errors import ConfigError
from trainer.other_weights import form, refuse
from trainer.weight_files import READ

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:(?://)?)([\w.-]+/[\w.-]+)(?:/.*)?"
)
"""Of a model, or of a page or file of it, as a browser shows and copies it."""
SMALL_FILES = ["*.json", "*.txt"]
"""Patterns of what lies beside the weights on the hub."""


def is_hub_name(name: str) -> bool:
    """Whether a model's name is the hub's and no place on this machine."""
    return not Path(name).exists() and HUB_NAME.fullmatch(name) is not None and not name.startswith(".")


def locate(name: str, fetched: Path | None = None, *, weights: bool = True) -> Path:
    """The folder that a model's name means. fetched: where the hub's files were put before; weights: whether
    they are wanted, too. Raises ConfigError."""
    place = Path(name)
    if place.is_dir():
        return place
    if place.exists():
        raise ConfigError(
            f"{name}: is a file; name the folder that holds it together with config.json and the tokenizer's"
            " files"
        )
    if is_hub_name(name):
        return fetched if fetched and fetched.is_dir() else fetch(name, weights=weights)
    if found := HUB_ADDRESS.fullmatch(name):
        raise ConfigError(f"{name}: write the name that the model has on the hub: {found[1]}")
    if "://" in name:
        raise ConfigError(
            f"{name}: models are read from folders or the hub; copy it to a folder and name that"
        )
    raise ConfigError(f"{name}: there is no such folder{_nearest(place)}")


def fetch(name: str, into: Path | None = None, *, weights: bool = True) -> Path:
    """Bring a model from the hub, or find it in the hub's cache; returns its folder. into: default the hub's
    cache. Raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        patterns = [*SMALL_FILES, *(_weight_patterns(name) if weights else ())]
        return Path(snapshot_download(name, local_dir=into, allow_patterns=patterns))
    except ConfigError:
        raise
    except EntryNotFoundError:
        reason = "it cannot be reached, and its cache on this machine does not have the model"
        raise ConfigError(_not_given(name, reason)) from None
    except RepositoryNotFoundError:
        reason = "it has no such model, or wants its terms accepted and HF_TOKEN set"
        raise ConfigError(_not_given(name, reason)) from None
    except Exception as error:  # of httpx, httpx2 or requests, by the hub's version
        raise ConfigError(_not_given(name, str(error).strip().splitlines()[0])) from None


def _weight_patterns(name: str) -> list[str]:
    """Of the files to fetch. Raises ConfigError if the hub has weights in other forms alone."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        files = list_repo_files(name)
    except (RepositoryNotFoundError, HFValidationError):
        raise
    except Exception:  # no network: perhaps the cache has them
        return list(READ.values())
    for file, pattern in READ.items():
        if file in files:
            return [pattern]
    refuse(f"{name} on the hub", {file: form(file) for file in files})
    return []


def _not_given(name: str, reason: str) -> str:
    return (
        f"{name}: no folder of this name is in {Path.cwd()}, and the hub does not give it: {reason}. Give the"
        " path of a folder, or fetch it where there is a network"
    )


def _nearest(place: Path) -> str:
    """What there is of a path, to be said after `there is no such folder`."""
    there = next((parent for parent in place.absolute().parents if parent.is_dir()), Path("/"))
    return f" ({there} is there, {place.absolute().relative_to(there).parts[0]} is not in it)"
