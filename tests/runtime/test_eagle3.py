"""EAGLE-3 heads: what is read from a published folder, what the head computes, where its hidden states come from, what it holds.

That its output is lossless and its replay true is tested with the other drafters, in test_decode.py and test_replay.py.
"""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny import HEAD, head_files, native_kernels, prefilled, random_prompt, tiny_model, with_head, write_head

from planner.cost.memory import features_bytes, full_cache_bytes
from planner.errors import BadInput
from planner.profiler.latency import Ground, side_by_side
from planner.profiler.texts import Prompt
from planner.profiler.trial import run_trials
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.eagle_head import load_head
from planner.runtime.kernels import Kernels
from planner.runtime.linear import ReducedHead
from planner.runtime.model import prefill
from planner.specs import DraftConfig, DrafterSpec, Sampler

K = 4
EAGLE3 = DraftConfig(drafter=HEAD, draft_len=K)
SOFT = Sampler(temperature=1.0)
IDS = (2, 3, 4)  # of layers entered: the outputs of 1, 2 and 3


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=5, sharpness=1.1, num_layers=4)


@pytest.fixture
def model(tmp_path):
    return with_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", ids=IDS)


# ---- what the head computes


class Reference:
    """The equations of the paper, in float64 and one entry after the other: no cache, no chunks, no batch."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], embedding: torch.Tensor, vocab_size: int):
        self.config, self.embedding, self.vocab_size = config, embedding.double(), vocab_size
        self.w = {name.removeprefix("midlayer."): tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.target_ids = [draft_id + int(offset) for draft_id, offset in enumerate(tensors["d2t"])]

    def norm(self, x, name):
        return x / (x.square().mean() + self.config["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    def rotated(self, x, position):
        D = len(x)
        out = torch.empty_like(x)
        for i in range(D // 2):
            angle = torch.tensor(position * self.config.get("rope_theta", 10000.0) ** (-2 * i / D), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + D // 2] * angle.sin()
            out[i + D // 2] = x[i + D // 2] * angle.cos() + x[i] * angle.sin()
        return out

    def entry(self, token: int, g: torch.Tensor, seen: list) -> torch.Tensor:
        """h of the next entry; `seen` are keys and values of those before it, and gets its own."""
        H, G, D = (self.config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        x = torch.cat([self.norm(self.embedding[token], "input_layernorm"), self.norm(g, "hidden_norm")])
        q, k, v = (
            (self.w[f"self_attn.{name}_proj.weight"] @ x).view(heads, D) for name, heads in (("q", H), ("k", G), ("v", G))
        )  # fmt: skip
        position = len(seen)
        seen.append((torch.stack([self.rotated(key, position) for key in k]), v))
        heads = []
        for h in range(H):
            query, group = self.rotated(q[h], position), h // (H // G)
            weights = torch.stack([query @ keys[group] / math.sqrt(D) for keys, _ in seen]).softmax(0)
            heads.append(sum(weight * values[group] for weight, (_, values) in zip(weights, seen)))
        x = g + self.w["self_attn.o_proj.weight"] @ torch.cat(heads)
        normed = self.norm(x, "post_attention_layernorm")
        gate = self.w["mlp.gate_proj.weight"] @ normed
        return x + self.w["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * (self.w["mlp.up_proj.weight"] @ normed))

    def distribution(self, h: torch.Tensor) -> torch.Tensor:
        probs = torch.zeros(self.vocab_size, dtype=torch.float64)
        probs[self.target_ids] = (self.w["lm_head.weight"] @ self.norm(h, "norm")).softmax(0)
        return probs

    def chain(self, history: list[int], features: torch.Tensor, drafts: list[int]) -> torch.Tensor:
        """Distributions of a round behind a history whose last token the target has not seen: features [len(history) - 1, ..]."""
        seen = []
        for t, token in enumerate(history[1:]):
            h = self.entry(token, self.w["fc.weight"] @ features[t].double(), seen)
        found = [self.distribution(h)]
        for token in drafts[:-1]:
            h = self.entry(token, h, seen)
            found.append(self.distribution(h))
        return torch.stack(found)


def one_shot_features(model, tokens: list[int], layers) -> torch.Tensor:
    """Hidden states of the target from a pass over everything at once: [tokens, layers * C]."""
    with torch.inference_mode():
        taps = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], model.new_cache(len(tokens)), taps=layers).taps
    return torch.cat([taps[layer][0] for layer in layers], -1)


@torch.inference_mode()
def rounds_against_the_reference(model, reference, layers, prompt, counts, atol=2e-4):
    """Drafts round after round, of which `counts` tokens are committed, whatever the target thinks of them."""
    cache, _ = prefilled(model, [prompt], 120)
    drafter = make_drafter(EAGLE3, model)
    drafter.start(cache, [prompt])
    history, generator = [*prompt, 7], [torch.Generator().manual_seed(0)]
    for count in counts:
        draft = drafter.propose([history], [K], SOFT, generator)
        features = one_shot_features(model, history[:-1], layers)
        expected = reference.chain(history, features, draft.tokens[0].tolist())
        assert draft.probs.dtype == torch.float32
        torch.testing.assert_close(draft.probs[0].double(), expected, atol=atol, rtol=0)
        verified = torch.tensor([[history[-1], *draft.tokens[0].tolist()]])
        model(verified, torch.arange(len(history) - 1, len(history) + K)[None], cache, taps=drafter.taps)
        cache.commit([count])
        history += [*draft.tokens[0].tolist(), 9][:count]
        drafter.commit(cache, [history], [count])


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 50.0}], ids=str)
@pytest.mark.parametrize("prompt", [[5], [5, 9], random_prompt(13)], ids=len)
def test_a_head_drafts_by_the_equations_of_its_paper(target, tmp_path, prompt, changes):
    model = with_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", ids=IDS, **changes)
    reference = Reference(*head_files(target, ids=IDS, **changes), target.embedding, 61)
    rounds_against_the_reference(model, reference, (1, 2, 3), prompt, counts=[1, 5, 3, 1])


def test_the_comparison_would_see_layers_in_another_order_and_positions_off_by_one(model, target, monkeypatch):
    reference = Reference(*head_files(target, ids=IDS), target.embedding, 61)
    with pytest.raises(AssertionError):
        rounds_against_the_reference(model, reference, (3, 2, 1), random_prompt(19), counts=[1])
    rotated = reference.rotated
    monkeypatch.setattr(reference, "rotated", lambda x, position: rotated(x, position) if position < 19 else rotated(x, position + 1))
    with pytest.raises(AssertionError):
        rounds_against_the_reference(model, reference, (1, 2, 3), random_prompt(19), counts=[1])


def test_a_head_of_native_kernels_drafts_by_the_same_equations(tmp_path):
    shape = {"head_dim": 64, "hidden_size": 64, "intermediate_size": 96, "num_layers": 4}
    model = with_head(tiny_model(seed=5, kernels=native_kernels(torch.float32), **shape), tmp_path / "head", ids=IDS)
    reference = Reference(*head_files(tiny_model(seed=5, **shape), ids=IDS), model.embedding, 61)
    rounds_against_the_reference(model, reference, (1, 2, 3), random_prompt(12), counts=[2, 1])


def test_a_prompt_read_in_chunks_gives_the_same_drafts(model, target, monkeypatch):
    monkeypatch.setattr("planner.runtime.drafters.eagle3.PREFILL_CHUNK", 5)
    reference = Reference(*head_files(target, ids=IDS), target.embedding, 61)
    rounds_against_the_reference(model, reference, (1, 2, 3), random_prompt(19), counts=[1, 3])


def test_drafts_end_with_their_round(model):
    """Only the entries of committed tokens stay; and no token is drafted that the head does not know."""
    prompt = random_prompt(20)
    cache, _ = prefilled(model, [prompt], 60)
    drafter = make_drafter(EAGLE3, model)
    drafter.start(cache, [prompt])
    with torch.inference_mode():
        draft = drafter.propose([[*prompt, 5]], [K], SOFT, [torch.Generator().manual_seed(0)])
    assert drafter.cache.lengths == [20]
    unknown = torch.ones(61, dtype=torch.bool).index_fill_(0, model.beside[HEAD.path, HEAD.dtype].head.tokens, False)
    assert unknown.sum() == 61 - 45 and (draft.probs[..., unknown] == 0).all()


# ---- where its hidden states come from


def decoded(model, prompts, config, sampler=SOFT, new_tokens=20):
    cache, logits = prefilled(model, prompts, cache_capacity(max(map(len, prompts)), new_tokens, K))
    drafter = make_drafter(config, model, batch=len(prompts))
    generators = [torch.Generator().manual_seed(b) for b in range(len(prompts))]
    rounds = list(
        decode(model, cache, prompts, logits, drafter, draft_len=K, sampler=sampler, generators=generators, max_new_tokens=new_tokens)
    )  # fmt: skip
    return cache, drafter, [prompt + [t for r in rounds for t in r.tokens[b]] for b, prompt in enumerate(prompts)], rounds


def test_the_cache_keeps_what_one_pass_over_everything_would_tap(model):
    prompts = [random_prompt(length, seed=length) for length in (30, 7, 21)]
    cache, _, texts, rounds = decoded(model, prompts, EAGLE3)
    assert {n for r in rounds for n in r.accepted} > {0, 1}
    for b, text in enumerate(texts):
        length = cache.lengths[b]
        assert length == len(text) - 1
        torch.testing.assert_close(cache.features[b, :length].flatten(1), one_shot_features(model, text[:length], (1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_streams_of_different_lengths_sample_as_they_do_alone(model):
    prompts = [random_prompt(length, seed=length) for length in (30, 7, 21)]
    together = decoded(model, prompts, EAGLE3)[2]
    assert together[0] == decoded(model, prompts[:1], EAGLE3)[2][0]


def test_two_heads_on_different_layers_read_one_cache(model, tmp_path):
    """The cache keeps the layers of both, and each finds its own in its own order."""
    alone = decoded(model, [random_prompt(20)], EAGLE3)[2]
    other = write_head(tmp_path / "other", *head_files(model, seed=1, ids=(4, 2)))
    model.beside["other", None] = load_head(other, model, model.dtype)
    model.beside["first", None] = load_head(write_head(tmp_path / "first", *head_files(model, ids=(2,))), model, model.dtype)
    assert model.taps == (1, 2, 3)
    assert decoded(model, [random_prompt(20)], EAGLE3)[2] == alone
    reference = Reference(*head_files(model, seed=1, ids=(4, 2)), model.embedding, 61)
    model.beside[HEAD.path, HEAD.dtype] = model.beside["other", None]
    rounds_against_the_reference(model, reference, (3, 1), random_prompt(12), counts=[1, 2])


def test_plain_decoding_beside_a_head_taps_nothing(model):
    tapped = []

    class Watching(Kernels):
        def run(self, layers, norm, eps, x, rotation, cache, mask, taps):
            tapped.append(tuple(taps))
            return super().run(layers, norm, eps, x, rotation, cache, mask, taps)

    prompt = random_prompt(20)
    cache, logits = prefilled(model, [prompt], 60)
    model.kernels = Watching()
    drafter = NoDrafter(61, model.device)
    list(decode(model, cache, [prompt], logits, drafter, draft_len=0, sampler=SOFT, generators=[torch.Generator()], max_new_tokens=5))
    assert set(tapped) == {()}
    tapped.clear()
    prefill(model, torch.tensor([prompt]), model.new_cache(30))
    assert tapped == [(1, 2, 3)]


def test_a_cache_made_before_the_head_was_loaded_is_refused(model):
    head = model.beside.pop((HEAD.path, HEAD.dtype))
    cache, _ = prefilled(model, [[1, 2, 3]], 10)
    assert cache.features.nbytes == 0
    model.beside[HEAD.path, HEAD.dtype] = head
    with pytest.raises(ValueError, match="must keep the output of layers"):
        make_drafter(EAGLE3, model).start(cache, [[1, 2, 3]])


def test_a_prompt_copied_into_a_batch_drafts_as_it_does_alone(model):
    """As rounds are timed: what the copies lack, only acceptance would tell."""
    prompt = random_prompt(20)
    cache, logits = prefilled(model, [prompt], 60)
    drafts = []
    for batch in (1, 3):
        ground = side_by_side(model, Ground(prompt, cache, logits), batch)
        drafter = make_drafter(EAGLE3, model, batch=batch)
        drafter.start(ground.cache, [prompt] * batch)
        with torch.inference_mode():
            generators = [torch.Generator().manual_seed(0) for _ in range(batch)]
            drafts.append(drafter.propose([[*prompt, 5]] * batch, [K] * batch, SOFT, generators))
    torch.testing.assert_close(drafts[1].probs, drafts[0].probs.expand(3, -1, -1), atol=1e-5, rtol=0)


# ---- what it holds


@pytest.mark.parametrize("own_embedding", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_that_the_planner_predicts(tmp_path, dtype, own_embedding):
    model = tiny_model(num_layers=4)
    config, tensors = head_files(model, ids=IDS)
    if own_embedding:
        tensors["embed_tokens.weight"] = torch.randn(61, 32)
    head = load_head(write_head(tmp_path / "head", config, tensors), model, getattr(torch, dtype))
    drafter_spec = DrafterSpec(kind="eagle3", path="head", dtype=dtype)
    model.beside["head", dtype] = head
    floats = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert model.extra_nbytes(head) == floats * size + 8 * 45  # and the ids of the tokens it knows
    cache, drafter, _, _ = decoded(model, [random_prompt(9), random_prompt(30)], DraftConfig(drafter=drafter_spec, draft_len=K))
    predicted = full_cache_bytes(model.spec, "float32", capacity=54, batch=2)
    predicted += features_bytes(model.spec, "float32", len(head.taps), capacity=54, batch=2)
    predicted += full_cache_bytes(head.spec, dtype, capacity=54, batch=2) + model.extra_nbytes(head)
    assert cache.nbytes + drafter.nbytes == predicted
    assert cache.features.nbytes == 2 * 54 * 3 * 32 * 4


def test_a_trial_counts_the_bytes_that_the_planner_predicts(model):
    prompts = [Prompt("kind", "source", i, 20, random_prompt(20, seed=i)) for i in range(2)]
    trials = list(run_trials(model, prompts, [EAGLE3], SOFT, output_len=10, stop_tokens=(), seed=0, batch=2))
    head = model.beside[HEAD.path, HEAD.dtype]
    capacity = cache_capacity(20, 10, K)
    own = features_bytes(model.spec, "float32", len(head.taps), capacity=capacity, batch=2)
    own += full_cache_bytes(head.spec, "float32", capacity=capacity, batch=2) + model.extra_nbytes(head)
    assert {trial.cache_bytes for trial in trials} == {own + full_cache_bytes(model.spec, "float32", capacity=capacity, batch=2)}


def test_greedy_output_is_plain_greedy_output_with_a_head_of_another_dtype_beside_a_quantised_target(tmp_path):
    model = tiny_model(seed=5, sharpness=1.1, num_layers=4).cheaper("int8")
    folder = write_head(tmp_path / "head", *head_files(model, ids=IDS))
    model.beside[HEAD.path, HEAD.dtype] = load_head(folder, model, torch.bfloat16)
    prompts = [random_prompt(length, seed=length) for length in (9, 30)]
    plain = decoded(model, prompts, DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=1), Sampler())[2]
    assert decoded(model, prompts, EAGLE3, Sampler())[2] == plain


# ---- what is read


def test_published_spellings_give_the_same_head(target, tmp_path):
    config, tensors = head_files(target, ids=IDS)
    expected = load_head(write_head(tmp_path / "midlayer", config, tensors), target, torch.float32).state_dict()

    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items() if name != "t2d"}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    half = {name: tensor.to(torch.int32) if name == "d2t" else tensor for name, tensor in tensors.items()}
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    folders = [write_head(tmp_path / "layers", config, renamed), write_head(tmp_path / "int32", config, half), sharded]
    for folder in folders:
        head = load_head(folder, target, torch.float32)
        assert head.taps == (1, 2, 3)
        assert head.state_dict().keys() == expected.keys()
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, expected[name]), (folder, name)


@pytest.mark.parametrize("d2t", [None, torch.zeros(61, dtype=torch.long)])
def test_a_head_that_knows_every_token_needs_no_map(target, tmp_path, d2t):
    config, tensors = head_files(target, ids=IDS, known=61)
    del tensors["d2t"]
    config.pop("draft_vocab_size")
    tensors |= {} if d2t is None else {"d2t": d2t}
    head = load_head(write_head(tmp_path / "head", config, tensors), target, torch.float32)
    assert not isinstance(head.head, ReducedHead) and head.head.shape == (61, 32)


NESTED, FLAT = "eagle_config", "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("changes", "num_taps", "taps"),
    [
        ({NESTED: None}, 3, (1, 3, 4)),  # what enters 2, 4 and 5 of eight
        ({NESTED: {FLAT: [1, 3, 4]}}, 3, (1, 3, 4)),  # what leaves them
        ({NESTED: None, FLAT: [2, 4, 5]}, 3, (1, 3, 4)),
        ({NESTED: None, FLAT: [3, 8]}, 2, (2, 7)),
        ({NESTED: {FLAT: [5, 6]}, FLAT: None}, 2, (4, 5)),
    ],
)
def test_layers_are_those_of_the_config_or_of_the_reference(tmp_path, changes, num_taps, taps):
    model = tiny_model(num_layers=8)
    config, tensors = head_files(model, ids=tuple(range(num_taps)))
    assert load_head(write_head(tmp_path / "head", config | changes, tensors), model, torch.float32).taps == taps


def without(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, tensor):
    return lambda config, tensors: tensors.update({name: tensor})


def setting(**changes):
    return lambda config, tensors: config.update(changes)


OFFSETS = torch.zeros(45, dtype=torch.long)
REFUSALS = {
    "tensor midlayer.hidden_norm.weight is missing": without("midlayer.hidden_norm.weight"),
    "tensor d2t is missing": without("d2t"),
    r"tensor fc.weight must have shape \[32, 96\]": put("fc.weight", torch.zeros(32, 64)),
    r"tensor midlayer.self_attn.q_proj.weight must have shape \[32, 64\]": put("midlayer.self_attn.q_proj.weight", torch.zeros(32, 32)),
    r"tensor lm_head.weight must have shape \[44, 32\]": setting(draft_vocab_size=44),
    r"d2t must be one of I64, I32, got F32": put("d2t", torch.zeros(45)),
    "norm.weight must be one of F32, F16, BF16, got I64": put("norm.weight", torch.ones(32, dtype=torch.long)),
    "norm.weight holds values that are not finite": put("norm.weight", torch.full((32,), torch.nan)),
    "tensor 'midlayer.hidden_norm.weight' is also 'layers.0.hidden_norm.weight'": put("layers.0.hidden_norm.weight", torch.ones(32)),
    "tensor 'fc.bias' is not part of an EAGLE-3 head": put("fc.bias", torch.zeros(32)),
    "d2t must lead to ids from 0 to 60, got 0 to 71": put("d2t", OFFSETS.index_fill(0, torch.tensor([44]), 27)),
    "d2t must lead to ids from 0 to 60, got -1 to 44": put("d2t", OFFSETS.index_fill(0, torch.tensor([0]), -1)),
    "d2t must lead to different ids, got 1 twice": put("d2t", OFFSETS.index_fill(0, torch.tensor([3]), 1)),
    "vocab_size must be the target's, 61, got 64": setting(vocab_size=64),
    "draft_vocab_size must be at most vocab_size": setting(draft_vocab_size=62),
    "hidden_size must be the hidden_size of the target, 32, got 64": setting(hidden_size=64),
    "target_hidden_size must be the hidden_size of the target": setting(target_hidden_size=48),
    "embed_tokens.weight must be there": setting(hidden_size=16, target_hidden_size=32),
    "architectures must be one of": setting(architectures=["LlamaForCausalLM"]),
    "num_hidden_layers must be 1": setting(num_hidden_layers=2),
    "norm_before_residual must be False": setting(norm_before_residual=True),
    "eagle_config.norm_before_fc must be False": setting(eagle_config={"norm_before_fc": True}),
    "eagle_config.use_aux_hidden_state must be True": setting(eagle_config={"use_aux_hidden_state": False}),
    "eagle_config must be an object": setting(eagle_config=[1]),
    "must be different layers of the target, which has 4, got \\[2, 2, 1\\]": setting(eagle_config=None),
    "must be different layers of the target, which has 4, got \\[2, 3, 5\\]": setting(eagle_aux_hidden_state_layer_ids=[2, 3, 5]),
    "must be different layers of the target, which has 4, got \\[0, 2, 3\\]": setting(eagle_aux_hidden_state_layer_ids=[0, 2, 3]),
    "eagle_aux_hidden_state_layer_ids must be a list of 1 to 16 integers": setting(eagle_aux_hidden_state_layer_ids=[2, True, 3]),
    "tie_word_embeddings must be False": setting(tie_word_embeddings=True),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_head_that_does_not_fit_is_refused(target, tmp_path, message):
    config, tensors = head_files(target, ids=IDS)
    REFUSALS[message](config, tensors)
    with pytest.raises(BadInput, match=message) as refused:
        load_head(write_head(tmp_path / "head", config, tensors), target, torch.float32)
    assert "\n" not in str(refused.value)


def test_a_permuted_map_of_all_tokens_is_refused(target, tmp_path):
    config, tensors = head_files(target, ids=IDS, known=61)
    tensors["d2t"][:2] = torch.tensor([1, -1])
    with pytest.raises(BadInput, match="d2t must be 0 where the head knows all 61 tokens"):
        load_head(write_head(tmp_path / "head", config, tensors), target, torch.float32)


def test_pickles_and_paths_to_nowhere_are_refused(target, tmp_path):
    folder = write_head(tmp_path / "head", *head_files(target, ids=IDS))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle files are not read, got only .*pytorch_model.bin; convert to safetensors"):
        load_head(folder, target, torch.float32)
    with pytest.raises(BadInput, match="must be an existing folder"):
        load_head(tmp_path / "nowhere", target, torch.float32)
