"""DFlash heads: what is read from a published folder, what the head computes, what its window leaves, what it holds.

That its output is lossless and its replay true is tested with the other drafters, in test_drafters.py and test_replay.py.
"""

import json
from pathlib import Path

import pytest
import torch
from decoding import run
from safetensors.torch import save_file
from tiny import BLOCK_HEAD, NATIVE, block_head_files, native_kernels, prefilled, random_prompt, tiny_model, with_block_head, write_head

from planner.commands.configs import HEADS, checkpoint_kind, kv_choices
from planner.errors import BadInput
from planner.runtime.dflash_head import evenly_spread, load_head
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.protocol import TargetText
from planner.specs import DraftConfig, DrafterSpec, FixedTree, FullKV, Sampler, SparseKV
from planner.trained import FOLDERS, checkpoint_path

K, BLOCK = 4, 6
DFLASH = DraftConfig(drafter=BLOCK_HEAD, draft_len=K)
SOFT = Sampler(temperature=1.0)
IDS = (2, 0, 1)
MIXED = {"ids": IDS, "num_layers": 3}


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=5, sharpness=1.1, num_layers=4)


# ---- what the head computes


def reference(config: dict, tensors: dict, embedding: torch.Tensor, features: torch.Tensor, last: int, sees=slice(None), bend=None) -> torch.Tensor:
    """Distributions of a block behind contexts [c, taps * C], in float64, by the published description: no cache, no chunks.

    bend  changes scores [H, block, c + block], to show that the comparison would see it
    """
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors.items()}
    H, G, D, n = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "block_size"))
    c = len(features)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def heads(x, layer, name, count, first):
        x = (x @ w[f"{layer}.self_attn.{name}_proj"].T).unflatten(-1, (count, D)).transpose(0, 1)
        if name == "v":
            return x
        x = norm(x, f"{layer}.self_attn.{name}_norm") if f"{layer}.self_attn.{name}_norm" in w else x
        angle = torch.arange(first, first + x.shape[1])[:, None] * config["rope_theta"] ** (-torch.arange(0, D, 2) / D).double()
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    context = norm(features.double() @ w["fc"].T, "hidden_norm")
    x = embedding.double()[[last] + [config["dflash_config"]["mask_token_id"]] * (n - 1)]
    hidden = torch.full((c + n,), -torch.inf, dtype=torch.float64)
    hidden[torch.arange(c)[sees]], hidden[c:] = 0, 0
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        both = torch.cat([context, h])
        q, k, v = heads(h, layer, "q", H, c), heads(both, layer, "k", G, 0), heads(both, layer, "v", G, 0)
        k, v = (part.repeat_interleave(H // G, 0) for part in (k, v))
        scores = q @ k.mT / D**0.5 + hidden
        attended = (scores if bend is None else bend(scores)).softmax(-1) @ v
        x = x + attended.transpose(0, 1).flatten(1) @ w[f"{layer}.self_attn.o_proj"].T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = h @ w[f"{layer}.mlp.gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ w[f"{layer}.mlp.up_proj"].T)) @ w[f"{layer}.mlp.down_proj"].T
    return (norm(x, "norm")[1:] @ embedding.double().T).softmax(-1)


def one_shot_features(model, tokens: list[int], layers) -> torch.Tensor:
    """Hidden states of the target from a pass over everything at once: [tokens, layers * C]."""
    with torch.inference_mode():
        taps = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], model.new_cache(len(tokens)), taps=layers).taps
    return torch.cat([taps[layer][0] for layer in layers], -1)


@torch.inference_mode()
def largest_distance(model, files, prompt, counts, kv=FullKV(), ids=IDS, **options) -> float:
    """From the reference, of the drafts of round after round, of which `counts` tokens are committed, whatever the target thinks of them."""
    cache, _ = prefilled(model, [prompt], 140)
    drafter = make_drafter(DraftConfig(drafter=BLOCK_HEAD, draft_len=K, kv=kv), model)
    drafter.start(cache, [prompt])
    history, distance = [*prompt, 7], 0.0
    for count in counts:
        draft = drafter.propose([history], [K], SOFT, [torch.Generator().manual_seed(0)])
        c = len(history) - 1
        if isinstance(kv, SparseKV):
            fixed = min(kv.sink, len(prompt))
            options["sees"] = [p for p in range(c) if p < fixed or p >= c - (kv.budget - fixed)]
        expected = reference(*files, model.embedding, one_shot_features(model, history[:-1], ids), history[-1], **options)
        assert draft.probs.dtype == torch.float32 and draft.lens == [K]
        distance = max(distance, float((draft.probs[0].double() - expected[:K]).abs().max()))
        verified = torch.tensor([[history[-1], *draft.tokens[0].tolist()]])
        model(verified, torch.arange(c, c + K + 1)[None], cache, taps=drafter.taps)
        cache.commit([count])
        history += [*draft.tokens[0].tolist(), 9][:count]
        drafter.commit(cache, [history], [count])
    return distance


STYLES = {"qwen3": {}, "llama": {"model_type": "llama"}, "another rope": {"rope_theta": 50.0}, "two layers": {"num_hidden_layers": 2}}


@pytest.mark.parametrize("changes", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("prompt", [[5], [5, 9], random_prompt(13)], ids=len)
def test_a_head_drafts_by_its_published_description(target, tmp_path, prompt, changes):
    options = {"ids": IDS, "num_layers": changes.get("num_hidden_layers", 3), **changes}
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **options)
    files = block_head_files(target, **options)
    assert largest_distance(model, files, prompt, counts=[1, 5, 3, 1]) < 1e-5


@pytest.mark.parametrize("prompt", [[5], random_prompt(7), random_prompt(40)], ids=len)
@pytest.mark.parametrize(
    "kv", [SparseKV(budget=6, sink=2, recent=4, storage="evict"), SparseKV(budget=20, sink=4, recent=8, storage="evict")], ids=str
)
def test_under_a_budget_it_sees_the_first_contexts_and_the_last(target, tmp_path, prompt, kv):
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **MIXED)
    files = block_head_files(target, **MIXED)
    assert largest_distance(model, files, prompt, counts=[1, 5, 3, 1, 5, 5, 2, 4, 5], kv=kv) < 1e-5


def test_a_head_of_native_kernels_drafts_by_the_same_description(tmp_path):
    shape = {**NATIVE, "num_layers": 4}
    model = with_block_head(tiny_model(seed=5, kernels=native_kernels(torch.float32), **shape), tmp_path / "head", **MIXED)
    assert largest_distance(model, block_head_files(tiny_model(seed=5, **shape), **MIXED), random_prompt(12), counts=[2, 1]) < 1e-5


def test_a_prompt_read_in_chunks_gives_the_same_drafts(target, tmp_path, monkeypatch):
    monkeypatch.setattr("planner.runtime.drafters.dflash.PREFILL_CHUNK", 5)
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **MIXED)
    assert largest_distance(model, block_head_files(target, **MIXED), random_prompt(19), counts=[1, 3]) < 1e-5


def causal(scores):
    n, S = scores.shape[-2:]
    return scores.masked_fill(torch.ones(n, S, dtype=torch.bool).triu(S - n + 1), -torch.inf)


WRONG = {
    "taps in another order": {"ids": (0, 2, 1)},
    "a causal block": {"bend": causal},
    "the last context unseen": {"sees": slice(0, -1)},
    "contexts after the attention norm": {"twice": True},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_comparison_would_see(target, tmp_path, wrong):
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **MIXED)
    config, tensors = block_head_files(target, **MIXED)
    if wrong.pop("twice", False):
        tensors["hidden_norm.weight"] = tensors["hidden_norm.weight"] * tensors["layers.0.input_layernorm.weight"]
    assert largest_distance(model, (config, tensors), random_prompt(19), counts=[1], **wrong) > 1e-3


# ---- how it drafts


def test_blocks_end_with_their_round_and_positions_are_drawn_each_from_its_own_distribution(target, tmp_path):
    model = with_block_head(tiny_model(seed=5, sharpness=0.5, num_layers=4), tmp_path / "head", **MIXED)
    prompt = random_prompt(20)
    cache, _ = prefilled(model, [prompt], 60)
    drafter = make_drafter(DFLASH, model)
    drafter.start(cache, [prompt])
    drawn = torch.zeros(K, 61)
    for seed in range(400):
        with torch.inference_mode():
            draft = drafter.propose([[*prompt, 5]], [K], SOFT, [torch.Generator().manual_seed(seed)])
        drawn[torch.arange(K), draft.tokens[0]] += 1
    assert drafter.cache.lengths == [20]
    expected = draft.probs[0] * 400
    large = expected >= 5
    assert (large.sum(-1) > 1).all()
    spread = ((drawn - expected)[large] / expected[large].sqrt()).abs()
    assert spread.max() < 4.5 and spread.mean() < 1.2


@pytest.mark.parametrize("asked", [1, 3, 5, 9])
def test_a_round_drafts_the_first_of_one_block_whatever_is_asked(target, tmp_path, asked):
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **MIXED)
    prompts = [random_prompt(20), random_prompt(33)]
    cache, _ = prefilled(model, prompts, 60)
    found = {}
    for draft_len in (asked, BLOCK - 1):
        drafter = make_drafter(DraftConfig(drafter=BLOCK_HEAD, draft_len=draft_len), model, batch=2)
        drafter.start(cache, prompts)
        with torch.inference_mode():
            draft = drafter.propose([[*p, 5] for p in prompts], [draft_len, 1], SOFT, [torch.Generator().manual_seed(b) for b in range(2)])
        found[draft_len] = draft.probs
        assert draft.lens == [min(draft_len, BLOCK - 1), 1]
    torch.testing.assert_close(found[asked], found[BLOCK - 1][:, :asked], atol=1e-6, rtol=0)


def test_a_cache_made_before_the_head_was_loaded_is_refused(target, tmp_path):
    model = tiny_model(seed=5, num_layers=4)
    cache, _ = prefilled(model, [[1, 2, 3]], 10)
    with_block_head(model, tmp_path / "head", **MIXED)
    with pytest.raises(ValueError, match="must keep the output of layers"):
        make_drafter(DFLASH, model).start(cache, [[1, 2, 3]])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_head_is_smaller_and_drafts_nearly_the_same(tmp_path, weights):
    model = with_block_head(tiny_model(seed=5, num_layers=4, **NATIVE), tmp_path / "head", **MIXED)
    head = model.beside[BLOCK_HEAD.path, None]
    cheaper = DrafterSpec(kind="dflash", path=BLOCK_HEAD.path, weights=weights)
    prompt = random_prompt(20)
    cache, _ = prefilled(model, [prompt], 60)
    probs = []
    for drafter_spec in (BLOCK_HEAD, cheaper):
        drafter = make_drafter(DraftConfig(drafter=drafter_spec, draft_len=K), model)
        drafter.start(cache, [prompt])
        with torch.inference_mode():
            probs.append(drafter.propose([[*prompt, 5]], [K], SOFT, [torch.Generator().manual_seed(0)]).probs)
    assert 0 < (probs[0] - probs[1]).abs().max() < (0.2 if weights == "int8" else 0.9)
    copy = head.cheaper(weights)
    assert copy is head.cheaper(weights) and copy.fingerprint == f"{head.fingerprint}-{weights}"
    assert copy.head.bits == int(weights[3:]) and copy.embedding is model.embedding
    assert head.copies_nbytes < model.extra_nbytes(copy) < model.extra_nbytes(head) / 2


# ---- what is read


def test_published_spellings_give_the_same_head(target, tmp_path):
    config, tensors = block_head_files(target, **MIXED)
    first = load_head(write_head(tmp_path / "plain", config, tensors), target, torch.float32)
    expected = first.state_dict()

    nested = {name: value for name, value in config.items() if name not in ("block_size", "num_target_layers", "layer_types")}
    nested["dflash_config"] = config["dflash_config"] | {"block_size": BLOCK, "causal": False, "mask_token": "<|MASK|>"}
    flat = config | {"dflash_config": None} | config["dflash_config"]
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    encoder = {renamed.get(name, name): tensor for name, tensor in tensors.items()} | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    declared_llama = config | {"model_type": "llama"}  # as a head of a Llama target may: the norms are there all the same
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    written = {"nested": (nested, tensors), "flat": (flat, tensors), "encoder": (config, encoder), "llama": (declared_llama, tensors)}
    for folder in [*(write_head(tmp_path / name, *one) for name, one in written.items()), sharded]:
        head = load_head(folder, target, torch.float32)
        assert (head.taps, head.block_size, head.mask_token, head.spec.qk_norm) == (IDS, BLOCK, 60, True)
        assert head.spec.max_context_len == target.spec.max_context_len
        assert head.state_dict().keys() == expected.keys()
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, expected[name]), (folder, name)


def test_embedding_and_head_are_the_targets(target, tmp_path):
    files = block_head_files(target, **MIXED)
    head = load_head(write_head(tmp_path / "head", *files), target, torch.float32)
    assert head.embedding is target.embedding and head.head is target.head
    assert target.extra_nbytes(head) == sum(tensor.nbytes for tensor in files[1].values())


@pytest.mark.parametrize(
    ("num_taps", "num_layers", "expected"), [(5, 36, [1, 9, 17, 25, 33]), (5, 32, [1, 8, 15, 22, 29]), (1, 30, [15]), (3, 4, [1, 1, 1])]
)
def test_layers_are_spread_as_published_configs_have_them(num_taps, num_layers, expected):
    assert evenly_spread(num_taps, num_layers) == expected


def test_without_ids_as_many_layers_are_tapped_as_the_head_has(tmp_path):
    model = tiny_model(num_layers=9)
    config, tensors = block_head_files(model, ids=(1, 4, 6), num_layers=3)
    config["dflash_config"].pop("target_layer_ids")
    assert load_head(write_head(tmp_path / "head", config, tensors), model, torch.float32).taps == (1, 4, 6)


def test_a_folder_is_told_by_its_architectures(target, tmp_path):
    files = write_head(tmp_path / "head", *block_head_files(target, **MIXED))
    assert checkpoint_kind(str(files)) == "dflash" and set(HEADS) == {"eagle3", "dflash"}


def test_of_the_policies_asked_for_a_head_takes_windows_that_drop_the_rest():
    asked = [SparseKV(budget=64), SparseKV(budget=64, selection="chunk"), SparseKV(budget=128)]
    assert kv_choices(BLOCK_HEAD, asked) == [SparseKV(budget=64, storage="evict"), SparseKV(budget=128, storage="evict"), FullKV()]


def without(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, tensor):
    return lambda config, tensors: tensors.update({name: tensor})


def setting(**changes):
    return lambda config, tensors: config.update(changes)


def nesting(**changes):
    return lambda config, tensors: config["dflash_config"].update(changes)


REFUSALS = {
    "tensor layers.1.mlp.up_proj.weight is missing; a DFlash head needs 36 tensors": without("layers.1.mlp.up_proj.weight"),
    "tensor hidden_norm.weight is missing": without("hidden_norm.weight"),
    "tensor layers.2.self_attn.q_norm.weight is missing": without("layers.2.self_attn.q_norm.weight"),
    r"tensor fc.weight must have shape \[32, 96\]": put("fc.weight", torch.zeros(32, 64)),
    r"tensor layers.0.mlp.gate_proj.weight must have shape \[72, 32\]": setting(intermediate_size=72),
    "norm.weight must be one of F32, F16, BF16, got I64": put("norm.weight", torch.ones(32, dtype=torch.long)),
    "norm.weight holds values that are not finite": put("norm.weight", torch.full((32,), torch.nan)),
    "tensor fc.weight is also encoder.fc.weight": put("encoder.fc.weight", torch.zeros(32, 96)),
    "tensor 'lm_head.weight' is not part of a DFlash head": put("lm_head.weight", torch.zeros(61, 32)),
    "tensor 'layers.3.input_layernorm.weight' is not part of a DFlash head": put("layers.3.input_layernorm.weight", torch.ones(32)),
    "tensor layers.3.input_layernorm.weight is missing": setting(num_hidden_layers=4, layer_types=None),
    "vocab_size must be the target's, 61, .* got 64": setting(vocab_size=64),
    "hidden_size must be the target's, 32, .* got None": setting(hidden_size=None),
    "num_hidden_layers must be an integer from 1 to 64, got 16384": setting(num_hidden_layers=16384),
    r"architectures must be \['DFlashDraftModel'\], a DFlash head, got \['DFlash2DraftModel'\]": setting(architectures=["DFlash2DraftModel"]),
    "dflash_config must be an object": setting(dflash_config=[1]),
    "layer_types must be full_attention throughout": setting(layer_types=["sliding_attention"] * 3),
    "is_causal must be False": setting(is_causal=True),
    "dflash_config.causal must be False": nesting(causal=True),
    "dflash_config.use_swa must be False": nesting(use_swa=True),
    "dflash_config.output_multiplier must be 1": nesting(output_multiplier=0.2),
    "final_logit_softcapping must be 0": setting(final_logit_softcapping=20.0),
    "dflash_config.projector_type is not known": nesting(projector_type="domino"),
    "attention_bias must be False": setting(attention_bias=True),
    "mask_token_id is missing": nesting(mask_token_id=None),
    "mask_token_id must be an integer from 0 to 60, got 61": nesting(mask_token_id=61),
    "block_size must be an integer from 2 to 256, got 1": setting(block_size=1),
    "num_target_layers must be the number of the target's layers, 4, got 5": setting(num_target_layers=5),
    r"target_layer_ids must be different layers of the target, which has 4, got \[0, 0, 1\]": nesting(target_layer_ids=[0, 0, 1]),
    r"target_layer_ids must be different layers of the target, which has 4, got \[0, 1, 4\]": nesting(target_layer_ids=[0, 1, 4]),
    "target_layer_ids must be a list of 1 to 16 integers": nesting(target_layer_ids=[2, True, 3]),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_head_that_does_not_fit_is_refused(target, tmp_path, message):
    config, tensors = block_head_files(target, **MIXED)
    REFUSALS[message](config, tensors)
    with pytest.raises(BadInput, match=message) as refused:
        load_head(write_head(tmp_path / "head", config, tensors), target, torch.float32)
    assert "\n" not in str(refused.value)


def test_pickles_and_files_are_refused(target, tmp_path):
    folder = write_head(tmp_path / "head", *block_head_files(target, **MIXED))
    with pytest.raises(BadInput, match="a DFlash head is a folder"):
        load_head(folder / "model.safetensors", target, torch.float32)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle files are not read, got only .*pytorch_model.bin; convert to safetensors"):
        load_head(folder, target, torch.float32)


@pytest.mark.parametrize("kv", [SparseKV(budget=64), SparseKV(budget=64, selection="chunk", storage="evict")], ids=str)
def test_a_budget_that_is_no_window_is_refused(kv):
    with pytest.raises(ValueError, match="drafter dflash keeps a window and drops the rest"):
        DraftConfig(drafter=BLOCK_HEAD, draft_len=K, kv=kv)


# ---- trees


@pytest.mark.parametrize("size", [1, 4, 16])
def test_greedy_output_of_every_tree_is_plain_greedy_output(tmp_path, size):
    model = with_block_head(tiny_model(seed=5, sharpness=1.5, intermediate_size=64), tmp_path / "head")
    prompts = [random_prompt(length, seed=length) for length in (3, 21, 75)]
    text, rounds = run(model, prompts, DraftConfig(drafter=BLOCK_HEAD, draft_len=5, tree=FixedTree(size=size)))
    assert text == run(model, prompts)[0]
    assert sum(sum(r.accepted) for r in rounds) > 0


@torch.inference_mode()
def test_a_replayed_tree_is_the_one_that_would_be_proposed(target, tmp_path):
    model = with_block_head(tiny_model(seed=5, sharpness=1.1, num_layers=4), tmp_path / "head", **MIXED)
    prompt, size, T = random_prompt(20), 12, 14
    tokens = random_prompt(T, seed=1)
    cache, _ = prefilled(model, [prompt], 60)
    positions = torch.arange(20, 20 + T - 1)[None]
    model(torch.tensor([tokens[:-1]]), positions, cache, cache.causal_mask(T - 1), model.taps)
    cache.commit([T - 1])
    text = TargetText(prompt, tokens, torch.ones(T - 1), cache.stream(0), SOFT, {})
    config = DraftConfig(drafter=BLOCK_HEAD, draft_len=K, tree=FixedTree(size=size))
    replayed, beyond = make_drafter(config, model).replay_trees(text, [K, 9], size)
    assert beyond.sizes.shape == (T - 1, 9) and (beyond.sizes[:, BLOCK - 1 :] == 0).all()
    held = 0
    for s in range(T - 1):
        if (levels := min(K, T - 2 - s)) < 1:
            assert (replayed.sizes[s] == 0).all()
            continue
        begun, _ = prefilled(model, [prompt + tokens[:s]], 60)
        drafter = make_drafter(config, model)
        drafter.start(begun, [prompt + tokens[:s]])
        draft = drafter.propose([prompt + tokens[: s + 1]], [levels], SOFT, [torch.Generator()])
        node, found = -1, [0] * K
        for level in range(levels):
            children = [i for i in range(draft.lens[0]) if int(draft.parents[0, i]) == node and int(draft.tokens[0, i]) == tokens[s + 1 + level]]
            if not children:
                break
            node = children[0]
            found[level] = node + 1
        assert replayed.sizes[s].tolist() == found
        assert (replayed.probs[s] > 0).sum() == draft.lens[0]
        held += found[0] > 0
    assert held > 0


def test_a_shipped_name_is_its_folder_and_a_path_is_itself(tmp_path, monkeypatch, target):
    monkeypatch.setattr("planner.trained.__file__", str(tmp_path / "__init__.py"))
    assert checkpoint_path("some/folder") == Path("some/folder")
    with pytest.raises(BadInput, match="comes with the package, and its folder .* is missing; install specplan again"):
        checkpoint_kind(FOLDERS[0])
    write_head(tmp_path / FOLDERS[0], *block_head_files(target, **MIXED))
    assert checkpoint_kind(FOLDERS[0]) == "dflash" and checkpoint_path(FOLDERS[0]) == tmp_path / FOLDERS[0]
