"""Arguments that several tools share on their command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

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
CaptionKey = Annotated[str, typer.Option(help="Where the caption is (for SHARDS).")]
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
    caption_key: str = "caption",
    index_dir: str | None = None,
    storage_options: str | None = None,
) -> tuple[Data, RunConfig | None]:
    """The data that SHARDS...|CONFIG names, and the config, if it is one.

    All but the names is for shards that are named one by one. Raises ConfigError.
    """
    if len(names) == 1 and names[0].endswith((".yaml", ".yml")):
        if index_dir is not None:
            raise ConfigError(
                f"--index-dir {index_dir}: is for SHARDS; a config says it itself, as data.index_dir"
            )
        if storage_options is not None:
            raise ConfigError(
                f"--storage-options {storage_options}: is for SHARDS; a config says them itself, at each"
                " source"
            )
        config = load(names[0])
        return config.data, config
    source: dict[str, object] = {"name": "shards", "shards": list(names), "caption_key": caption_key}
    if storage_options is not None:
        source["storage_options"] = _mapping(storage_options)
    values: dict[str, object] = {"sources": [source]}
    if index_dir is not None:
        values["index_dir"] = index_dir
    try:
        return Data.model_validate(values), None
    except ValidationError as error:
        raise explained(error, "SHARDS") from None


def _mapping(text: str) -> object:
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
