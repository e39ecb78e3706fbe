"""Exported directories: what they hold, that they load and sample as the run does, and a card that nothing breaks."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from mulligan import export
from mulligan.checkpoint import load_checkpoint
from mulligan.errors import UserError
from mulligan.export import export_run, generation_config
from mulligan.models.loading import save_model
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.report.card import code, fence, model_card, plain, yaml_string
from mulligan.rundir import checkpoint_model
from tests.e2e.helpers import IDS, SIZES, SMALL, call, make_model, refused
from tests.helpers import tiny

TEMPLATE = "{% for message in messages %}{{ message.content }}={% endfor %}"
# PEFT asks transformers for the property by its former name.
PEFTS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
KINDS = ("looped", "untied", "tied", "lora")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two big steps of each kind. NSR learns from failures, and a random model has nothing else."""
    here = tmp_path_factory.mktemp("runs")
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for tied in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            more = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96, "initializer_range": 0.3}
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **IDS, **more, tie_word_embeddings=tied))
        save_model(model, tokenizer, here / f"model-{'tied' if tied else 'untied'}")
    make_model(here / "model-looped")
    for kind in KINDS:
        name = here / f"model-{'tied' if kind == 'lora' else kind}"
        rank = ["lora.rank=3"] if kind == "lora" else []
        how = ["method.name=nsr", "optimizer.learning_rate=0.02", "sampling.temperature=0.8", "model.chat=off", *rank]
        said = call("train", "--model", name, "--steps", "2", "--out", here / kind, *SMALL, *how)
        assert said.code == 0, said
    return here


@pytest.fixture
def run(runs, tmp_path):
    """A run that a test may spoil."""
    return Path(shutil.copytree(runs / "untied", tmp_path / "run"))


def own(run: Path):
    found = load_checkpoint(run / "checkpoints")
    assert found is not None
    return checkpoint_model(run, found), found


def logits(model, ids=(1, 9, 30, 12, 40)) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def card_of(folder: Path) -> tuple[dict, str]:
    """The front matter and the body."""
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


# --- the directory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_as_any_model_does_and_says_what_the_run_says(runs, tmp_path, kind):
    to = tmp_path / "out"
    said = call("export", runs / kind, "--to", to)
    assert said.code == 0 and f"AutoModelForCausalLM.from_pretrained('{to}')" in said.out
    loaded, found = own(runs / kind)
    model = AutoModelForCausalLM.from_pretrained(to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert model.dtype == torch.float32 and not hasattr(model, "peft_config")
    base = AutoModelForCausalLM.from_pretrained(runs / f"model-{'tied' if kind == 'lora' else kind}")
    assert (logits(model) - logits(base)).abs().max() > 1e-2  # it was trained
    assert torch.allclose(logits(model), logits(loaded.model), atol=1e-5)
    if kind != "lora":
        for name, tensor in found.tensors["model"].items():
            assert torch.equal(model.state_dict()[name], tensor)
    ids = torch.tensor([[1, *tokenizer.encode("x=4,y=1:1x+9?", add_special_tokens=False)]])
    texts = [
        tokenizer.decode(
            m.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)[0],
            skip_special_tokens=False,
        )
        for m in (model, loaded.model)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > len("<bos>x=4,y=1:1x+9?")
    assert tokenizer.get_vocab() == pico_tokenizer().get_vocab()
    assert tokenizer.chat_template == (None if kind == "looped" else TEMPLATE)
    generation = GenerationConfig.from_pretrained(to)
    assert (generation.do_sample, generation.temperature, generation.max_new_tokens) == (True, 0.8, 12)
    assert (generation.top_k, generation.top_p) == (0, 1.0)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([2], 0, 1)


@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_what_vllm_reads_is_there(runs, tmp_path, kind):
    """vLLM picks its own class by ``architectures``, maps weights by name, and wants the tokenizer's file; an
    ``auto_map`` would make it ask for remote code."""
    export_run(runs / kind, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["dtype"] == "float32" and "auto_map" not in config
    assert config["tie_word_embeddings"] is (kind != "untied")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    model = Qwen3ForCausalLM(Qwen3Config(**{k: config[k] for k in (*SIZES, "num_key_value_heads", "head_dim")}))
    wanted = {name for name, _ in model.named_parameters()} - (set() if kind == "untied" else {"lm_head.weight"})
    assert names == wanted
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= files
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o400


@PEFTS
def test_an_adapter_alone(runs, tmp_path):
    from peft import PeftModel

    said = call("export", runs / "lora", "--adapter")
    assert said.code == 0 and "PeftModel.from_pretrained(base, " in said.out
    to = runs / "lora" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(runs / "model-tied")
    assert torch.allclose(logits(PeftModel.from_pretrained(base, to)), logits(own(runs / "lora")[0].model), atol=1e-5)
    assert not (to / "model.safetensors").exists() and (to / "tokenizer.json").exists()
    front, body = card_of(to)
    assert front["library_name"] == "peft" and "A LoRA adapter for" in body
    # 2 matrices of rank 3 for each of q, k, v, o, gate, up, down: in + out features of 32-32, 32-16, 32-16, 32-32,
    # 32-48, 32-48, 48-32: 3 x (64 + 48 + 48 + 64 + 80 + 80 + 80) = 1392
    assert "1,392 adapter parameters" in body
    refused(call("export", runs / "untied", "--adapter"), "has no adapter", "--adapter")


def test_what_is_in_the_way_is_left_alone(run, tmp_path):
    (tmp_path / "empty").mkdir()
    export_run(run, tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").exists()
    export_run(run)
    refused(call("export", run), run / "export", "is not empty")
    (tmp_path / "file").write_text("mine")
    refused(call("export", run, "--to", tmp_path / "file"), "file is a file")
    refused(call("export", tmp_path / "nowhere"), "nowhere is no run")
    shutil.rmtree(run / "checkpoints")
    refused(call("export", run, "--to", tmp_path / "new"), "has no checkpoint yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "run"]


def test_never_half_a_directory(run, tmp_path, monkeypatch):
    def full(model, tokenizer, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "to").mkdir()
    dead = tmp_path / "to" / ".new.exporting-999999999"
    dead.mkdir()
    (tmp_path / "to" / ".new.exporting-mine").mkdir()  # nobody's leavings
    monkeypatch.setattr(export, "save_model", full)
    with pytest.raises(UserError, match=r"new: cannot write: No space left on device$"):
        export_run(run, tmp_path / "to" / "new")
    assert [path.name for path in (tmp_path / "to").iterdir()] == [".new.exporting-mine"]
    aside = []

    def watched(model, tokenizer, folder):
        assert not (tmp_path / "to" / "new").exists()
        aside.append(folder.stat().st_ino)
        save_model(model, tokenizer, folder)

    monkeypatch.setattr(export, "save_model", watched)
    export_run(run, tmp_path / "to" / "new")
    assert aside == [(tmp_path / "to" / "new").stat().st_ino]  # renamed, not copied
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [".new.exporting-mine", "new"]


def test_the_generation_config_ends_where_the_run_ended():
    model, tokenizer = tiny("qwen3"), pico_tokenizer()
    model.generation_config.eos_token_id = [2, 7]
    letter, two = tokenizer.encode("q", add_special_tokens=False)[0], "q;"
    sampling = {"temperature": 0.5, "max_new_tokens": 9, "stop": ["q", two]}
    config, left = generation_config(model, tokenizer, sampling)
    assert config.eos_token_id == sorted({2, 7, letter}) and left == [two]
    assert (config.temperature, config.max_new_tokens, config.pad_token_id) == (0.5, 9, 0)
    tokenizer.pad_token = None
    model.generation_config.eos_token_id = None
    config, _ = generation_config(model, tokenizer, sampling | {"stop": []})
    assert config.eos_token_id == [2] and config.pad_token_id == 2


# --- the card -------------------------------------------------------------------------------------------


def test_the_card_says_what_was_done_and_measured(run):
    done = call(
        "eval",
        run,
        "--problems",
        "5",
        "--samples",
        "3",
        "--max-new-tokens",
        "6,12",
        "--temperature",
        "1",
        "--out",
        run / "held-out",
    )
    assert done.code == 0, done
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (r for r in records if r["step"] in (0, 2) and "eval/pass@1" in r)
    tokens = max(r.get("total/tokens", 0) for r in records)
    with (run / "metrics.jsonl").open("a") as file:  # the run goes on; this step has no checkpoint
        file.write(json.dumps({"step": 3, "eval/pass@1": 0.987, "total/tokens": 10**9, "total/samples": 1}) + "\n")
    front, body = card_of(export_run(run))
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["mulligan", "reinforcement-learning", "rlvr", "nsr"]
    assert not {"license", "base_model", "datasets"} & set(front)  # a directory is nobody's Hub id
    assert "| steps done | 2 |" in body and f"{tokens:,} tokens, 32 responses" in body
    assert (
        "arXiv 2506.01347" in body
        and "Changes against GRPO: credit." in body
        and "register arithmetic" in body
        and "0.987" not in body
    )
    shown = [f"{r['eval/pass@1']:.3f} [{r['eval/pass@1_low']:.3f}, {r['eval/pass@1_high']:.3f}]" for r in (first, last)]
    assert f"| `pass@1` | {shown[0]} | {shown[1]} |" in body
    report = json.loads((run / "held-out" / "report.json").read_text())["grid"][1]
    value = f"{report['pass@1']:.3f} [{report['pass@1_low']:.3f}, {report['pass@1_high']:.3f}]"
    assert f"| `chain` | test | 2 | temperature 1.0, max new tokens 12 | 5 x 3 | {value} |" in body
    toml = (run / "run.toml").read_text().rstrip()
    assert f"```toml\n{toml}\n```" in body
    assert "controlled patient" not in body and "vllm serve" in body


def test_a_run_without_samples_or_measurements(run):
    (run / "samples.jsonl").unlink()
    (run / "metrics.jsonl").write_text("")
    _, body = card_of(export_run(run))
    assert "has measured nothing" in body and 'prompt = "..."' in body


def test_a_hub_base_and_data_set_are_named(run, monkeypatch):
    loaded, found = own(run)
    settings = found.state["run"]
    settings["model"]["name"] = "somebody/their-model"
    settings["task"] = {"name": "dataset", "path": "somebody/their-data", "test_path": "./mine/x", "config": "a/b"}
    monkeypatch.setattr("mulligan.report.card.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("mulligan.report.card.build_task", _gone)
    text = model_card(run, loaded.model, loaded.tokenizer, 2, settings, stops=[])
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("somebody/their-model", "finetune")
    assert front["datasets"] == ["somebody/their-data"]
    assert "The data could not be read for this card: it is gone" in text


def _gone(name, settings):
    raise UserError("it is gone")


@pytest.mark.parametrize("kind", ["looped", "untied", "lora"])
def test_the_cards_program_runs_on_the_very_tokens_of_the_training(runs, tmp_path, kind, capsys):
    to = export_run(runs / kind, tmp_path / "out")
    _, body = card_of(to)
    program = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0]
    assert ("import mulligan" in program) is (kind == "looped") is ("cannot serve it" in body)
    (tmp_path / "program.py").write_text(program.replace("path/to/this/directory", str(to)))
    known = runpy.run_path(str(tmp_path / "program.py"))
    context = json.loads((runs / kind / "samples.jsonl").read_text().splitlines()[0])["context_tokens"]
    assert known["ids"] == context
    assert 1 <= known["output"].shape[1] - len(context) <= 12
    assert capsys.readouterr().out.endswith("\n")


@PEFTS
def test_the_cards_program_for_an_adapter(runs, tmp_path):
    to = export_run(runs / "lora", tmp_path / "out", adapter=True)
    program = re.findall(r"```python\n(.*?)```", card_of(to)[1], re.DOTALL)[0]
    places = {"path/to/this/directory": to, "path/to/the/base": runs / "model-tied"}
    for name, place in places.items():
        assert name in program
        program = program.replace(name, str(place))
    (tmp_path / "program.py").write_text(program)
    assert runpy.run_path(str(tmp_path / "program.py"))["output"].shape[1] > 1


def test_the_shipped_base_is_called_what_it_is(run):
    loaded, found = own(run)
    found.state["run"]["model"]["name"] = "pico-qwen3"
    text = model_card(run, loaded.model, loaded.tokenizer, 2, found.state["run"], stops=[])
    assert "controlled patient" in text and "nothing about the ability of real models" in text


HOSTILE = (
    "x`` `|a|b\n---\nlicense: mit\n# Big\n```\n<script>alert(1)</script> [a](javascript:b) *c* _d_ "
    "{{ 71 * 71 }} {% x %}"
)


def test_names_cannot_become_markup(run):
    loaded, found = own(run)
    settings = found.state["run"]
    settings["model"]["name"] = settings["out"] = HOSTILE
    settings["method"] = {"name": f"./mine.py:{HOSTILE}", "key": HOSTILE}
    text = model_card(run, loaded.model, loaded.tokenizer, 2, settings, stops=[HOSTILE])
    _, front, body = text.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Method", "Data", "Results", "Use", "All settings"]
    assert not any(token.type in ("html_block", "hr") for token in tokens)
    inline = [child for token in tokens for child in token.children or []]
    assert not any(child.type in ("html_inline", "em_open", "image") for child in inline)
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert links == []
    blocks = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in blocks] == ["python", "toml"] and "5041" not in text


MARKDOWN = MarkdownIt("commonmark").enable("table")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.text("`|\\*_#-+>[]()<&;:~=!1. \n\tab", max_size=40)


@given(TEXTS)
def test_yaml_gives_back_every_string(text):
    assert yaml.safe_load(f"key: {yaml_string(text)}\n") == {"key": text}


@given(TEXTS)
@example("<div x")
@example("<!-- x")
@example("1. x")
@example("2) x")
@example("===")
def test_plain_text_is_text_and_nothing_else(text):
    words = " ".join(text.split())
    if not words or "\0" in words:
        return
    for before in ("# ", "- ", "a "):
        tokens = MARKDOWN.parse(before + plain(text))
        inline = next(token for token in tokens if token.type == "inline")
        assert {child.type for child in inline.children} <= {"text", "text_special"}
        assert "".join(child.content for child in inline.children) == (f"a {words}" if before == "a " else words)
        assert sum(token.type == "inline" for token in tokens) == 1


@given(TEXTS)
def test_a_code_span_holds_its_text(text):
    words = " ".join(text.split())
    if not words or "\0" in words:
        return
    table = f"| a | b |\n|---|---|\n| {code(text)} | end |\n"
    cells = [token for token in MARKDOWN.parse(table) if token.type == "inline"][2:]
    assert [cell.content for cell in cells[1:]] == ["end"]
    (span,) = [child for child in cells[0].children if child.type != "text" or child.content.strip()]
    assert (span.type, span.content.strip(" ")) == ("code_inline", words)


@given(TEXTS)
@example("a\n```\nb")
@example("````\nb")
def test_a_fence_ends_where_its_text_does(text):
    if "\0" in text:
        return
    found = MARKDOWN.parse(fence(text, "toml") + "\nbehind\n")
    assert [token.type for token in found] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert found[0].info == "toml"


def test_weights_of_a_damaged_checkpoint_are_not_exported(run):
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_file(file)
    refused(call("export", run), "step-00000002")
    assert not (run / "export").exists()
