"""What the README.md of an export says of styles: which ones there are, and how one is asked for."""

from __future__ import annotations

import shlex

from configs.schema import Data

ON_STYLES = """
Captions come in the style of a source if one asks in its words:

{styles}

With Earwitness by `python -m tools.caption {name} clip.wav --style {style}`, with transformers by
`generate(features, prompt_ids=processor.get_prompt_ids({quoted}, return_tensors="pt"))`. {without}
"""


def on_styles(data: Data, name: str) -> str:
    """The styles of a run's sources, in Markdown; empty where there are none. name: of the export."""
    sources: dict[str, list[str]] = {}
    for source in data.sources:
        sources.setdefault(source.style or "", []).append(source.name)
    plain = sources.pop("", [])
    if not sources:
        return ""
    style = next(iter(sources))
    return ON_STYLES.format(
        styles="\n".join(f"- `{style}`: {', '.join(names)}" for style, names in sources.items()),
        name=name,
        style=shlex.quote(style),
        quoted=repr(style),
        without=_without(plain, data.style_drop),
    )


def _without(plain: list[str], dropped: float) -> str:
    """What becomes of a caption that is asked for without a style. plain: sources that have none."""
    of_all = "of the others" if plain else "of the samples"
    trained = [", ".join(plain)] if plain else []
    trained += [f"{dropped:.0%} {of_all}"] if dropped else []
    if not trained:
        return "Captions without a style were not trained (data.style_drop was 0): name one."
    return f"Captions without a style were trained, too: on {' and '.join(trained)}."
