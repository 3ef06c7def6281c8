"""A base model that is not what it should be is refused by name, before anything is trained; what is certain
is completed, and told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from configs.errors import ConfigError
from configs.load import validate
from configs.run.folder import RunDir
from configs.schema import Model
from launch import remarks as remarks_before
from launch.doctor import _model
from launch.submit import submit_run
from tests.making import config_values
from trainer.examine import tokenizer_of
from trainer.model import Captioner, examine_base, load, save_base

FC1, EMBEDDING = "model.decoder.layers.1.fc1.weight", "model.decoder.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def sound(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper with weights."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(model))
    whisper.generation_config = GenerationConfig.from_pretrained(model)
    whisper.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path, **settings: Any) -> Captioner:
    return load(Model(name_or_path=str(folder), **settings), seed=0)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        examine_base(Model(name_or_path=str(folder), **settings), seed=0)
    return str(refused.value)


def remarks(folder: Path) -> str:
    return "\n".join(examine_base(Model(name_or_path=str(folder)), seed=0).remarks)


def rewrite(folder: Path, name: Callable[[str], str | None] = str, **tensors: torch.Tensor) -> None:
    """Write the weights anew under other names (None: without), with other tensors."""
    found = load_file(folder / "model.safetensors")
    named = {name(old): tensor.clone() for old, tensor in found.items()}
    kept = {new: tensor for new, tensor in named.items() if new is not None}
    save_file(kept | tensors, folder / "model.safetensors", {"format": "pt"})


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file; None removes."""
    document = json.loads(file.read_text(encoding="utf-8")) | values
    document = {key: value for key, value in document.items() if value is not None}
    file.write_text(json.dumps(document), encoding="utf-8")


def as_bin(folder: Path, content: Any = None) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(content or load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    return file


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


NAMES = {
    "DDP": (lambda name: f"module.{name}", "the names hold `module.`"),
    "compiled": (lambda name: f"_orig_mod.{name}", "the names hold `_orig_mod.`"),
    "compiled blocks": (lambda name: name.replace(".fc1", "._orig_mod.fc1"), "the names hold `_orig_mod.`"),
    "twice wrapped": (lambda name: f"module._orig_mod.{name}", "all names begin with `module._orig_mod.`"),
    "model twice": (lambda name: f"model.{name}", "all names begin with `model.`"),
    "a student": (lambda name: f"student.net.{name}", "all names begin with `student.net.`"),
    "PEFT": (lambda name: name.replace("q_proj", "q_proj.base_layer"), "of PEFT, not merged"),
    "OpenAI": (lambda name: name.replace("model.", "").replace("layers", "blocks"), "of OpenAI's whisper"),
    "a layer less": (lambda name: None if "encoder.layers.1." in name else name, "has encoder layers 0,"),
    "a layer more": (lambda name: name.replace("coder.layers.1.", "coder.layers.3."), "unexpected"),
    "a tensor less": (lambda name: None if name == FC1 else name, f"1 missing ({FC1})"),
    "encoder alone": (lambda name: None if "decoder" in name else name, "it is the encoder alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_tensors_under_other_names_are_refused_with_what_they_look_like(folder: Path, case: str) -> None:
    rename, said = NAMES[case]
    rewrite(folder, rename)
    refused = refusal(folder)
    assert refused.startswith(f"model.name_or_path: {folder}/model.safetensors: ") and said in refused


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_target_positions", 128, "max_target_positions is 128 there, 64 in the file"),
        ("max_source_positions", 1500, "max_source_positions is 1500 there, 100 in the file"),
        ("num_mel_bins", 128, "num_mel_bins is 128 there, 80 in the file"),
        ("vocab_size", 51865, "vocab_size is 51865 there"),
        ("encoder_ffn_dim", 128, "encoder_ffn_dim is 128 there, 256 in the file"),
        ("decoder_layers", 1, "the file has decoder layers 0-1, config.json says decoder_layers=1"),
        ("decoder_attention_heads", None, "decoder_attention_heads=None: must be"),
        ("encoder_attention_heads", 3, "no multiple of encoder_attention_heads=3"),
        ("tie_word_embeddings", False, "sets tie_word_embeddings=False"),
        ("activation_function", "relu", "sets activation_function='relu'"),
        ("scale_embedding", True, "sets scale_embedding=True"),
        ("dropout", 0.1, "sets dropout. A step must not depend on how many ranks take it"),
        ("model_type", "wav2vec2", "model_type 'wav2vec2': not a Whisper"),
        ("architectures", ["WhisperForAudioClassification"], "WhisperForAudioClassification: not a Whisper"),
        ("quantization_config", {"quant_method": "gptq"}, "quantized (gptq, quantization_config)"),
        ("quantization_config", "bnb", "quantized (bnb, quantization_config)"),
        ("architectures", "WhisperEncoder", "architectures WhisperEncoder: not a Whisper"),
        ("pad_token_id", 50257, "pad_token_id=50257 is beyond vocab_size"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused_by_key(
    folder: Path, key: str, value: object, said: str
) -> None:
    change(folder / "config.json", **{key: value})
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({FC1: torch.full((256, 64), torch.nan)}, f"NaN or infinite in {FC1}"),
        ({FC1: torch.full((256, 64), torch.inf, dtype=torch.bfloat16)}, f"NaN or infinite in {FC1}"),
        ({FC1: torch.zeros(256, 64)}, f"nothing but zeros in {FC1}"),
        ({FC1: torch.ones(256, 64, dtype=torch.int8)}, f"{FC1}: whole numbers or 8 bits (I8)"),
        ({"proj_out.weight": torch.ones(308, 64)}, f"proj_out.weight differs from {EMBEDDING}"),
    ],
)
def test_values_that_cannot_be_trained_are_refused_by_tensor(
    folder: Path, tensor: dict[str, torch.Tensor], said: str
) -> None:
    rewrite(folder, **tensor)
    assert said in refusal(folder)


OTHERS = {
    "small.pt": "openai/whisper-SIZE",
    "tf_model.h5": "from_tf=True",
    "flax_model.msgpack": "from_flax=True",
    "last.ckpt": "a checkpoint of Lightning",
    "ggml-small.bin": "a model of whisper.cpp",
    "model.bin": "a model of CTranslate2",
    "onnx/encoder_model.onnx": "a model of ONNX",
    "weights.npz": "weights of MLX",
    "checkpoint-500/model.safetensors": "weights in a folder below: name that one",
    "model.safetensors.1": "rename it to model.safetensors",
    "model-00001-of-00002.safetensors": "without their index",
    ".cache/huggingface/download/x.incomplete": "a download that was broken off",
    "adapter_model.safetensors": "an adapter of PEFT",
    "training_args.bin": "what a Trainer keeps beside the weights",
    "mp_rank_00_model_states.pt": "a checkpoint of DeepSpeed",
    "._model.safetensors": "what macOS keeps beside a file",
}


@pytest.mark.parametrize("path", OTHERS)
def test_nothing_starts_at_random_where_weights_lie_in_another_form(
    model: Path, tmp_path: Path, path: str
) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"\x08")
    refused = refusal(tmp_path)
    assert path in refused and OTHERS[path] in refused


def test_a_large_file_of_no_known_form_is_no_random_start(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "whisper").write_bytes(bytes(1 << 20))
    assert "whisper: large, and nothing that is known" in refusal(tmp_path)


def test_a_random_start_is_told(model: Path) -> None:
    assert remarks(model) == f"{model}: holds no weights: training starts at random (run.seed=0)"


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda file: file.write_text(POINTER, encoding="utf-8"), "is a pointer of Git LFS"),
    "page": (lambda file: file.write_bytes(b"<!DOCTYPE html><title>Who?</title>"), "is a web page (Who?)"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "cut off": (cut, "is cut off"),
    "zeros": (lambda file: file.write_bytes(bytes(9999)), "nothing but zero bytes"),
    "link": (lambda file: (file.unlink(), file.symlink_to("../gone")), "a link whose file is gone (../gone)"),
    "cut bin": (lambda file: cut(as_bin(file.parent)), "is damaged or cut off"),
    "nested bin": (lambda file: as_bin(file.parent, {"state_dict": {}, "step": 3}), "(state_dict, step)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_weights_that_is_none_is_named_with_what_it_is(folder: Path, case: str) -> None:
    spoil, said = FILES[case]
    spoil(folder / "model.safetensors")
    refused = refusal(folder)
    assert f"{folder}" in refused and said in refused


def test_parts_of_which_one_is_missing_are_named(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(whole)}
    for part in set(parts.values()):
        save_file({name: whole[name].clone() for name in whole if parts[name] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}), encoding="utf-8")
    assert torch.equal(loaded(folder).trained[FC1], whole[FC1])
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert f"{index}: model-00002-of-00002.safetensors of the 2 files that it names" in refusal(folder)


def test_what_transformers_loads_is_loaded_alike(folder: Path) -> None:
    """Half precision, pickles, and what was saved without the output layer's part of the model."""
    expected = load_file(folder / "model.safetensors")[FC1]
    rewrite(folder, lambda name: name.removeprefix("model."))
    change(folder / "config.json", architectures=["WhisperModel"])
    assert torch.equal(loaded(folder).trained[FC1], expected)
    rewrite(
        folder, **{name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    )
    as_bin(folder)
    half = loaded(folder).trained[FC1]
    assert half.dtype is torch.float32 and torch.equal(half, expected.half().float())
    rewritten = torch.load(folder / "pytorch_model.bin")
    as_transposed = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in rewritten.items()}
    torch.save(as_transposed, folder / "pytorch_model.bin")
    transposed = loaded(folder).trained[FC1]
    assert transposed.is_contiguous() and torch.equal(transposed, half)


def test_an_adapter_is_refused_with_what_to_do(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    adapter.write_text('{"base_model_name_or_path": "openai/whisper-tiny"}', encoding="utf-8")
    assert "if the weights beside it have it in them already" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    assert "merge it with peft" in refusal(folder) and "(MODEL: openai/whisper-tiny)" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model/model.safetensors", "is a file; name the folder"),
        ("nowhere/model", "there is no such folder ("),
        ("hub:nowhere/none", "no folder of this name is in "),
        ("", "holds no config.json, but model does: name that folder"),
        ("https://huggingface.co/openai/whisper-tiny", "has on the hub: openai/whisper-tiny"),
        ("https://hf.co/o/w/resolve/main/model.safetensors?download=true", "has on the hub: o/w"),
        ("https://hf.co/o/w/resolve/main/model.safetensors?download=true", "has on the hub: o/w"),
        ("huggingface.co/o/w", "has on the hub: o/w"),
        ("s3://bucket/model", "copy it to a folder"),
    ],
)
def test_a_name_that_is_no_model_is_said_so(
    folder: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = name.removeprefix("hub:") if ":" in name or ".co/" in name else str(folder.parent / name)
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: ") as refused:
        examine_base(Model(name_or_path=path), seed=0)
    assert said in str(refused.value)


def test_a_tokenizer_that_is_missing_or_unreadable_is_said_so(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER, encoding="utf-8")
    assert "tokenizer.json: is a pointer of Git LFS" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "its tokenizer is missing" in refusal(folder)
    with pytest.raises(ConfigError, match="its tokenizer is missing"):
        tokenizer_of(str(folder), "--tokenizer")


def test_a_tokenizer_in_two_files_is_one_whose_merges_are_whole(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), encoding="utf-8")
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    file = folder / "merges.txt"
    file.write_bytes("\r\n".join(merges).encode())
    assert not remarks(folder)
    for damaged, said in (("", "is cut off"), ("\n".join(merges[:-20]), "is cut off"), (POINTER, "Git LFS")):
        file.write_text(damaged, encoding="utf-8")
        assert f"{file}: is " in refusal(folder) and said in refusal(folder)


def test_a_token_that_was_added_fits_the_embedding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    monkeypatch.setattr("trainer.vocabulary.PUBLISHED", {rows - 1: rows - 2, rows: 0})
    assert not remarks(folder)


def test_a_link_whose_file_is_gone_is_not_taken_for_an_absent_one(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.unlink()
    file.symlink_to("../../blobs/gone")
    assert "generation_config.json: a link whose file is gone (../../blobs/gone)" in refusal(folder)


def test_the_cache_of_the_hub_holds_models_and_none_that_starts_at_random(
    model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "snapshots/abc")
    assert "but snapshots/abc does: name that folder" in refusal(tmp_path)
    assert "holds a config, but no weights" in refusal(tmp_path / "snapshots/abc")


def test_weights_under_the_name_of_the_other_form_are_told_theirs(folder: Path) -> None:
    file = folder / "model.safetensors"
    other = shutil.copy(file, folder / "kept")
    as_bin(folder).rename(file)
    assert f"{file}: is a file of torch.save; call it pytorch_model.bin" in refusal(folder)
    file.unlink()
    other.rename(folder / "pytorch_model.bin")
    assert "is a file of safetensors; call it model.safetensors" in refusal(folder)


def test_a_tokenizer_of_another_model_is_refused_by_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {token["content"]: token for token in tokenizer["added_tokens"]}
    start, end = tokens["<|startoftranscript|>"], tokens["<|endoftext|>"]
    start["content"], end["content"] = end["content"], start["content"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "<|startoftranscript|> is " in refusal(folder) and "of another model" in refusal(folder)
    tokenizer["added_tokens"].append(end | {"id": 308, "content": "<bell>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "<bell>: have no row in the embedding (vocab_size=308" in refusal(folder)


def test_an_old_or_absent_generation_config_is_completed_and_told(folder: Path) -> None:
    expected = loaded(folder)
    file = folder / "generation_config.json"
    absent = {"is_multilingual": None, "lang_to_id": None, "task_to_id": None, "no_timestamps_token_id": None}
    change(file, **absent, forced_decoder_ids=[[1, None], [2, 303]])
    old = loaded(folder)
    file.unlink()
    without = loaded(folder)
    assert list(old.prefix) == list(without.prefix) == list(expected.prefix) and len(old.prefix) == 4
    for found in (old, without):
        assert {key: found.generation[key] for key in absent} == {
            key: expected.generation[key] for key in absent
        }
        assert found.generation["language"] == "en" and found.generation["max_length"] == 64
    assert (
        "is_multilingual" in old.remarks[0]
        and "forced_decoder_ids=[[1, None], [2, 303]] is now None" in old.remarks[0]
    )
    assert not expected.remarks


def test_what_captions_are_not_generated_with_is_left_out_and_told(folder: Path) -> None:
    file = folder / "generation_config.json"
    change(file, do_sample=True, temperature=[0.0, 0.2], length_penalty=0.8, top_p=1.0)
    found = loaded(folder)
    assert not found.generation.get("do_sample") and not found.generation.get("temperature")
    assert all(f"{key}=" in found.remarks[0] for key in ("do_sample", "temperature", "length_penalty"))
    change(file, num_beams=5)
    assert loaded(folder).generation["length_penalty"] == 0.8


def test_what_does_not_fit_the_decoder_is_replaced_and_told(folder: Path) -> None:
    change(folder / "generation_config.json", max_length=448, max_new_tokens=64, language="german")
    found = loaded(folder)
    fits = {"max_length": 64, "max_new_tokens": None, "language": "en"}
    assert {key: found.generation[key] for key in fits} == fits
    assert all(f"{key}=" in found.remarks[0] for key in fits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suppress_tokens", [1, 51000]),
        ("lang_to_id", {"<|en|>": 7}),
        ("no_timestamps_token_id", 50363),
        ("decoder_start_token_id", 50258),
        ("is_multilingual", False),
        ("lang_to_id", [1, 2]),
        ("max_length", "many"),
        ("num_return_sequences", 3),
    ],
)
def test_a_generation_config_of_another_model_is_refused_by_key(
    folder: Path, key: str, value: object
) -> None:
    change(folder / "generation_config.json", **{key: value})
    assert f"{folder}/generation_config.json: " in refusal(folder) and key in refusal(folder)


def test_a_missing_feature_extractor_is_made_and_another_models_is_refused(
    folder: Path, sound: Path, tmp_path: Path
) -> None:
    file = folder / "processor_config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    change(file, feature_extractor=whole["feature_extractor"] | {"feature_size": 128})
    assert "feature_size=128 there, 80 in the model" in refusal(folder)
    file.unlink()
    assert "has no preprocessor_config.json" in remarks(folder)
    written = []
    for number, source in enumerate((folder, sound)):
        run = RunDir(tmp_path / f"run{number}")
        save_base(run, loaded(source))
        written.append({path.name: path.read_bytes() for path in run.base.iterdir()})
    assert written[0] == written[1]


def test_an_empty_set_to_train_is_refused(folder: Path) -> None:
    assert "model.freeze: model: nothing is left to be trained" in refusal(folder, freeze=["model"])


def test_a_start_and_a_submission_say_the_same(folder: Path, shards: str, tmp_path: Path) -> None:
    rewrite(folder, lambda name: f"module.{name}")
    config = validate(config_values("run", tmp_path, folder, shards), "test")
    with pytest.raises(ConfigError) as by_submission:
        submit_run(config, dry_run=True)
    with pytest.raises(ConfigError) as by_start:
        load(config.model, config.run.seed, RunDir(config.run.dir))
    assert str(by_start.value) == str(by_submission.value)


def test_weights_for_a_new_phase_are_looked_over_alike(
    folder: Path, model: Path, shards: str, tmp_path: Path
) -> None:
    rewrite(folder, **{FC1: torch.full((256, 64), torch.nan)})
    values = config_values("run", tmp_path, model, shards)
    values["model"]["init_from"] = str(folder)
    with pytest.raises(ConfigError, match=rf"^model\.init_from: {folder}: .* NaN or infinite in {FC1}"):
        submit_run(validate(values, "test"), dry_run=True)
    assert "NaN or infinite" in _model(validate(values, "test")).details


@pytest.mark.parametrize("freeze", [[], ["model.encoder"]])
def test_a_submission_says_how_large_a_checkpoint_of_what_is_trained_will_be(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: list[str]
) -> None:
    monkeypatch.setattr(remarks_before, "BYTES_PER_PARAMETER", 10_000)
    values = config_values("run", tmp_path, model, "x.tar")
    values["model"]["freeze"] = freeze
    config = validate(values, "test")
    run = RunDir.create(config)
    run.slurm.mkdir()
    lines = remarks_before.remarks(config, run, examine_base(config.model, config.run.seed))
    trained = sum(parameter.numel() for parameter in loaded(model, freeze=freeze).trained.values())
    assert f"a checkpoint has {trained * 10_000 / 1e9:.2f} GB in 8 or more files" in "\n".join(lines)
