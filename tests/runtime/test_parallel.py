"""Two processes that share a model write what one writes, hold half of it, and cannot go different ways unseen."""

import json

import pytest

torch = pytest.importorskip("torch")

import ranks
from safetensors.torch import load_file
from tiny import NATIVE, native_kernels
from torch.distributed.tensor import Replicate, Shard

from planner.cost.memory import drafter_weights_bytes
from planner.errors import BadInput
from planner.files import process_rank
from planner.runtime.drafters import drafting_model
from planner.runtime.model import build_model
from planner.runtime.parallel import placed
from planner.runtime.ranks import join_ranks
from planner.specs import DrafterSpec


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks found: facts, tensors, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("ranks")
    done = ranks.run_on_ranks(ranks.__file__, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"), folder) for rank in range(2)]


@pytest.fixture(scope="module", params=ranks.MODELS)
def one(request):
    """The same model on one process."""
    return request.param, build_model(ranks.checkpoint(**ranks.MODELS[request.param]))


def test_two_ranks_write_the_tokens_of_one(two, one):
    name, model = one
    alone = ranks.all_written(model)
    assert len(alone) in (2, 10)
    for facts, _, _ in two:
        found = facts[name]["written"]
        assert found.keys() == alone.keys()
        for key, (first, second, accepted) in alone.items():
            if key != "cheap sampled":  # int8 scales differ where rows are cut, so other drafts are proposed and kept
                assert found[key][:2] == [first, second], key
            assert accepted[0] > 0 or key.startswith("none"), key  # drafts were in play
    assert alone["chunk greedy"][0] != alone["chunk sampled"][0]


def test_ranks_have_the_same_logits_to_the_last_bit_and_those_of_one_process_nearly(two, one):
    name, model = one
    for key, alone in zip((f"{name} logits", f"{name} tap"), ranks.logits(model), strict=True):
        first, second = (tensors[key] for _, tensors, _ in two)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_a_rank_holds_half_of_the_caches_and_of_all_matrices(two, one):
    name, model = one
    spec = model.spec
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    padding = spec.hidden_size * (1 if spec.tie_embeddings else 2)  # 61 tokens are 31 rows on each rank
    for facts, _, _ in two:
        assert facts[name]["cache"] * 2 == model.new_cache(50, batch=2).nbytes
        assert facts[name]["weights"] * 2 == model.nbytes + 4 * (norms + padding)


def test_the_bytes_of_a_drafters_copy_are_those_that_a_plan_counts(two, one):
    name, model = one
    cheap = DrafterSpec(kind="self_sparse", weights="int8")
    for drafter, key in ((cheap, "int8 copy"), (ranks.CHEAP, "reduced copy")):
        assert model.extra_nbytes(drafting_model(drafter, model)) == drafter_weights_bytes(model.spec, "float32", drafter, "full")
        for facts, _, _ in two:
            assert facts[name][key] == drafter_weights_bytes(model.spec, "float32", drafter, "full", 2)


def test_int4_needs_parts_that_are_whole_groups(two):
    assert all("multiples of 32, got 16" in facts["tied"]["int4"] for facts, _, _ in two)


def test_native_steps_leave_no_sum_out(two):
    native_kernels(torch.float32)
    alone = ranks.written(build_model(ranks.checkpoint(**NATIVE)), ranks.CONFIGS["window"], ranks.SAMPLERS["greedy"])
    for facts, _, _ in two:
        assert facts["native"] == [alone, "native"]


def test_ranks_that_draw_different_tokens_are_stopped(two):
    for facts, _, _ in two:
        assert facts["alike"] == [[3, 4]]
        assert "all ranks must draw the same tokens" in facts["different"]


def test_rank_0_decides_and_writes_for_all(two):
    (first, _, folder), (second, _, _) = two
    assert first["first"] == second["first"]
    assert first["refused"] == second["refused"] == "rank 0 said no"
    assert (folder / "written.txt").read_text() == "0"


def test_heads_and_mlps_that_cannot_be_shared_out_are_refused(two):
    for facts, _, _ in two:
        assert facts["indivisible"] == "num_kv_heads must be a multiple of the number of ranks, got 3 and 2; start 1 or 3 (torchrun --nproc-per-node)"
    spec = ranks.checkpoint().spec
    with pytest.raises(BadInput, match="num_kv_heads must be a multiple .* got 2 and 4; start 1 or 2"):
        spec.shard(4)
    with pytest.raises(BadInput, match="intermediate_size must be a multiple .* got 47 and 2; start 1 "):
        ranks.checkpoint(intermediate_size=47).spec.shard(2)
    assert spec.shard(1) == spec


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("model.layers.0.self_attn.q_proj.weight", Shard(0)),
        ("model.layers.0.self_attn.k_proj.bias", Shard(0)),
        ("model.layers.11.mlp.down_proj.weight", Shard(1)),
        ("model.layers.0.self_attn.k_norm.weight", Replicate()),
        ("model.norm.weight", Replicate()),
        ("lm_head.weight", Shard(0)),
    ],
)
def test_tensors_are_placed_by_name(name, placement):
    assert placed(name) == placement


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.experts.weight"])
def test_what_would_be_summed_twice_or_is_not_known_is_refused(name):
    with pytest.raises(BadInput, match="run one process"):
        placed(name)


def test_other_launchers_are_not_torchrun(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == 0
    assert join_ranks(torch.device("cpu"))[0].size == 1
