"""Many clips are captioned at once, each as transformers captions it alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration

from configs.errors import ConfigError, DataError
from data.batch import Sample
from data.captions import PROMPT, Tokens
from data.decode import decode
from tests import stock
from tests.making import make_clips
from tools.caption import caption
from trainer.captioning import Generator, Heard, in_groups
from trainer.examine import examine
from trainer.whisper import from_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 200
"""Mel frames of the small model's window."""
CLIPS = [
    (0.9, 0, []),
    (0.1, 0, [305, 60, 61, 62, 63]),
    (1.3, WINDOW, [305, 60]),
    (0.5, 0, []),
    (2.0, WINDOW, []),
    (0.7, WINDOW, [305, *range(60, 90)]),
    (1.7, 0, []),
    (0.3, 0, [305, 60]),
]
"""Seconds, mel frames if it is padded, and tokens of its style."""


def sample(waveform: np.ndarray, frames: int) -> Sample:
    """frames: of the encoder, if the clip is padded."""
    own = 2 * -(-len(waveform) // 320)
    return Sample(waveform, Tokens([], []), "", source=0, key="", frames=frames or own)


@pytest.fixture(scope="module")
def clips() -> list[tuple[Sample, list[int]]]:
    """Clips of noise with their styles."""
    random = np.random.default_rng(0)
    waveforms = [random.normal(0, 3000, round(16_000 * seconds)).astype(np.int16) for seconds, *_ in CLIPS]
    return [
        (sample(waveform, frames), prompt)
        for waveform, (_, frames, prompt) in zip(waveforms, CLIPS, strict=True)
    ]


@pytest.fixture(scope="module")
def network(model: Path) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperForConditionalGeneration.config_class.from_pretrained(model)
    network = WhisperForConditionalGeneration(config).eval()
    for parameter in network.parameters():
        parameter.data *= 3  # otherwise it says one and the same token
    return network


def ours(
    network: WhisperForConditionalGeneration,
    generation: GenerationConfig,
    clips: list[tuple[Sample, list[int]]],
    size: int = 8,
) -> list[list[int]]:
    generator = Generator(from_transformers(network), generation)
    heard = [Heard(torch.from_numpy(clip.waveform), clip.frames, prompt) for clip, prompt in clips]
    captions = [[0] for _ in clips]
    for group in in_groups([clip.frames for clip in heard], size):
        for place, tokens in zip(group, generator([heard[place] for place in group]), strict=True):
            captions[place] = tokens.tolist()
    return captions


def theirs(
    network: WhisperForConditionalGeneration,
    generation: GenerationConfig,
    clips: list[tuple[Sample, list[int]]],
) -> list[list[int]]:
    window = 2 * network.config.max_source_positions
    return [stock.caption(network, clip, window, generation, prompt) for clip, prompt in clips]


LIMITS = {
    "end": {"eos_token_id": 197},
    "several ends": {"eos_token_id": [299, 197]},
    "max_length": {"max_length": 10},
    "max_new_tokens": {"max_new_tokens": 7},
    "bans": {"suppress_tokens": [207, 197], "begin_suppress_tokens": [299, 242], "max_length": 20},
    "no bans": {"suppress_tokens": None, "begin_suppress_tokens": None, "max_length": 20},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_captions_are_those_of_generate_whatever_ends_them(model, network, clips, limits) -> None:
    generation = GenerationConfig.from_pretrained(model, **limits)
    ends = np.atleast_1d(generation.eos_token_id)
    expected = theirs(network, generation, clips[:5])
    without_ends = [[token for token in tokens if token not in ends] for tokens in expected]
    assert ours(network, generation, clips[:5]) == without_ends


def test_captions_that_never_end_are_the_same_in_batches_of_any_size(model, network, clips) -> None:
    """They end where the decoder's positions do."""
    generation = GenerationConfig.from_pretrained(model)
    together = ours(network, generation, clips)
    assert [len(tokens) for tokens in together] == [60 - len(prompt) for *_, prompt in CLIPS]
    assert together == ours(network, generation, clips, size=3) == ours(network, generation, clips, size=1)
    assert together[3:5] == theirs(network, generation, clips[3:5])


BEYOND = {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 10}


@pytest.mark.parametrize(("name", "value"), BEYOND.items())
def test_what_a_generation_config_asks_for_beyond_the_likeliest_token_is_done(
    model, network, clips, name: str, value: float
) -> None:
    limits = {"max_length": 12, "eos_token_id": 197, "suppress_tokens": None, name: value}
    generation = GenerationConfig.from_pretrained(model, **limits)
    assert Generator(from_transformers(network), generation).beyond == [f"{name}={value}"]
    found = ours(network, generation, clips[:3])
    assert found == theirs(network, generation, clips[:3])
    setattr(generation, name, None)
    assert found != ours(network, generation, clips[:3])


def test_clips_whose_captions_have_ended_are_not_computed_any_more(model, network, clips) -> None:
    generation = GenerationConfig.from_pretrained(model, max_new_tokens=20, eos_token_id=197)
    whisper = from_transformers(network)
    rows: list[int] = []
    whisper.proj_out.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    heard = [Heard(torch.from_numpy(clip.waveform), clip.frames, []) for clip, _ in clips[:5]]
    lengths = [len(tokens) for tokens in Generator(whisper, generation)(heard)]
    assert rows[0] == 5 and min(lengths) < 20
    # With what says that a caption ends, where it is not the limit.
    assert sum(rows) == sum(min(length + 1, 20) for length in lengths)


def test_a_style_that_leaves_no_room_is_refused(model, network, clips) -> None:
    with pytest.raises(ConfigError, match="a style of 60 tokens leaves no room for a caption"):
        ours(network, GenerationConfig.from_pretrained(model), [(clips[0][0], [305] * 60)])


def test_groups_are_of_like_length_and_hold_each_clip_once() -> None:
    assert in_groups([30, 4, 10, 4, 20], 2) == [[1, 3], [2, 4], [0]]
    assert in_groups([], 8) == []


def test_a_broken_file_among_others_costs_no_caption_and_no_order(
    model: Path, network, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, files = tmp_path / "exported", tmp_path / "clips"
    shutil.copytree(model, exported)
    network.save_pretrained(exported)
    shutil.copy(model / "generation_config.json", exported)
    make_clips(files, range(12), ("wav",))
    (files / "clip0004.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="1 file could not be captioned"):
        caption(exported, [files], as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).stem for line in lines] == [f"clip{number:04}" for number in range(12)]
    assert [line.get("caption") is None for line in lines] == [number == 4 for number in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("tiny.en", (1, 3, 8)), ("base", (8,))])
def test_real_whispers_say_of_real_clips_what_they_say_by_generate(
    name: str, sizes: tuple[int, ...], pretrained: Path, real_clips: Path
) -> None:
    """At own lengths and at full windows, with and without styles, in batches of any size; one without an
    end, too."""
    found = examine(str(pretrained / name), "MODEL", needs_weights=True)
    generation = GenerationConfig.from_dict(found.generation)
    network = WhisperForConditionalGeneration.from_pretrained(pretrained / name, dtype=torch.float32).eval()
    style = [found.tokenizer.token_to_id(word) for word in (PROMPT, "\u0120sounds", "\u0120of")]
    clips = []
    for source in ("music", "sounds", "speech"):
        with (real_clips / f"{source}.csv").open(newline="", encoding="utf-8") as file:
            files = [row["file"] for row in csv.DictReader(file) if row["split"] == "validation"]
        for file, frames, length in zip(files, (0, 3000, 0), (0, 0, len(style)), strict=False):
            waveform = decode((real_clips / file).read_bytes(), Path(file).suffix[1:])
            clips.append((sample(waveform, frames), style[:length]))
    clips.append((sample(clips[-1][0].waveform, 3000), style[:2]))
    expected = theirs(network, generation, clips)
    for size in sizes:
        assert ours(network, generation, clips, size) == expected
    generation.suppress_tokens.append(generation.eos_token_id)
    endless = theirs(network, generation, clips[:1])
    assert min(map(len, endless)) >= 440
    assert ours(network, generation, clips[:1]) == endless
