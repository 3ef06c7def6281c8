"""Arguments that several tools share on their command lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
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
Threads = Annotated[int, typer.Option(min=1, help="Shards at a time.")]


def named_data(
    names: Sequence[str], caption_keys: Sequence[str] | None = None, index_dir: str | None = None
) -> tuple[Data, RunConfig | None]:
    """The data that SHARDS...|CONFIG names, and the config, if it is one.

    caption_keys and index_dir are for shards that are named one by one. Raises ConfigError.
    """
    if len(names) == 1 and names[0].endswith((".yaml", ".yml")):
        if index_dir is not None:
            raise ConfigError(
                f"--index-dir {index_dir}: is for SHARDS; a config says it itself, as data.index_dir"
            )
        config = load(names[0])
        return config.data, config
    source: dict[str, object] = {"name": "shards", "shards": list(names)}
    if caption_keys:
        source["caption_key"] = list(caption_keys)
    values: dict[str, object] = {"sources": [source]}
    if index_dir is not None:
        values["index_dir"] = index_dir
    try:
        return Data.model_validate(values), None
    except ValidationError as error:
        raise explained(error, "SHARDS") from None
