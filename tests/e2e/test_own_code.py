"""A checkpoint that brings its own code: refused unless the user turns it on, and then it stays on for the run."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import Qwen3ForCausalLM, dynamic_module_utils

from mulligan.models.loading import load_model
from mulligan.rundir import load_run_model
from tests.e2e.helpers import SMALL, call, make_model

CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class ToyConfig(Qwen3Config):
    model_type = "toy"

class ToyForCausalLM(Qwen3ForCausalLM):
    config_class = ToyConfig
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A directory with a config and a model class of its own; without its code, transformers knows no "toy"."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    folder = make_model(tmp_path / "toy", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "toy", "architectures": ["ToyForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_toy.py").write_text(CODE)
    return folder


def test_a_run_of_it_is_resumed_and_evaluated_with_its_code(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("train", "--model", "toy", "--out", "run", "--steps", "1", *SMALL)
    assert said.code == 2 and "toy" in said.err and len(said.err.strip().splitlines()) == 1
    more = ("--model", "toy", "--out", "run", "model.trust_remote_code=true", "task.level=1", *SMALL)
    said = call("train", *more, "--steps", "1")
    assert said.code == 0, said
    assert call("train", *more, "--steps", "2", "--resume").code == 0
    shutil.rmtree(toy)  # the run needs nothing outside itself
    loaded, _ = load_run_model(tmp_path / "run")
    assert type(loaded.model).__name__ == "ToyForCausalLM" and isinstance(loaded.model, Qwen3ForCausalLM)
    said = call("eval", "run", "--problems", "2", "--samples", "1")
    assert said.code == 0, said
    said = call("export", "run", "--to", "out")
    assert said.code == 0, said
    again = load_model("out", trust_remote_code=True).model
    assert type(again).__name__ == "ToyForCausalLM"
