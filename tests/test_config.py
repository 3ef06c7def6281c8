"""A YAML file becomes a RunConfig, or an error that says what to mend."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from configs.errors import ConfigError
from configs.load import dump, load, merge, section_in, validate
from configs.run.folder import RunDir
from configs.schema import RunConfig, Section
from tests.making import ROOT, config_values
from trainer.changes import marks, pinned

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIG = """
run: {name: mine}
model: {name_or_path: openai/whisper-tiny}
data:
  sources:
    - {name: speech, shards: speech/*.tar}
    - {name: music, shards: [music/*.tar], weight: 0.5}
optim: {lr: 5e-5, betas: [0.9, 0.9], max_steps: 10}
"""
seeded = settings(derandomize=True, deadline=None, max_examples=50, phases=[Phase.generate, Phase.shrink])

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML file and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_with_the_command_that_it_opens_with(path: Path) -> None:
    command = re.match(r"# python -m launch (?:train|submit) (.*)", path.read_text(encoding="utf-8"))
    assert command, "the first line names the command that runs it"
    name, *rest = shlex.split(command[1])
    assert name == str(path.relative_to(ROOT))
    load(path, [argument for argument in rest if "=" in argument and not argument.startswith("-")])
    load(path)


@pytest.mark.parametrize(
    ("override", "wrong", "near"),
    [
        ("optm.lr=1", "optm", "optim"),
        ("optim.lrr=1", "optim.lrr", "lr"),
        ("data.sources.music.wieght=2", "data.sources.1.wieght", "weight"),
        ("data.sources.0.validation={fractoin: 0.1}", "data.sources.0.validation.fractoin", "fraction"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_one(
    write: Write, override: str, wrong: str, near: str
) -> None:
    path = write(CONFIG)
    with pytest.raises(
        ConfigError, match=re.escape(f"{path}: unknown key {wrong!r}; did you mean {near!r}?")
    ):
        load(path, [override])


def test_unknown_key_like_no_other_is_refused_with_all_that_there_are(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'batch\.zzz'; there are global_size, micro_seconds"):
        load(write(CONFIG), ["batch.zzz=1"])


def test_all_errors_come_at_once_and_name_the_file(write: Write) -> None:
    path = write(CONFIG)
    with pytest.raises(ConfigError) as error:
        load(path, ["optim.lr=-1", "batch.global_size=many", "model.name=x", "data.sources.0={name: speech}"])
    wrong = ["model.name", "data.sources.0.shards", "batch.global_size", "optim.lr"]
    for line, key in zip(str(error.value).splitlines(), wrong, strict=True):
        assert line.startswith(f"{path}: ") and key in line


@pytest.mark.parametrize(
    "content",
    [b"a: [", b"- a", b"extends: nowhere.yaml", b"extends: [other.yaml]", b"run: {name: caf\xe9}"],
    ids=repr,
)
def test_a_file_that_is_no_config_is_an_error_that_names_a_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))}/(mine|nowhere).yaml"):
        load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the config: No such file"):
        load(tmp_path / "absent.yaml")


def test_extends_merges_mappings_and_replaces_lists_relative_to_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(CONFIG, "base.yaml")
    write("extends: ../base.yaml\nbatch: {global_size: 32}\noptim: {lr: 1e-5}", "team/team.yaml")
    path = write(
        "extends: team.yaml\nbatch: {micro_seconds: 2}\ndata: {sources: [{name: birds, shards: b.tar}]}",
        "team/mine.yaml",
    )
    monkeypatch.chdir(tmp_path)
    config = load(path.relative_to(tmp_path))
    assert (config.batch.global_size, config.batch.micro_seconds) == (32, 2)
    assert (config.optim.lr, config.optim.max_steps) == (1e-5, 10)
    assert [source.name for source in config.data.sources] == ["birds"]


def test_a_cycle_of_extends_is_refused(write: Write) -> None:
    write("extends: mine.yaml", "other.yaml")
    with pytest.raises(ConfigError, match=r"mine\.yaml: extends itself through mine\.yaml -> other\.yaml"):
        load(write("extends: other.yaml"))


OVERRIDES: dict[str, Callable[[RunConfig], bool]] = {
    "optim.lr=2e-5": lambda config: config.optim.lr == 2e-5,
    "batch.global_size=7": lambda config: config.batch.global_size == 7,
    "engine.zero2.zero_optimization.reduce_bucket_size=5e8": (
        lambda config: config.engine.zero2.zero_optimization.reduce_bucket_size == 500_000_000
    ),
    "data.sources.music.weight=2": lambda config: [source.weight for source in config.data.sources] == [1, 2],
    "data.sources.0.weight=2": lambda config: [source.weight for source in config.data.sources] == [2, 0.5],
    "data.sources.music.shards=[a.tar, b.tar]": (
        lambda config: config.data.sources[1].shards == ["a.tar", "b.tar"]
    ),
    "data.sources.music.shards=s3://b/{0..9}.tar": (
        lambda config: config.data.sources[1].shards == ["s3://b/{0..9}.tar"]
    ),
    "data.sources.1={name: birds, shards: b.tar}": (
        lambda config: [source.name for source in config.data.sources] == ["speech", "birds"]
    ),
    "optim.betas.1=0.95": lambda config: config.optim.betas == (0.9, 0.95),
    "data.max_seconds=": lambda config: config.data.max_seconds is None,
    "run.name=a=b": lambda config: config.run.name == "a=b" and config.run.dir == Path("runs/a=b"),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_override(write: Write, override: str) -> None:
    config = load(write(CONFIG), [override])
    assert OVERRIDES[override](config), config


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr",
        "=1",
        "optim.lr.x=1",
        "data.sources.birds.weight=1",
        "data.sources.2.weight=1",
        "optim.lr=[1",
    ],
)
def test_override_that_leads_nowhere_is_refused_by_its_own_words(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(override))):
        load(write(CONFIG), [override])


@pytest.mark.parametrize(
    "options",
    [
        "{secret: hunter2}",
        "{client_kwargs: {aws_secret_access_key: hunter2}}",
        "{token: hunter2, profile: mine}",
    ],
)
def test_secrets_are_refused_and_not_repeated(write: Write, options: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.sources\.0\.storage_options: .*secrets do not belong in a config"
    ) as error:
        load(write(CONFIG), [f"data.sources.0.storage_options={options}"])
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("options", ["{anon: 'false'}", "{client_kwargs: us-east-1}"])
def test_options_of_the_wrong_kind_are_refused(write: Write, options: str) -> None:
    """Any text counts as true."""
    with pytest.raises(ConfigError, match=r"storage_options: (anon|client_kwargs): (write|settings)"):
        load(write(CONFIG), [f"data.sources.0.storage_options={options}"])


@pytest.mark.parametrize(
    "override",
    [
        "data.sources.0.shards=https://me:hunter2@host/a.tar",
        "data.sources.0.shards=[a.tar, 'https://host/a.tar?X-Amz-Expires=9&X-Amz-Signature=hunter2']",
        "data.sources.0.validation.shards=['https://host/a.tar?sig=hunter2']",
        "data.sources.0.storage_options={config_kwargs: {proxies: {https: 'http://me:hunter2@proxy:3128'}}}",
        "data.index_dir=s3://me:hunter2@bucket/index",
        "checkpoint.mirror=ftp://me:hunter2@host/mirror",
    ],
)
def test_urls_with_secrets_are_refused_and_not_repeated(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match="URLs with passwords or signatures are not taken") as error:
        load(write(CONFIG), [override])
    assert "hunter2" not in str(error.value) and override.partition("=")[0] in str(error.value)


@pytest.mark.parametrize("override", ["optim.epochs=1", "optim.max_steps="])
def test_a_run_is_given_in_epochs_or_in_steps(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match="give either epochs or max_steps"):
        load(write(CONFIG), [override])


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-.inf"])
@pytest.mark.parametrize("name", ["optim.lr", "data.full_share", "data.cache_gb", "slurm.hang_seconds"])
def test_numbers_are_finite(write: Write, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .*(finite|valid) number"):
        load(write(CONFIG), [f"{name}={value}"])


@pytest.mark.parametrize("name", ["optim.clip_grad_norm", "monitor.spike_sigma", "checkpoint.every_minutes"])
def test_a_bound_may_be_infinite_but_no_nan(write: Write, name: str) -> None:
    section, _, key = name.partition(".")
    assert getattr(getattr(load(write(CONFIG), [f"{name}=.inf"]), section), key) == math.inf
    with pytest.raises(ConfigError, match=rf"{name}: .*greater than 0"):
        load(write(CONFIG), [f"{name}=.nan"])


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "30s", "Auto", "null", "[30]"])
def test_micro_seconds_are_auto_or_a_length(write: Write, value: str) -> None:
    with pytest.raises(ConfigError, match=r"batch\.micro_seconds: write auto, or seconds of audio"):
        load(write(CONFIG), [f"batch.micro_seconds={value}"])


def test_sources_of_one_name_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="source names must differ: music"):
        load(write(CONFIG), ["data.sources.0.name=music"])


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.sampled_from(
    ["5e-5", "1E3", "on", "null", "2024-01-01", "1:30", "=", "~", " a ", "#"]
)


@seeded
@given(
    words,
    st.none() | words,
    st.floats(0, 1, exclude_min=True),
    st.lists(words),
    st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3),
)
def test_dump_is_read_back_to_the_same_config(tmp_path_factory, name, style, lr, freeze, options) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    config = load(folder / "config.yaml")
    source = config.data.sources[0].model_copy(update={"style": style, "storage_options": options})
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name}),
            "model": config.model.model_copy(update={"freeze": freeze}),
            "data": config.data.model_copy(update={"sources": [source]}),
            "optim": config.optim.model_copy(update={"lr": lr}),
        }
    )
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(folder / "config.yaml") == config


# Settings as the schema has them: a key is either a section everywhere or a value everywhere.
leaves = st.dictionaries(
    st.sampled_from("abc"), st.integers() | st.none() | st.lists(st.integers(), max_size=2), max_size=3
)
sections = st.builds(dict.__or__, leaves, st.fixed_dictionaries({}, optional={"x": leaves, "y": leaves}))
configs = st.builds(dict.__or__, leaves, st.fixed_dictionaries({}, optional={"X": sections, "Y": sections}))


def paths(values: dict[str, object], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in values.items():
        yield from paths(value, (*at, key)) if isinstance(value, dict) else [((*at, key), value)]


@seeded
@given(configs, configs, configs)
def test_merge_takes_what_is_above_and_keeps_what_is_below(below, middle, above) -> None:
    assert dict(paths(merge(below, above))) == dict(paths(below)) | dict(paths(above))
    assert merge(merge(below, middle), above) == merge(below, merge(middle, above))


def test_every_setting_is_described() -> None:
    def undescribed(section: type[BaseModel], at: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = section_in(field.annotation)
            if not field.description and not (inner and inner.__doc__):
                yield f"{at}{name}"
            if inner:
                yield from undescribed(inner, f"{at}{name}.")

    assert not list(undescribed(RunConfig, ""))


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all those below it."""
    yield section
    for field in section.model_fields.values():
        if inner := section_in(field.annotation):
            yield from sections(inner)


@pytest.mark.parametrize("section", [*sections(RunConfig)][1:], ids=lambda section: section.__name__)
def test_every_setting_says_whether_a_run_may_go_on_with_another_value(section: type[Section]) -> None:
    assert marks(section).keys() == section.model_fields.keys()


def test_what_is_compared_with_a_checkpoint_is_what_is_marked(tmp_path: Path) -> None:
    config = validate(config_values("run", tmp_path, tmp_path, "*.tar"), "test")
    assert sorted(pinned(config, "digest")) == [
        "batch.global_size",
        "data.augment.gain_db",
        "data.augment.mix",
        "data.augment.noise_share",
        "data.augment.noise_snr_db",
        "data.augment.spec_augment.band_masks",
        "data.augment.spec_augment.band_share",
        "data.augment.spec_augment.time_masks",
        "data.augment.spec_augment.time_share",
        "data.augment.speed",
        "data.full_share",
        "data.long_caption",
        "data.max_seconds",
        "data.overlong",
        "data.shuffle_window",
        "data.sources",
        "data.sources.captions",
        "data.style_drop",
        "data.temperature",
        "data.window",
        "engine.dtype",
        "index",
        "model.freeze",
        "model.init_from",
        "model.name_or_path",
        "optim.betas",
        "optim.clip_grad_norm",
        "optim.eps",
        "optim.lr",
        "optim.schedule",
        "optim.warmup_fraction",
        "optim.weight_decay",
        "order",
        "run.seed",
    ]
    assert pinned(config, "digest")["data.sources"] == [["sounds", 1.0]]


def test_a_setting_without_a_mark_is_refused() -> None:
    class Unmarked(Section):
        """As somebody adds a key who forgets."""

        value: int = 1

    with pytest.raises(TypeError, match=r"Unmarked\.value says nothing"):
        marks(Unmarked)


def test_what_a_run_kept_before_clips_were_packed_is_read_as_it_was(tmp_path: Path) -> None:
    values = config_values("run", tmp_path, tmp_path, "*.tar")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    kept = yaml.safe_load(dump(validate(values, "test")))
    del kept["data"]["window"], kept["data"]["full_share"], kept["batch"]["micro_seconds"]
    kept["batch"]["micro_size"] = 8
    run.config.write_text(yaml.safe_dump(kept), encoding="utf-8")
    assert run.read_config().data.window == run.proposal.read().data.window == "full"
    run.config.write_text(dump(validate(values, "test")), encoding="utf-8")
    assert run.read_config().data.window == "own"


def test_what_a_run_kept_of_settings_that_are_not_taken_any_more_is_left_out(
    tmp_path: Path,
) -> None:
    """So that a run of an older version is shown and exported."""
    values = config_values("run", tmp_path, tmp_path, "*.tar")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    kept = yaml.safe_load(dump(validate(values, "test")))
    kept["engine"]["zero2"] = {"gradient_clipping": 1.0}
    kept["slurm"] |= {"sbatch": ["--array=0-3"], "srun_args": ["--label"]}
    kept["evaluate"]["best_metric"] = "none of these"
    run.config.write_text(yaml.safe_dump(kept), encoding="utf-8")
    assert run.read_config() == validate(values, "test")
    kept["engine"]["zero2"] = {"zero_optimization": {"overlap_comm": True}}
    run.config.write_text(yaml.safe_dump(kept), encoding="utf-8")
    assert run.read_config().engine.zero2.zero_optimization.overlap_comm


PASTED = """
fp16: {enabled: auto}
bf16: {enabled: true}
optimizer: {type: AdamW, params: {lr: auto}}
gradient_clipping: auto
train_micro_batch_size_per_gpu: auto
gradient_acumulation_steps: 4
wall_clock_breakdown: false
overlap_comm: true
zero_optimisation: {}
zero_optimization:
  stage: 2
  offload_optimizer: {device: cpu}
  overlap_com: true
  overlap_comm: auto
  reduce_bucket_size: "5e8"
  allgather_bucket_size: 200000001
  contiguous_gradients: "true"
"""
"""A config of DeepSpeed's, with a mistake here and there."""
SAID = {
    "fp16": "engine.dtype",
    "bf16": "engine.dtype",
    "optimizer": "section optim",
    "gradient_clipping": "optim.clip_grad_norm",
    "train_micro_batch_size_per_gpu": "batch.micro_seconds",
    "gradient_acumulation_steps": "did you mean 'gradient_accumulation_steps'? It is not taken: Earwitness",
    "wall_clock_breakdown": "monitor",
    "overlap_comm": "it stands in zero_optimization",
    "zero_optimisation": "did you mean 'zero_optimization'?",
    "zero_optimization.stage": "it is 2",
    "zero_optimization.offload_optimizer": "state stays on the GPUs",
    "zero_optimization.overlap_com": "did you mean 'overlap_comm'?",
    "zero_optimization.overlap_comm": "leave the key out",
    "zero_optimization.reduce_bucket_size": "as 200000000 or 2e8 (got '5e8')",
    "zero_optimization.allgather_bucket_size": "multiple of 2",
    "zero_optimization.contiguous_gradients": "write true or false",
}
"""What is said of each of its keys."""


def test_a_pasted_deepspeed_config_is_refused_key_by_key_with_what_decides_instead(write: Write) -> None:
    path = write(CONFIG)
    with pytest.raises(ConfigError) as error:
        load(path, [f"engine.zero2={json.dumps(yaml.safe_load(PASTED))}"])
    lines = str(error.value).splitlines()
    told = {
        key: [line for line in lines if re.search(rf"engine\.zero2\.{key}\b'?[:;]", line)] for key in SAID
    }
    assert len(lines) == len(SAID)
    assert all(len(told[key]) == 1 and words in told[key][0] for key, words in SAID.items()), told


def test_places_on_this_machine_are_taken_as_they_are_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells do not expand the `~` of `run.dir=~/runs`."""
    monkeypatch.setenv("HOME", f"{tmp_path}/home [1]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~here").mkdir()

    def places(place: str) -> list[str]:
        settings = ("run.dir", "model.name_or_path", "model.init_from", "checkpoint.mirror")
        settings += ("data.index_dir", "data.cache_dir")
        config = load(ROOT / "configs/turbo.yaml", [f"{setting}={place}" for setting in settings])
        run, model, data = config.run, config.model, config.data
        found = (run.dir, model.name_or_path, model.init_from, config.checkpoint.mirror)
        return [str(one) for one in (*found, data.index_dir, data.cache_dir)]

    assert places("~/it") == [f"{tmp_path}/home [1]/it"] * 6
    assert places("file:///some/it") == ["/some/it"] * 6
    assert places("~nobody-here/it") == ["~nobody-here/it"] * 6
    assert places("~here") == ["~here"] * 6
    assert "s3://bucket/~" in places("s3://bucket/~")
