"""What the command lines of several tools take alike."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from configs.errors import ConfigError
from configs.load import explained, load
from configs.schema import Data, RunConfig


def named_data(
    what: Sequence[str], caption_key: str = "caption", index_dir: str | None = None
) -> tuple[Data, RunConfig | None]:
    """The data that SHARDS...|CONFIG names, and the config if it is one; caption_key and index_dir are for
    shards named one by one.

    Raises ConfigError.
    """
    if len(what) == 1 and what[0].endswith((".yaml", ".yml")):
        if index_dir is not None:
            raise ConfigError(
                f"--index-dir {index_dir}: is for SHARDS; a config says it itself, as data.index_dir"
            )
        config = load(what[0])
        return config.data, config
    given = {} if index_dir is None else {"index_dir": index_dir}
    try:
        return (
            Data.model_validate(
                {"sources": [{"name": "shards", "shards": list(what), "caption_key": caption_key}], **given}
            ),
            None,
        )
    except ValidationError as error:
        raise explained(error, "SHARDS") from None
