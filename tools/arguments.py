"""Arguments that several tools share on their command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.load import explained, load
from configs.schema import Data, RunConfig

ShardsOrConfig = Annotated[
    list[str],
    typer.Argument(
        help="Shards (paths, URLs, globs, braces), or one config: all its sources.",
        metavar="SHARDS...|CONFIG",
    ),
]
CaptionKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--caption-key",
        help="Where the caption is (for SHARDS); given several times, in order of preference.",
        show_default="caption",
    ),
]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        help="""As `storage_options` in a config (for SHARDS): '{"anon": true}', in JSON or YAML.""",
        metavar="MAPPING",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Shards at a time.")]


def named_data(
    names: Sequence[str],
    caption_keys: Sequence[str] | None = None,
    index_dir: str | None = None,
    storage_options: str | None = None,
) -> tuple[Data, RunConfig | None]:
    """The data that SHARDS...|CONFIG names, and the config, if it is one.

    All but the names is for shards that are named one by one. Raises ConfigError.
    """
    if len(names) == 1 and names[0].endswith((".yaml", ".yml")):
        given = {
            "--caption-key": caption_keys,
            "--index-dir": index_dir,
            "--storage-options": storage_options,
        }
        for option, value in given.items():
            if value:
                raise ConfigError(f"{option} {value}: is for SHARDS; a config says it itself")
        config = load(names[0])
        return config.data, config
    source: dict[str, object] = {"name": "shards", "shards": list(names)}
    if caption_keys:
        source["caption_key"] = list(caption_keys)
    if storage_options is not None:
        source["storage_options"] = mapping(storage_options)
    values: dict[str, object] = {"sources": [source]}
    if index_dir is not None:
        values["index_dir"] = index_dir
    try:
        return Data.model_validate(values), None
    except ValidationError as error:
        raise explained(error, "SHARDS") from None


def mapping(text: str) -> dict[str, Any]:
    """The value of --storage-options. Raises ConfigError."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            """--storage-options: is a mapping in JSON or YAML, quoted for the shell, as '{"anon": true}'"""
        )
    return value
