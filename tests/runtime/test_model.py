"""The transformer computes what transformers' Llama computes, in whatever pieces it is fed."""

import pytest
import torch
from agreement import CASES, compare
from msgspec.structs import replace
from tiny import NATIVE, native_kernels, prefilled, random_prompt, tiny_checkpoint, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from planner.runtime import kernels
from planner.runtime.model import Transformer, build_model, prefill
from planner.runtime.rope import inverse_frequency
from planner.runtime.weights import default_model_path, load_checkpoint
from planner.specs import ModelSpec

CPU = torch.device("cpu")
SHAPES = {
    "no groups": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "groups of 2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "groups of 4": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64},
    "one kv head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "narrow heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 2},
    "rope theta 5e5": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "one layer, loose norm": {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-2},
}


def reference(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "vocab_size": 97,
        "num_hidden_layers": 3,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | {"tie_word_embeddings": False, "initializer_range": 0.25} | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model


def ours(folder) -> Transformer:
    return build_model(load_checkpoint(folder, torch.float32, CPU))


@torch.inference_mode()
def one_pass(model: Transformer, tokens: torch.Tensor, taps=()):
    cache = model.new_cache(tokens.shape[1], batch=len(tokens))
    output = model(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), cache, cache.causal_mask(tokens.shape[1]), taps)
    return model.logits(output.hidden), output.taps


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_residual_stream_are_those_of_transformers(shape, tmp_path):
    theirs = reference(**shape)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens, output_hidden_states=True)
    model = ours(tmp_path)
    logits, taps = one_pass(model, tokens, taps=range(model.spec.num_layers))
    assert expected.logits.abs().max() > 1  # not a comparison of zeros
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-5)
    for layer in range(model.spec.num_layers - 1):  # transformers reports the last one behind the final norm
        torch.testing.assert_close(taps[layer], expected.hidden_states[layer + 1], atol=1e-4, rtol=1e-5)
    last = torch.nn.functional.rms_norm(taps[model.spec.num_layers - 1], model.norm.shape, model.norm, model.spec.rms_norm_eps)
    torch.testing.assert_close(last, expected.hidden_states[-1], atol=1e-4, rtol=1e-5)
    assert model.nbytes == 4 * model.spec.num_parameters == sum(p.nbytes for p in theirs.parameters())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_and_rope_scaling_agrees_with_transformers(case, tmp_path):
    found = compare(case, tmp_path)
    assert found.largest_logit > 1
    assert max(found.one_pass, found.chunks, found.single_tokens) < 1e-4
    assert found.same_greedy_tokens


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.variant in ("linear", "llama3", "yarn", "dynamic, beyond it")], ids=lambda case: case.name
)
def test_leaving_the_scaling_out_would_be_noticed(case, tmp_path, monkeypatch):
    monkeypatch.setattr("planner.runtime.model.inverse_frequency", lambda spec, device: inverse_frequency(replace(spec, rope_scaling=None), device))
    assert compare(case, tmp_path).one_pass > 0.01


@pytest.mark.parametrize("part", ["bias", "q_norm.weight", "k_norm.weight"])
def test_biases_and_norms_of_heads_matter(part, tmp_path):
    """Each is in the comparison with transformers: without it the logits are others."""
    checkpoint = tiny_checkpoint(architecture="qwen2" if part == "bias" else "qwen3")
    tokens = torch.tensor([random_prompt(30)])
    neutral = {name: torch.full_like(tensor, "norm" in part) for name, tensor in checkpoint.tensors.items() if name.endswith(part)}
    assert neutral
    expected, _ = one_pass(build_model(checkpoint), tokens)
    without, _ = one_pass(build_model(checkpoint._replace(tensors=checkpoint.tensors | neutral)), tokens)
    assert (without - expected).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
@torch.inference_mode()
def test_cheaper_copies_and_compiled_kernels_keep_biases_and_norms(architecture, weights):
    shape = NATIVE | {"architecture": architecture}
    original, compiled = tiny_model(**shape), tiny_model(kernels=native_kernels(torch.float32), **shape)
    copies = [model.cheaper(weights) for model in (original, compiled)]
    for ours, theirs in zip(copies[0].layers, original.layers):
        for part in ("qkv_bias", "q_norm", "k_norm"):
            assert getattr(ours, part) is getattr(theirs, part)
    tokens = torch.tensor([random_prompt(70, seed=s) for s in range(2)])
    for n in (1, 8, 40):  # of which others than these models would run the first two in a single call
        behind = []
        for model in copies:
            cache = model.new_cache(70, batch=2)
            prefill(model, tokens[:, :-n], cache)
            behind.append(model(tokens[:, -n:], torch.arange(70 - n, 70).expand(2, -1), cache).hidden)
        torch.testing.assert_close(behind[1], behind[0], atol=2e-3, rtol=1e-3)


def test_a_wrong_rope_theta_is_caught(tmp_path):
    theirs = reference(**SHAPES["rope theta 5e5"])
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(97, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens).logits
    checkpoint = load_checkpoint(tmp_path, torch.float32, CPU, rope_theta=1e4)
    assert (one_pass(build_model(checkpoint), tokens)[0] - expected).abs().max() > 0.01


@pytest.mark.model
def test_the_default_model_computes_what_transformers_does_with_its_weights():
    """Its published shape, real text, and a loss that only unscrambled weights give.

    Read by AutoModelForCausalLM from the GGUF itself, which takes 36 s, the 300 x 49,152 logits were the same to the
    last bit (largest 38.3), with torch 2.13 and transformers 5.23; test_weights.py compares the two readers on a small file.
    """
    from pydoc_data.topics import topics

    from planner.runtime.tokenizer import load_tokenizer

    path = default_model_path()
    tokens = torch.tensor([load_tokenizer(path).encode(topics["class"])[:300]])
    checkpoint = load_checkpoint(path, torch.float32, CPU)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, vocab_size=49152, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(checkpoint.tensors, assign=True, strict=False)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # a buffer that the weights do not hold
    with torch.inference_mode():
        expected = theirs(tokens).logits
    logits, _ = one_pass(build_model(checkpoint), tokens)
    assert tokens.shape == (1, 300)
    assert expected.abs().max() > 10
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert loss < 3.5  # nats per token; ln(49152) = 10.8 is chance


# ---- in pieces


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=2)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_equals_one_pass(model, chunk):
    tokens = torch.tensor([random_prompt(130, seed=s) for s in range(2)])
    whole, pieces = (model.new_cache(130, batch=2) for _ in range(2))
    expected = prefill(model, tokens, whole, chunk=130)
    torch.testing.assert_close(prefill(model, tokens, pieces, chunk=chunk), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(pieces.keys, whole.keys, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(pieces.values, whole.values, atol=1e-4, rtol=1e-5)
    assert pieces.lengths == [130, 130]
    torch.testing.assert_close(expected, one_pass(model, tokens)[0][:, -1], atol=1e-4, rtol=1e-5)


def test_prefill_goes_on_behind_what_the_cache_holds(model):
    tokens = torch.tensor([random_prompt(50)])
    cache = model.new_cache(50)
    prefill(model, tokens[:, :30], cache)
    torch.testing.assert_close(prefill(model, tokens[:, 30:], cache), one_pass(model, tokens)[0][:, -1], atol=1e-4, rtol=1e-5)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        prefill(model, torch.zeros(1, 0, dtype=torch.long), model.new_cache(10))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4}, {"num_heads": 1, "num_kv_heads": 1}], ids=str)
def test_one_pass_over_n_tokens_equals_n_passes_over_one(changes, batch):
    model = tiny_model(**changes)
    tokens = torch.tensor([random_prompt(40, seed=s) for s in range(batch)])
    expected, _ = one_pass(model, tokens)
    cache = model.new_cache(40, batch=batch)
    with torch.inference_mode():
        for i in range(40):
            hidden = model(tokens[:, i : i + 1], torch.full((batch, 1), i), cache, cache.causal_mask(1)).hidden
            cache.commit([1] * batch)
            torch.testing.assert_close(model.logits(hidden)[:, 0], expected[:, i], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
def test_streams_of_different_lengths_equal_each_alone(model, n):
    prompts = [random_prompt(length, seed=length) for length in (37, 5, 90)]
    new = torch.tensor([random_prompt(12, seed=s)[:n] for s in range(3)])

    @torch.inference_mode()
    def follow(streams):
        cache, _ = prefilled(model, [prompts[b] for b in streams], 100)
        positions = torch.tensor(cache.lengths)[:, None] + torch.arange(n)
        output = model(new[streams], positions, cache, cache.causal_mask(n), taps=(0,))
        return model.logits(output.hidden), output.taps[0]

    logits, tap = follow([0, 1, 2])
    for b in range(3):
        alone, alone_tap = follow([b])
        torch.testing.assert_close(logits[b : b + 1], alone, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(tap[b : b + 1], alone_tap, atol=1e-4, rtol=1e-5)


def test_only_asked_layers_are_tapped(model):
    assert set(one_pass(model, torch.tensor([[1, 2, 3]]), taps=(1,))[1]) == {1}


def test_positions_far_apart_from_zero_only_turn_keys_and_queries_together(model):
    """Rotary embedding is relative: shifting all positions changes nothing."""
    tokens = torch.tensor([random_prompt(30)])

    @torch.inference_mode()
    def at(shift):
        cache = model.new_cache(30)
        return model(tokens, shift + torch.arange(30)[None], cache, cache.causal_mask(30)).hidden

    torch.testing.assert_close(at(1000), at(0), atol=2e-3, rtol=1e-3)


def test_attention_does_not_care_how_the_kernel_lays_its_output_out(model, monkeypatch):
    """CUDA's memory-efficient kernel returns [B, rows, heads, D] seen as [B, heads, rows, D]; the CPU's happens to be contiguous."""
    tokens = torch.tensor([random_prompt(30)])
    expected, _ = one_pass(model, tokens)
    attention = torch.nn.functional.scaled_dot_product_attention

    def as_cuda_lays_out(*args, **options):
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_cuda_lays_out)
    torch.testing.assert_close(one_pass(model, tokens)[0], expected)


def test_bfloat16_weights_keep_positions_in_float32():
    spec = tiny_model().spec
    assert isinstance(spec, ModelSpec)
    narrow = tiny_model()
    wide_frequency = narrow.inverse_frequency.clone()
    assert narrow.to(torch.bfloat16).inverse_frequency.dtype == torch.float32
    assert torch.equal(narrow.inverse_frequency, wide_frequency)


@pytest.mark.parametrize("end", [5, 17, 40])
def test_queries_of_committed_tokens_are_those_of_the_pass_that_read_them(end, monkeypatch):
    model = tiny_model(seed=3)
    tokens = torch.tensor(random_prompt(40, seed=1))
    seen = []
    attention = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda q, *rest: (seen.append(q), attention(q, *rest))[1])
    cache, _ = prefilled(model, [tokens.tolist()], 40)
    before = cache.keys.clone()
    passes = [torch.cat(seen[layer :: model.spec.num_layers], 2) for layer in range(model.spec.num_layers)]  # prefill went in chunks
    found = model.queries(tokens[end - 5 : end], end, cache)
    assert found.shape == (2, 2, 2, 5, 8)  # layers, KV heads, query heads of each, tokens, head_dim
    for layer in range(2):
        torch.testing.assert_close(found[layer].flatten(0, 1), passes[layer][0, :, end - 5 : end], atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.keys, before) and cache.lengths == [40]
