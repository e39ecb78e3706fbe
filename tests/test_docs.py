"""The methods' pages: what they name is there, what they say runs, and what they quote is what is said."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan.errors import UserError
from mulligan.methods import PRESETS, build_schedule
from mulligan.models.loading import save_model
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from tests.e2e.helpers import call, refused
from tests.e2e.test_real_model import byte_level_bpe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "methods"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
INDEX = PAGES["README.md"]


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of a kind."""
    fence = re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page, found) for page, text in PAGES.items() for found in fence.findall(text)]


COMMANDS = [
    (page, line) for page, text in blocks("sh") for line in text.splitlines() if line.startswith("mulligan train")
]


def shown(value: object) -> str:
    return "left out" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def row(name: str) -> str:
    """A preset's row of the index up to its page, from the code as ``mulligan methods --json`` tells it."""
    preset, published = PRESETS[name], PRESETS.get(f"{name}-published")
    parts = sorted({part for method in build_schedule(name).schedule.methods for part in method.changes})
    sets = "none"
    if published:
        brought = {**published.defaults, **published.run}
        told = ", ".join(f"{key}={shown(value)}" for key, value in brought.items() if value != _default(name, key))
        sets = f"`{name}-published`: {told or 'the same'}"
    return f"| `{name}` | {preset.paper or '-'} | {', '.join(parts) or 'none: the baseline'} | {sets} | "


def _default(name: str, key: str) -> object:
    field = PRESETS[name].settings().model_fields.get(key)
    return ... if field is None else field.default


def page_of(name: str) -> str:
    """The page that the index names for a preset."""
    own = next(line for line in INDEX.splitlines() if line.startswith(f"| `{name.removesuffix('-published')}` |"))
    return re.findall(r"\[[^]]*\]\(([\w-]+\.md)\)", own)[0]


# --- what is named --------------------------------------------------------------------------------------


def test_the_index_has_every_preset_as_it_is():
    for name in PRESETS:
        if not name.endswith("-published"):
            assert row(name) in INDEX


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_and_setting_stands_in_its_page(name):
    text = PAGES[page_of(name)]
    assert f"`{name.removesuffix('-published')}`" in text
    settings = {
        key
        for line in text.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(PRESETS[name].settings().model_fields) <= settings
    for key in PRESETS[name].run:
        assert f"{key}=" in text


def test_every_metric_is_one_that_is_logged():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mulligan").rglob("*.py"))
    logged = set(re.findall(r"\b((?:\w+)/[\w@]+)\"", code))
    logged |= {f"retry/rescued_{branch}_truncated" for branch in ("none", "some", "all")}
    named = set(
        re.findall(r"`((?:retry|reset|diagnosis|diagnose|rollout|update|total|time)/\w+)`", "".join(PAGES.values()))
    )
    assert len(named) > 20 and not named - logged


def test_links_and_pictures_are_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
            if not target.startswith("https:"):
                assert (DOCS / target).exists(), (page, target)
    pictures = {target for text in PAGES.values() for target in re.findall(r"!\[[^]]+\]\((img/[\w-]+\.png)\)", text)}
    assert pictures == {f"img/{path.name}" for path in (DOCS / "img").iterdir()}
    assert all((DOCS / picture).stat().st_size <= 60_000 for picture in pictures)


# --- what runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the pages would be: with models, data, and the files that the pages show."""
    here = tmp_path_factory.mktemp("reader")
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    ids = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "bos_token_id": None}
    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, **ids, num_key_value_heads=1, head_dim=16))
    save_model(qwen3, tokenizer, here / "my-qwen3")
    save_model(LoopedForCausalLM(LoopedConfig(**sizes, **ids, total_ut_steps=2)), tokenizer, here / "my-looped")
    (here / "gsm8k").mkdir()
    for split in ("train", "test"):
        lines = [f'{{"question": "What is {n} + {n} ({split})?", "answer": "{2 * n}"}}' for n in range(40)]
        (here / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines))
    for _, text in (*blocks("python"), *blocks("toml")):
        if named := re.match(r"# ([\w.]+)\n", text):
            (here / named[1]).write_text(text)
    return here


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_resolves(page, command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    said = call(*shlex.split(command)[1:], "--dry-run")
    assert said.code == 0 and "# contract holds" in said.out, (page, said)


def test_what_is_refused_is_refused_so(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pairs = [pair for _, text in blocks("console") for pair in re.findall(r"^\$ mulligan (.*)\n(.*)\n", text, re.M)]
    assert len(pairs) > 10
    for command, line in pairs:
        assert refused(call(*shlex.split(command), "--dry-run")) == f"{line}\n"


def test_the_python_runs(tmp_path):
    for index, (_, text) in enumerate(blocks("python")):
        file = tmp_path / f"block{index}.py"
        file.write_text(text)
        runpy.run_path(str(file))


# --- the pictures ---------------------------------------------------------------------------------------


def test_curves_are_drawn_from_runs(tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "method_curves.py"))
    drawn = {name for panels in script["PAGES"].values() for panel in panels for name in panel}
    assert {name for name in PRESETS if not name.endswith("-published")} <= drawn | {script["BASELINE"]}
    told = {"pass@1": 0.0, "pass@1_low": 0.0, "pass@1_high": 0.25, "problems": 4.0}
    steps = [
        {"step": 0, "eval/pass@1": 0.5},
        *({"step": n, "rollout/pass": n / 4, "total/tokens": 900 * n} for n in (1, 2)),
    ]
    for name in ("grpo", "rltt"):
        (tmp_path / f"{name}-seed3").mkdir()
        (tmp_path / f"{name}-seed3" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (tmp_path / f"{name}-seed3" / "result.json").write_text(json.dumps({"numbers": told}))
    curve = script["read"](tmp_path, "rltt", 3)
    assert (curve.tokens, curve.passed) == ([0.9, 1.8], [0.25, 0.5])
    script["draw"]("rltt", tmp_path, 3, tmp_path / "rltt.png")
    assert (tmp_path / "rltt.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"nsr-seed3/result\.json: no such file"):
        script["draw"]("nsr", tmp_path, 3, tmp_path / "nsr.png")
