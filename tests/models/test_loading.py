"""Loading: what comes back, and one clear line for each way in which a checkpoint can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from mulligan.errors import UserError
from mulligan.models import loading
from mulligan.models.loading import LoadedModel, bos_context, context_length, load_model, save_model
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.models.tokenizer import pico_tokenizer

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 68, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    save_model(LoopedForCausalLM(LoopedConfig(**SIZES, **IDS, max_position_embeddings=96)), pico_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "model")


def refused(name, *parts, **options) -> str:
    """The one-line message with which a model is refused; it holds all the parts."""
    with pytest.raises(UserError) as caught:
        load_model(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def edit(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_looped(good, capfd):
    loaded = load_model(str(good))
    assert isinstance(loaded, LoadedModel)
    assert isinstance(loaded.model, LoopedForCausalLM)
    assert (loaded.name, loaded.model.dtype, loaded.model.training) == (str(good), torch.float32, False)
    assert loaded.tokenizer.encode("1+1") == pico_tokenizer().encode("1+1")
    assert context_length(loaded.model) == 96
    assert bos_context(loaded.tokenizer) == 1
    assert capfd.readouterr() == ("", "")


def test_saving_again_is_bitwise_the_same(good, tmp_path):
    loaded = load_model(str(good))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "again")
    a, b = load_file(good / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_any_other_architecture_tied_and_sharded(tmp_path):
    sizes = dict(**SIZES, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, max_position_embeddings=77)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **IDS))
    save_model(model, pico_tokenizer(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert context_length(loaded.model) == 77
    shards[1].unlink()
    refused(tmp_path, shards[1], "missing")


def test_pico_is_shipped_or_said_to_be_absent(monkeypatch, tmp_path, good):
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "loading.py"))
    refused("pico", "this installation has no weights", tmp_path / "pico" / WEIGHTS)
    shutil.copytree(good, tmp_path / "pico_qwen3")
    assert load_model("pico-qwen3").name == "pico-qwen3"


def test_devices(good, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model(str(good)).model.device.type == "cpu"
    refused(good, "device 'gpu' is not known", device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(good, "device 'cuda:1' is not there", device="cuda:1")


def test_dtype(good):
    refused(good, "dtype 'bfloat'", "did you mean 'bfloat16'", dtype="bfloat")


@pytest.mark.parametrize("name", ["./nope", "/nope/at/all", "~/no-such-model", "a/b/c"])
def test_no_directory(name):
    refused(name, name, "no such directory")


def test_half_a_path_is_a_path(monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("runs/nope", "runs/nope: no such directory")


def test_a_file_is_not_a_model(folder):
    refused(folder / WEIGHTS, folder / WEIGHTS, "give the directory")


def test_hub_errors_are_one_line(monkeypatch):
    def absent(name, **kwargs):
        raise OSError(f"{name} is not a model identifier\nIf this is a private repository, ...")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", absent)
    refused("nobody/nothing", "nobody/nothing: cannot be loaded", "is not a model identifier)")


def test_config_json(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "no-such-architecture"}))
    refused(folder, folder, "no-such-architecture")
    config = json.loads(LoopedConfig(**SIZES).to_json_string())
    file.write_text(json.dumps({**config, "total_ut_steps": 0}))
    refused(folder, "total_ut_steps must be at least 1")
    file.write_text("{")
    refused(folder, file, "not JSON")
    file.write_text("[]")
    refused(folder, file, "not a JSON object")
    file.unlink()
    refused(folder, folder, "no config.json")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(folder, keep):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, file, "corrupt or truncated")


def test_a_weight_of_the_wrong_shape(folder):
    edit(folder, lambda w: w.update({"model.norm.weight": torch.ones(3)}))
    refused(folder, folder, "model.norm.weight has shape (3,)", "(16,)")


def test_a_missing_weight_is_never_random(folder):
    edit(folder, lambda w: (w.pop("model.norm.weight"), w.pop("model.early_exit_gate.bias")))
    refused(folder, folder, "lacks model.early_exit_gate.bias (2 ")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, folder, "no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, folder / "pytorch_model.bin", "can run code")
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    refused(folder, f"{WEIGHTS}.index.json: no weight_map")


def test_tokenizer_without_eos(folder):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    refused(folder, folder, "no EOS")


def test_tokenizer_without_bos():
    tokenizer = pico_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="has no BOS; choose a token"):
        bos_context(tokenizer)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, folder, "its tokenizer cannot be loaded")
    (folder / "tokenizer.json").unlink()
    refused(folder, folder, "no tokenizer")


def test_a_tokenizer_of_another_model(folder):
    small = LoopedForCausalLM(LoopedConfig(**{**SIZES, "vocab_size": 60}, **IDS))
    small.save_pretrained(folder)
    refused(folder, folder, "largest id is 67")


def test_a_model_without_a_context_length():
    model = LoopedForCausalLM(LoopedConfig(**SIZES))
    del model.config.max_position_embeddings
    with pytest.raises(UserError, match="max_position_embeddings"):
        context_length(model)


def test_a_file_in_the_way_of_saving(good, tmp_path):
    loaded = load_model(str(good))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "file")


def test_transformers_logging_is_left_as_it_was(good):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(good))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
