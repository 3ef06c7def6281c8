"""What the command lines of several tools take alike."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from configs.errors import ConfigError
from configs.load import explained, load
from configs.schema import RunConfig, Source, public


def without_secrets(value: str) -> str:
    """The same text. Raises ConfigError if it holds a URL with a password or a signature."""
    try:
        return public(value)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def named_sources(what: Sequence[str], caption_key: str) -> tuple[list[Source], RunConfig | None]:
    """The sources that SHARDS...|CONFIG names, and the config if it is one; `caption_key` is that of shards named one by one."""
    if len(what) == 1 and what[0].endswith((".yaml", ".yml")):
        config = load(what[0])
        return config.data.sources, config
    try:
        return [Source(name="shards", shards=list(what), caption_key=caption_key)], None
    except ValidationError as error:
        raise explained(error, "SHARDS") from None
