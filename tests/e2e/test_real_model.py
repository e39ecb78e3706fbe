"""A published architecture with a byte-level BPE tokenizer, on published problems: train, export, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mulligan.checkpoint import load_checkpoint
from mulligan.models.loading import save_model
from tests.e2e.helpers import call, metrics

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May?",
    "Please reason step by step, and put your final answer within \\boxed{}.",
] * 3


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """All 256 bytes, a few merges, an EOS and no BOS, as many published models have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A Qwen3 of 32 dimensions with tied embeddings."""
    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    save_model(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository (../shared/data/gsm8k)")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_export_generate(dtype, qwen3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(
        *("train", "--model", qwen3, "--task", "jsonl", f"task.path={GSM8K}", "--steps", "2", "--out", "run"),
        *("sampling.max_new_tokens=16", "sampling.prompts=2", "method.group_size=2", "eval.problems=2"),
        *("eval.samples=2", f"model.dtype={dtype}", "method.entropy_bonus=0.1"),
        "optimizer.learning_rate=1e-3",  # no answer is right, so the bonus alone moves weights
    )
    assert said.code == 0, said
    assert [m["step"] for m in metrics(tmp_path / "run") if "update/loss" in m] == [1, 2]

    assert call("export", "run", "--to", "exported").code == 0
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert type(model) is Qwen3ForCausalLM and str(model.dtype) == f"torch.{dtype}"
    saved = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 2
    state, start = model.state_dict(), AutoModelForCausalLM.from_pretrained(qwen3).state_dict()
    assert any(not torch.equal(start[name].to(value.dtype), value) for name, value in state.items())
    assert set(saved.tensors["model"]) | {"lm_head.weight"} == set(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.tensors["model"].items())
    assert model.lm_head.weight is model.model.embed_tokens.weight

    tokenizer = AutoTokenizer.from_pretrained("exported")
    prompt = tokenizer("How many clips did Natalia sell?", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert prompt["input_ids"].shape[1] < written.shape[1] <= prompt["input_ids"].shape[1] + 5
    assert tokenizer.decode(prompt["input_ids"][0]) == "How many clips did Natalia sell?"

    again = call("eval", "exported", "--task", "jsonl", f"task.path={GSM8K}", "--problems", "2", "--samples", "1")
    assert again.code == 0, again


def hub_layout(folder: Path, rows: int = 24) -> Path:
    """Rows of GSM8K as the Hub holds them: a README whose header maps splits to Parquet files."""
    from datasets import Dataset

    for split in ("train", "test"):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        Dataset.from_list([json.loads(line) for line in lines]).to_parquet(
            folder / "main" / f"{split}-00000-of-00001.parquet"
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n---\n# GSM8K\n"
    )
    return folder


RUN = """
steps = 2
out = "run"
[model]
name = {model}
gradient_checkpointing = true
[lora]
rank = 4
[task]
name = "gsm8k"
path = {data}
[method]
name = "grpo"
group_size = 2
entropy_bonus = 0.1
[sampling]
prompts = 2
max_new_tokens = 16
[optimizer]
learning_rate = 1e-2
[eval]
problems = 2
samples = 2
split = "test"
"""


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the repository (../shared/data/gsm8k)")
@pytest.mark.parametrize("layout", ["files", "hub"])
def test_from_toml_with_lora(layout, qwen3, tmp_path, monkeypatch):
    """The whole way: a run file, adapters, a saved evaluation on two data sets, a merged export with its card."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = GSM8K if layout == "files" else hub_layout(tmp_path / "openai-gsm8k")
    Path("run.toml").write_text(RUN.format(model=json.dumps(str(qwen3)), data=json.dumps(str(data))))
    said = call("train", "run.toml")
    assert said.code == 0, said
    saved = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 2
    assert all("lora" in name for name in saved.tensors["model"])
    assert any(bool(t.any()) for name, t in saved.tensors["model"].items() if "lora_B" in name)

    said = call(
        *("eval", "run", "--task", "gsm8k", "--task", "math", f"gsm8k.path={data}", f"math.path={GSM8K.parent}/math"),
        *(f"math.test_path={GSM8K.parent}/math500", "math.longest_question=200", "--problems", "2"),
        *("--samples", "2", "--max-new-tokens", "16", "--out", "run/evaluation"),
    )
    assert said.code == 0, said
    assert {"settings.json", "samples.jsonl", "report.json"} <= {p.name for p in Path("run/evaluation").iterdir()}

    assert call("export", "run").code == 0
    model = AutoModelForCausalLM.from_pretrained("run/export")
    assert type(model) is Qwen3ForCausalLM and not any("lora" in name for name in model.state_dict())
    base = AutoModelForCausalLM.from_pretrained(qwen3).state_dict()
    assert any(not torch.equal(base[name], tensor) for name, tensor in model.state_dict().items())
    card = Path("run/export/README.md").read_text()
    assert "grpo" in card and "gsm8k" in card.lower()
