"""The command line under torchrun: one profile, plan, check and sweep from two processes, one voice, one set of files."""

import json
import pydoc_data.topics

import pytest

torch = pytest.importorskip("torch")

import ranks
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import planner
from planner.cost.memory import counted_bytes, drafter_weights_bytes
from planner.errors import BadInput
from planner.files import journal_path
from planner.measurements import load_profile
from planner.plans import load_plan
from planner.profiler.latency import rounds_room
from planner.specs import PLAIN, DrafterSpec, Workload

SCRIPT = """
import sys
from planner.cli import main
for line, codes in {lines!r}.items():
    sys.argv = ["planner", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert (end.code or 0) in codes, (line, end.code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, one token per byte, and text to prompt with."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    checkpoint = ranks.checkpoint(vocab_size=len(alphabet), max_context_len=512)
    save_file(checkpoint.tensors, folder / "model.safetensors")
    spec = checkpoint.spec
    config = {
        "model_type": "llama", "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim, "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size, "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_len, "rms_norm_eps": spec.rms_norm_eps, "rope_theta": spec.rope_theta, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:4])
    (folder / "text.txt").write_text(text[:4000])
    (folder / "few.txt").write_text(text[4000:4170])  # four prompts: a check that goes on and on ends soon
    return folder


@pytest.fixture(scope="module")
def uneven(folder, tmp_path_factory):
    """The same with three KV heads, by its config."""
    uneven = tmp_path_factory.mktemp("uneven")
    for file in folder.iterdir():
        (uneven / file.name).write_bytes(file.read_bytes())
    config = json.loads((uneven / "config.json").read_text()) | {"num_attention_heads": 3, "num_key_value_heads": 3}
    (uneven / "config.json").write_text(json.dumps(config))
    return uneven


@pytest.fixture(scope="module")
def run(folder, uneven, tmp_path_factory):
    """Files of a profile, its plan, a check and a sweep, and what was said; everything after the plan in one go."""
    out = tmp_path_factory.mktemp("out")
    shared = f"--dataset {folder / 'text.txt'} --device cpu"
    model = f"--model {folder} --dtype float32 --execution eager"
    said = {
        "profile": ranks.run_on_ranks(
            *f"planner.cli profile {model} {shared} --contexts 40 --kv-budgets 24 --recent 8 --selections chunk --texts 4 --output-len 16 "
            f"--drafters self_sparse --max-draft-len 2 --max-minutes 5 --batches 2 -o {out / 'profile.json'}".split(), module=True
        )
    }  # fmt: skip
    assert said["profile"].returncode == 0, said["profile"].stderr[-3000:]
    plan = planner.plan(out / "profile.json", output_len=8, batch=2)
    planner.save_plan(plan, out / "plan.json")
    check = f"check {out / 'plan.json'} --dataset {folder / 'few.txt'} --device cpu --texts 2 --epsilon 5% -o {out / 'check.json'} --json"
    sweep = f"sweep {model} {shared} --isl 40 --osl 8 --kv-budgets 24 --recent 8 --drafters self_sparse --draft-lens 1 --texts 1 -o {out / 'sweep.json'} -q"
    refused = f"generate --model {uneven} --prompt x --device cpu --execution eager"
    script = out / "others.py"
    script.write_text(SCRIPT.format(lines={check: (0, 1), sweep: (0,), refused: (2,)}))
    said["others"] = ranks.run_on_ranks(script)
    assert said["others"].returncode == 0, said["others"].stderr[-3000:]
    return out, said


def test_a_profile_of_two_ranks_is_written_once_and_knows_them(run, folder):
    out, said = run
    profile = load_profile(out / "profile.json")
    assert profile.tensor_parallel == 2 and (profile.target.num_heads, profile.target.num_kv_heads) == (4, 2)  # the whole model
    assert len(profile.texts) == 4 and not profile.failures
    assert said["profile"].stdout.count("Profile of") == said["profile"].stdout.count("2 x ") == 1
    assert said["profile"].stderr.count("profile: rounds, pass 1 of 4") == 1
    assert not journal_path(out / "profile.json").exists()
    assert {sample.batch for sample in profile.rounds} == {2}


def test_every_number_of_bytes_is_that_of_one_device(run):
    profile = load_profile(run[0] / "profile.json")
    spec = profile.target
    norms = 4 * (2 * spec.num_layers + 1) * spec.hidden_size
    assert profile.weights_bytes * 2 == 4 * spec.num_parameters + norms
    (memory,) = profile.memory
    copies = drafter_weights_bytes(spec, "float32", DrafterSpec(kind="self_sparse", weights="int8"), "full", tensor_parallel=2)
    ground = (40 + rounds_room(2)) * spec.kv_bytes_per_token("float32") // 2
    assert memory.known_bytes == profile.weights_bytes + copies + 3 * ground  # the prompt's cache, and two copies of it side by side
    workload = Workload(context_len=40, output_len=8, sampler=profile.samplers[0])
    logits = 4 * spec.vocab_size
    assert counted_bytes(profile, PLAIN, workload) == profile.weights_bytes + 48 * spec.kv_bytes_per_token("float32") // 2 + logits


def test_its_plan_says_how_to_run_it_and_is_refused_on_one_process(run, folder):
    out, _ = run
    plan = load_plan(out / "plan.json")
    assert plan.tensor_parallel == 2
    assert plan.command.startswith(f"torchrun --nproc-per-node 2 -m planner.cli generate --model {folder} ")
    with pytest.raises(BadInput, match=r"as many devices as it was made for \(2\), got 1; use torchrun --nproc-per-node 2"):
        planner.check(out / "plan.json", [str(folder / "text.txt")], device="cpu")


def test_a_check_is_one_document_from_one_voice(run):
    out, said = run
    report, _ = json.JSONDecoder().raw_decode(said["others"].stdout)
    assert report == json.loads((out / "check.json").read_text())
    assert len(report["cells"]) >= 2 and report["num_texts"] >= 2


def test_a_sweep_runs_every_configuration(run):
    out, _ = run
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert len(cells) == 2 and not journal_path(out / "sweep.json").exists()


def test_heads_that_two_ranks_cannot_share_are_a_line_from_each(run):
    said = run[1]["others"].stderr
    refusal = "num_kv_heads must be a multiple of the number of ranks, got 3 and 2; start 1 or 3 (torchrun --nproc-per-node)"  # two processes may end their lines together
    assert said.count(f"error: {refusal}") == said.count(f"error: rank 1: {refusal}") == 1
