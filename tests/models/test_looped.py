"""The looped model against its formulas, and against itself with a cache, padding and fewer loops."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from mulligan.errors import UserError
from mulligan.models.looped import (
    LoopedConfig,
    LoopedForCausalLM,
    LoopedModel,
    LoopedRMSNorm,
    exit_distribution,
    exit_loops,
    register,
)

N, L = 2, 3


def config(**changes) -> LoopedConfig:
    sizes = {
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": N,
        "num_attention_heads": 4,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LoopedConfig(**{**sizes, **ids, "total_ut_steps": L, "rope_parameters": {"rope_theta": 50.0}, **changes})


def make(dtype=torch.float64, seed=0, **changes) -> LoopedForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LoopedForCausalLM(config(**changes))
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # so that no gain of 1 hides a missing factor
                weight.data.normal_(1.0, 0.2)
    return model.to(dtype).eval()


def tokens(rows=2, length=7, seed=1) -> torch.Tensor:
    return torch.randint(3, 29, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(model: LoopedForCausalLM, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each loop's logits [T, V] and the exit probabilities [T, L], one position at a time, from the formulas."""
    c, w = model.config, model.state_dict()
    size, half = c.head_dim, c.head_dim // 2
    share = c.num_attention_heads // c.num_key_value_heads
    theta = c.rope_parameters["rope_theta"]

    def norm(x, name):
        return x / (x.square().mean() + c.rms_norm_eps).sqrt() * w[f"model.{name}.weight"]

    def rotate(x, position):
        out = x.clone()
        for i in range(half):
            angle = position * theta ** (-2 * i / size)
            turned = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
            out[i], out[i + half] = turned.real, turned.imag
        return out

    def attention(xs, layer):
        def heads(x, name):
            return (w[f"{layer}.self_attn.{name}_proj.weight"] @ x).split(size)

        q = [[rotate(h, t) for h in heads(x, "q")] for t, x in enumerate(xs)]
        k = [[rotate(h, t) for h in heads(x, "k")] for t, x in enumerate(xs)]
        v = [heads(x, "v") for x in xs]
        out = []
        for t in range(len(xs)):
            mixed = []
            for h in range(c.num_attention_heads):
                scores = torch.stack([q[t][h] @ k[s][h // share] / math.sqrt(size) for s in range(t + 1)])
                weights = scores.softmax(0)
                mixed.append(sum(weights[s] * v[s][h // share] for s in range(t + 1)))
            out.append(w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(mixed))
        return out

    def mlp(x, layer):
        gate, up, down = (w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        g = gate @ x
        return down @ (g / (1 + (-g).exp()) * (up @ x))

    xs = [w["model.embed_tokens.weight"][i] for i in ids]
    logits, gates = [], []
    for _ in range(c.total_ut_steps):
        for i in range(c.num_hidden_layers):
            attended = attention([norm(x, f"layers.{i}.input_layernorm") for x in xs], f"model.layers.{i}")
            xs = [x + norm(a, f"layers.{i}.input_layernorm_2") for x, a in zip(xs, attended, strict=True)]
            fed = [mlp(norm(x, f"layers.{i}.post_attention_layernorm"), f"model.layers.{i}") for x in xs]
            xs = [x + norm(m, f"layers.{i}.post_attention_layernorm_2") for x, m in zip(xs, fed, strict=True)]
        xs = [norm(x, "norm") for x in xs]
        logits.append(torch.stack([w["lm_head.weight"] @ x for x in xs]))
        gate = torch.stack([w["model.early_exit_gate.weight"][0] @ x for x in xs])
        gates.append(1 / (1 + (-gate - w["model.early_exit_gate.bias"]).exp()))
    exits, left = [], torch.ones_like(gates[0])
    for gate in gates[:-1]:
        exits.append(left * gate)
        left = left * (1 - gate)
    return logits, torch.stack([*exits, left], -1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 6])
def test_forward_is_the_formulas(kv_heads, head_dim):
    model, ids = make(num_key_value_heads=kv_heads, head_dim=head_dim), tokens()
    with torch.no_grad():
        out = model(ids, output_loops=True)
        for row in range(len(ids)):
            logits, exits = reference(model, ids[row].tolist())
            for t, h in enumerate(out.loop_hidden_states):
                torch.testing.assert_close(model.lm_head(h[row]), logits[t], atol=1e-9, rtol=0)
            torch.testing.assert_close(out.exit_probabilities[row], exits, atol=1e-9, rtol=0)
    torch.testing.assert_close(out.logits, model.lm_head(out.loop_hidden_states[-1]), atol=0, rtol=0)
    torch.testing.assert_close(out.exit_probabilities.sum(-1), torch.ones(2, 7).double())


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (4, 1, 2), (2, 5)])
def test_cache_changes_nothing(pieces, kv_heads):
    model, ids = make(num_key_value_heads=kv_heads), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DynamicCache(), []
        for piece in ids.split(pieces, dim=1):
            out = model(piece, past_key_values=cache)
            assert out.past_key_values is cache
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    assert len(cache.layers) == N * L
    assert {cache.get_seq_length(slot) for slot in range(N * L)} == {7}


def test_cache_slot_is_loop_times_layers_plus_layer():
    model, ids = make(), tokens()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        states = model(ids, output_hidden_states=True).hidden_states  # embeddings, then each loop
        first = model.model.layers[0]
        for loop in range(L):
            v = first.self_attn.v_proj(first.input_layernorm(states[loop])).view(2, 7, 4, 4).transpose(1, 2)
            torch.testing.assert_close(cache.layers[loop * N].values, v, atol=1e-12, rtol=0)


def test_no_cache_unless_asked():
    model, ids = make(), tokens()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 7


def test_cache_of_other_loops_is_refused():
    model, ids = make(), tokens()
    cache = model(ids, use_cache=True, num_loops=1).past_key_values
    with pytest.raises(UserError, match="not filled with 3 loops"):
        model(ids[:, :1], past_key_values=cache)


def test_cache_that_cannot_grow_is_refused():
    model = make()
    with pytest.raises(UserError, match="StaticCache"):
        model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=9))


def pad_left(ids: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut to these lengths and padded on the left, and their mask."""
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    shifted = torch.stack([row.roll(ids.shape[1] - n) for row, n in zip(ids, lengths, strict=True)])
    return shifted * mask, mask


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_left_padding_changes_nothing(kv_heads):
    model, ids = make(num_key_value_heads=kv_heads), tokens(3)
    lengths = (7, 4, 1)
    padded, mask = pad_left(ids, lengths)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, output_loops=True)
        cached = model(padded[:, :-2], attention_mask=mask[:, :-2], use_cache=True).past_key_values
        steps = [model(padded[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cached).logits]
        steps.append(model(padded[:, -1:], attention_mask=mask, past_key_values=cached).logits)
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, :n], output_loops=True)
            torch.testing.assert_close(out.logits[row, -n:], alone.logits[0], atol=1e-12, rtol=0)
            torch.testing.assert_close(out.exit_probabilities[row, -n:], alone.exit_probabilities[0])
            torch.testing.assert_close(steps[1][row], alone.logits[0, -1:], atol=1e-12, rtol=0)
            if n > 1:
                torch.testing.assert_close(steps[0][row], alone.logits[0, -2:-1], atol=1e-12, rtol=0)
    assert out.logits.isfinite().all()


def test_right_padding_needs_no_mask():
    model, ids = make(), tokens()
    longer = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 3))
    with torch.no_grad():
        plain = model(ids).logits
        torch.testing.assert_close(model(longer).logits[:, :7], plain, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(longer, attention_mask=mask).logits[:, :7], plain, atol=1e-12, rtol=0)


def test_position_ids_and_embeddings_may_be_given():
    model, ids = make(), tokens()
    with torch.no_grad():
        plain = model(ids).logits
        shifted = model(ids, position_ids=torch.arange(11, 18)[None]).logits  # RoPE sees differences only
        torch.testing.assert_close(shifted, plain, atol=1e-10, rtol=0)
        stretched = model(ids, position_ids=3 * torch.arange(7)[None]).logits
        assert not torch.allclose(stretched, plain, atol=1e-3)
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, plain)
        four = torch.ones(7, 7).tril().bool()[None, None]
        torch.testing.assert_close(model(ids, attention_mask=four).logits, plain, atol=1e-12, rtol=0)


def test_the_unpadded_paths_build_no_mask(monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, ids = make(), tokens()
    cache = DynamicCache()
    model(ids)
    model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert set(seen) == {(True, True)}
    seen.clear()
    model(ids[:, :1], past_key_values=cache)
    assert set(seen) == {(True, False)}


def test_num_loops():
    model, ids = make(), tokens()
    with torch.no_grad():
        full = model(ids, output_loops=True)
        for loops in (1, 2, 3):
            out = model(ids, num_loops=loops, output_loops=True)
            assert len(out.loop_hidden_states) == loops
            torch.testing.assert_close(out.last_hidden_state, full.loop_hidden_states[loops - 1])
            torch.testing.assert_close(out.logits, model.lm_head(full.loop_hidden_states[loops - 1]))
            torch.testing.assert_close(out.exit_probabilities.sum(-1), torch.ones(2, 7).double())
            if loops > 1:  # all but the last are those of the full run
                torch.testing.assert_close(out.exit_probabilities[..., :-1], full.exit_probabilities[..., : loops - 1])
        more = model(ids, num_loops=5, output_loops=True)
        torch.testing.assert_close(more.loop_hidden_states[L - 1], full.last_hidden_state)
    with pytest.raises(UserError, match="num_loops"):
        model(ids, num_loops=0)


def test_optional_outputs_are_optional():
    model, ids = make(), tokens()
    out = model.model(ids)
    assert (out.loop_hidden_states, out.exit_probabilities, out.hidden_states) == (None, None, None)
    assert len(model(ids, output_hidden_states=True).hidden_states) == L + 1
    kept = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(kept, model(ids).logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, model(ids).logits[:, [0, 3]])
    with pytest.raises(TypeError, match="num_lops"):
        model(ids, num_lops=2)


def test_exit_distribution_survives_shut_gates():
    gates = torch.tensor([[800.0, 0.0], [-800.0, -800.0], [0.0, 0.0]], requires_grad=True)
    p = exit_distribution(gates)
    torch.testing.assert_close(p, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.5, 0.25, 0.25]]))
    p[:, 0].sum().backward()
    assert gates.grad.isfinite().all()
    assert exit_distribution(torch.zeros(4, 0)).tolist() == [[1.0]] * 4


def test_loss_is_the_shifted_cross_entropy():
    model, ids = make(), tokens()
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    # transformers computes the loss in float32
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss.double(), wanted, atol=1e-5, rtol=0)


def test_gradients_reach_every_weight():
    model, ids = make(), tokens()
    out = model(ids, output_loops=True)
    per_loop = torch.stack([model.lm_head(h).log_softmax(-1)[..., 5] for h in out.loop_hidden_states], -1)
    (per_loop * out.exit_probabilities).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_cpu_norm_is_torchs_with_the_same_gradient(shape):
    generator = torch.Generator().manual_seed(3)
    norm = LoopedRMSNorm(5, 1e-3).double()
    norm.weight.data = torch.randn(5, generator=generator).double()
    x = torch.randn(shape, generator=generator).double().requires_grad_()
    torch.testing.assert_close(norm(x), F.rms_norm(x, (5,), norm.weight, 1e-3), atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))
    half = norm.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_checkpointing_keeps_the_gradient():
    plain, saved, ids = make(), make(), tokens()
    saved.train()
    enable = getattr(saved, "activation_checkpointing_enable", None) or saved.gradient_checkpointing_enable
    enable()  # older releases of transformers know only the second name
    plain(ids, labels=ids).loss.backward()
    out = saved(ids, labels=ids, use_cache=True)
    assert out.past_key_values is None  # the recomputation would write it twice
    with pytest.raises(UserError, match="checkpointing"):
        saved(ids, past_key_values=DynamicCache())
    out.loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        if "early_exit_gate" not in name:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def greedy(model, row: torch.Tensor, n: int, **kwargs) -> list[int]:
    """The argmax continuation of one row without a cache."""
    for _ in range(n):
        row = torch.cat([row, model(row[None], **kwargs).logits[0, -1:].argmax(-1)])
    return row[-n:].tolist()


@pytest.mark.parametrize("loops", [None, 1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_is_an_argmax_loop(padded, loops):
    model, ids = make(eos_token_id=None), tokens(3)
    lengths = (7, 4, 2) if padded else (7, 7, 7)
    inputs, mask = pad_left(ids, lengths)
    out = model.generate(inputs, attention_mask=mask, max_new_tokens=6, do_sample=False, num_loops=loops)
    with torch.no_grad():
        wanted = [greedy(model, row[:n], 6, num_loops=loops) for row, n in zip(ids, lengths, strict=True)]
    assert out[:, 7:].tolist() == wanted


def test_save_and_load(tmp_path):
    model, ids = make(torch.float32, num_key_value_heads=2), tokens()
    model.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, LoopedConfig)
    ours = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "_name_or_path")}
    assert {k: v for k, v in read.to_dict().items() if k in ours} == ours
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LoopedForCausalLM)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert isinstance(trunk, LoopedModel)
    torch.testing.assert_close(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state, atol=0, rtol=0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(ids, output_loops=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.exit_probabilities.dtype == torch.float32


def test_registration_can_be_repeated():
    register()
    assert isinstance(AutoConfig.for_model("ouro"), LoopedConfig)


def test_parameter_names_are_those_of_the_published_checkpoints():
    layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
    wanted = {f"model.layers.{i}.{name}.weight" for i in range(N) for name in (*layer, *norms)}
    wanted |= {f"{name}.weight" for name in ("model.embed_tokens", "model.norm", "model.early_exit_gate", "lm_head")}
    assert set(make().state_dict()) == wanted | {"model.early_exit_gate.bias"}


def test_a_published_config_is_read():
    published = {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "total_ut_steps": 4,
        "early_exit_threshold": 1.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * 24,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.1",
    }
    read = AutoConfig.for_model("ouro", **published)
    assert read.rope_parameters == {"rope_theta": 1000000.0, "rope_type": "default"}
    assert read.initializer_range == 0.02
    with torch.device("meta"):
        model = LoopedForCausalLM(read)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.43e9, rel=0.01)
    assert len(DynamicCache(config=read).layers) == 24


def test_tied_embeddings():
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert LoopedForCausalLM(config(tie_word_embeddings=True)).lm_head.weight.std() < 0.5


def test_initialisation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LoopedForCausalLM(config(hidden_size=64, intermediate_size=96))
        narrow = LoopedForCausalLM(config(hidden_size=64, initializer_range=0.02))
        fresh = model(tokens(8, 20), labels=tokens(8, 20)).loss.item()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert model.model.early_exit_gate.bias.item() == 0
    assert (model.model.norm.weight == 1).all()
    assert narrow.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert fresh == pytest.approx(math.log(29), abs=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"head_dim": 5}, "even"),
        ({"total_ut_steps": 0}, "total_ut_steps"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(**changes)


def test_forward_errors():
    model, ids = make(), tokens()
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        model()
    for wrong in (-0.1, 1.5, math.nan, "0.5", True):
        with pytest.raises(UserError, match="exit_threshold must be a number from 0 to 1"):
            model(ids, exit_threshold=wrong)
    model.config.early_exit_threshold = 2
    with pytest.raises(UserError, match="exit_threshold must be a number from 0 to 1"):
        model(ids)


# --- adaptive exit --------------------------------------------------------------------------------------


def gated(probability: float, dtype=torch.float64) -> LoopedForCausalLM:
    """A model whose gate stops with this probability after every loop but the last, whatever it sees."""
    model = make(dtype)
    model.model.early_exit_gate.weight.data.zero_()
    model.model.early_exit_gate.bias.data.fill_(math.log(probability / (1 - probability)))
    return model


def leaning(seed=0) -> LoopedForCausalLM:
    """A model whose gate makes tokens exit after different loops."""
    model = make(seed=seed)
    model.model.early_exit_gate.weight.data.normal_(0.0, 1.5, generator=torch.Generator().manual_seed(seed))
    model.model.early_exit_gate.bias.data.zero_()
    return model


def cumulative_exit(p: torch.Tensor, q: float) -> torch.Tensor:
    """The first loop whose cumulative probability is at least q, token by token, from probabilities [B, T, L]."""
    return torch.tensor([[[c >= q for c in t.cumsum(0)[:-1]] + [True] for t in row] for row in p]).int().argmax(-1) + 1


@pytest.mark.parametrize(
    ("gate", "threshold", "loop"),
    [
        # s = 0.4: after one loop 0.4 have stopped, after two 0.4 + 0.6 * 0.4 = 0.64, and three take the rest.
        (0.4, 0.0, 1),
        (0.4, 0.3, 1),
        (0.4, 0.5, 2),
        (0.4, 0.63, 2),
        (0.4, 0.65, 3),
        (0.4, 0.999, 3),
        (0.4, 1.0, 3),
        # s = 0.5: 0.5 and 0.75, both exact in binary, and "at least" includes them.
        (0.5, 0.5, 1),
        (0.5, 0.501, 2),
        (0.5, 0.75, 2),
        (0.5, 0.751, 3),
        # A gate that is nearly shut: 1e-6, then 2e-6 - 1e-12.
        (1e-6, 0.5e-6, 1),
        (1e-6, 1.5e-6, 2),
        (1e-6, 3e-6, 3),
        # One that is nearly open: 0.999, then 1 - 1e-6.
        (0.999, 0.998, 1),
        (0.999, 0.9999, 2),
        (0.999, 0.9999995, 3),
        (0.999, 1.0, 3),
    ],
)
def test_exit_by_hand(gate, threshold, loop):
    model, ids = gated(gate), tokens()
    with torch.no_grad():
        out = model(ids, exit_threshold=threshold, output_loops=True)
    if threshold < 1:
        assert (out.exit_loops == loop).all()
    else:
        assert out.exit_loops is None
    torch.testing.assert_close(out.last_hidden_state, out.loop_hidden_states[loop - 1], atol=0, rtol=0)
    torch.testing.assert_close(out.logits, model.lm_head(out.loop_hidden_states[loop - 1]), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_threshold_of_one_never_exits_early(dtype):
    """Also where the probability of the first loop is 1 in every arithmetic: sigmoid(800) = 1."""
    model, ids = gated(0.5, dtype), tokens()
    model.model.early_exit_gate.bias.data.fill_(800.0)
    with torch.no_grad():
        out = model(ids, output_loops=True)
        assert (out.exit_probabilities[..., 0] == 1).all()
        last = model.lm_head(out.loop_hidden_states[-1])
        for threshold in (None, 1, 1.0):
            torch.testing.assert_close(model(ids, exit_threshold=threshold).logits, last, atol=0, rtol=0)
        early = model(ids, exit_threshold=math.nextafter(1, 0))
        assert (early.exit_loops == 1).all()
        assert not torch.allclose(early.logits, last, atol=1e-2)
    assert exit_loops(torch.full((2, 5, 3), 800.0, dtype=dtype), 1.0).tolist() == [[4] * 5] * 2


def test_a_threshold_near_one_is_not_rounded():
    """sigmoid(16.6) = 1 - 6.2e-8 is 1 - 2^-24 in float32; one minus it is compared, which keeps its digits."""
    gates = torch.tensor([16.6, 25.0])
    assert exit_loops(gates, 1 - 1e-7).item() == 1
    assert exit_loops(gates, 1 - 1e-8).item() == 2  # 1 - 6.2e-8 * 1.4e-11
    assert exit_loops(gates, 1 - 1e-16).item() == 2
    assert exit_loops(torch.tensor([25.0, -25.0]), 1 - 1e-11).item() == 3  # 1 - 1.4e-11 after one loop and after two


@pytest.mark.parametrize("threshold", [0.05, 0.35, 0.6, 0.9])
def test_each_token_has_the_logits_of_its_own_loop(threshold):
    model, ids = leaning(), tokens(4)
    with torch.no_grad():
        out = model(ids, exit_threshold=threshold, output_loops=True)
    wanted = cumulative_exit(out.exit_probabilities, threshold)
    assert out.exit_loops.tolist() == wanted.tolist()
    assert len(wanted.unique()) > 1
    for row, position in torch.cartesian_prod(torch.arange(4), torch.arange(7)).tolist():
        state = out.loop_hidden_states[wanted[row, position] - 1][row, position]
        torch.testing.assert_close(out.logits[row, position], model.lm_head(state), atol=1e-12, rtol=0)
    kept = model(ids, exit_threshold=threshold, logits_to_keep=2).logits
    torch.testing.assert_close(kept, out.logits[:, -2:], atol=1e-12, rtol=0)


@given(
    gates=st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=4),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
)
def test_a_higher_threshold_never_exits_earlier(gates, low, high):
    low, high = sorted((low, high))
    early, late = (exit_loops(torch.tensor(gates), q) for q in (low, high))
    assert (early <= late).all()
    assert (early >= 1).all()
    assert (late <= 4).all()
    assert (exit_loops(torch.tensor(gates), 0.0) == 1).all()


def test_exit_after_the_first_loop_is_one_loop():
    """Loop 1 attends to the keys of loop 1 alone, so nothing of the later loops can come in, with a cache too."""
    model, ids = leaning(), tokens()
    with torch.no_grad():
        one = model(ids, num_loops=1).logits
        torch.testing.assert_close(model(ids, exit_threshold=0.0).logits, one, atol=0, rtol=0)
        cache, pieces = DynamicCache(), ids.split((4, 1, 2), dim=1)
        parts = [model(piece, past_key_values=cache, exit_threshold=0.0).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, 1), one, atol=1e-12, rtol=0)
    assert {cache.get_seq_length(slot) for slot in range(N * L)} == {7}  # all loops ran: their keys are there


@pytest.mark.parametrize("loops", [None, 2])
def test_the_last_loop_that_is_run_takes_the_rest(loops):
    model, ids = gated(0.4), tokens()
    with torch.no_grad():
        out = model(ids, exit_threshold=0.9, num_loops=loops)
        torch.testing.assert_close(out.logits, model(ids, num_loops=loops).logits, atol=0, rtol=0)
    assert (out.exit_loops == (loops or L)).all()
    assert (model(ids, exit_threshold=0.2, num_loops=1).exit_loops == 1).all()


def test_the_configs_threshold_holds_in_evaluation_mode_alone():
    model, ids = gated(0.4), tokens()
    with torch.no_grad():
        states = model(ids, output_loops=True).loop_hidden_states
        model.config.early_exit_threshold = 0.5  # loop 2, see above
        torch.testing.assert_close(model(ids).logits, model.lm_head(states[1]), atol=0, rtol=0)
        torch.testing.assert_close(model(ids, exit_threshold=0.3).logits, model.lm_head(states[0]), atol=0, rtol=0)
        torch.testing.assert_close(model(ids, exit_threshold=1.0).logits, model.lm_head(states[2]), atol=0, rtol=0)
        # What the learner scores: the trunk, which knows no threshold of the config.
        torch.testing.assert_close(model.model(ids).last_hidden_state, states[2], atol=0, rtol=0)
        model.train()
        torch.testing.assert_close(model(ids).logits, model.lm_head(states[2]), atol=0, rtol=0)
        torch.testing.assert_close(model(ids, exit_threshold=0.3).logits, model.lm_head(states[0]), atol=0, rtol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.35, 0.6])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_adaptive_exit(padded, threshold):
    """With a cache as without one: the keys of the loops behind an exit are there for later tokens."""
    model, ids = leaning(1), tokens(3)
    model.generation_config.eos_token_id = None
    lengths = (7, 4, 2) if padded else (7, 7, 7)
    inputs, mask = pad_left(ids, lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    out = model.generate(inputs, exit_threshold=threshold, **settings)
    with torch.no_grad():
        wanted = [greedy(model, row[:n], 6, exit_threshold=threshold) for row, n in zip(ids, lengths, strict=True)]
    assert out[:, 7:].tolist() == wanted
    model.config.early_exit_threshold = threshold
    assert model.generate(inputs, **settings)[:, 7:].tolist() == wanted
