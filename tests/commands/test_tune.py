"""planner tune on an engine that is none (fake_server.py): its choice, its bounds, its journal, and what it leaves behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from fake_server import launched
from llama import gguf_file, llama_server

import planner
from planner.cli import main
from planner.commands.flags import AskedTune
from planner.commands.tune import PROFILE, SCHEDULE, TUNING
from planner.errors import BadInput, ServerError, Unfinished
from planner.exporters.vllm import check_schedule
from planner.files import journal_path
from planner.schedules import Setting, load_schedule
from planner.serving import load_serving_profile
from planner.tunings import Tuning

SERVER = str(Path(__file__).parents[1] / "fake_server.py")
SIZE = {"model": "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=15", "system": "memory_gib=80,fraction=0.9"}
QUICK = AskedTune(
    engine="vllm@0.33", method="eagle3", draft_model="D", max_draft_len=3, concurrency=(1, 4), context_len=16, output_len=24, num_texts=4, check_texts=0,
    **SIZE,
)  # fmt: skip


def command(*words: str) -> str:
    return shlex.join([sys.executable, SERVER, "serve", "MODEL", *words])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Sixty chats of different words."""
    path = tmp_path_factory.mktemp("texts") / "chats.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"What do you know of number {i} and its neighbours {i + 1} and {i - 1}?"}]} for i in range(60)
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return str(path)


@pytest.fixture(scope="module")
def tuned(dataset, tmp_path_factory):
    """A whole tuning of a drafter that pays, beside a setting of the user's own."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    own = '{"method": "eagle3", "model": "D", "num_speculative_tokens": 1}'
    asked = QUICK._replace(launch=command("--speculative-config", own, "--max-num-seqs", "64", "--api-key", "sk-of-the-user"), check_texts=4)
    return planner.tune([dataset], folder, asked, objective="throughput"), folder


def test_a_drafter_that_pays_is_set_by_load_and_beats_what_the_user_runs(tuned):
    tuning, _ = tuned
    assert tuning.chosen and tuning.yours == Setting(drafter="eagle3", draft_len=1)
    assert tuning.chosen[0].batch_from == 1 and tuning.chosen[0].draft_len > 1
    words = shlex.split(tuning.paste)
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert (
        config["method"] == "eagle3" and config["model"] == "D" and config["num_speculative_tokens"] == max(step.draft_len for step in tuning.chosen)
    )
    if rows := config.get("num_speculative_tokens_per_batch_size"):
        check_schedule(rows, config["num_speculative_tokens"], rows[-1][1])
    assert tuning.predicted_gain.value > 0
    first = tuning.loads[0]
    assert first.concurrency == 1 and first.gain_over_off.low > 0 and first.tpot_s.low < first.tpot_s.value < first.tpot_s.high


def test_what_was_measured_and_what_was_checked_are_kept_apart(tuned):
    tuning, _ = tuned
    assert {one.role for one in tuning.checked} == {"chosen", "off", "yours"}
    for one in tuning.checked:
        assert one.num_answers >= 4 and one.measured_tpot_s.value > 0 and (one.gain is None) == (one.role == "chosen")
    at = {one.concurrency: one for one in tuning.checked if one.role == "off"}
    assert at[1].gain.value > 0.2, "three drafts of which most are accepted"
    off = {run.concurrency: run for run in tuning.runs if run.stage == "measure" and run.setting == Setting()}
    assert set(off) == {1, 2, 4} and all(run.counted.drafts == 0 for run in off.values())


def test_staircases_need_few_starts(tuned):
    tuning, _ = tuned
    measured = {run.launch for run in tuning.runs if run.stage == "measure"}
    assert len(measured) == 4 and len({(run.setting.draft_len, run.concurrency) for run in tuning.runs if run.setting.drafter == "eagle3"}) >= 9
    assert all(sum(answer.output_tokens for answer in run.answers) for run in tuning.runs)


def test_the_folder_serves_the_other_commands(tuned, tmp_path):
    tuning, folder = tuned
    assert msgspec.json.decode((folder / TUNING).read_bytes(), type=Tuning) == tuning
    profile, schedule = load_serving_profile(folder / PROFILE), load_schedule(folder / SCHEDULE)
    assert {cell.drafter for cell in profile.cells} == {"none", "eagle3"} and schedule.model == profile.model.name
    assert profile.source == "vllm 0.33.0"
    again = planner.schedule(folder / PROFILE, objective="throughput")
    assert again.deployments[0].drafter == "eagle3"
    found = planner.export(
        folder / SCHEDULE, "vllm@0.33", tmp_path / "out", planner.AskedExport(model="M", draft_model="D"), profile_path=folder / PROFILE
    )
    assert [step.draft_len for step in found.steps] == [step.draft_len for step in tuning.chosen]
    assert not journal_path(folder / TUNING).exists() or json.loads((folder / TUNING).read_text())


def test_the_kv_pool_of_the_log_is_compared(tuned):
    tuning, _ = tuned
    pool = tuning.launches[0].pool
    assert pool.tokens == 400_000 and pool.expected_tokens > pool.tokens
    assert any("400,000 tokens" in note and "less than" in note for note in tuning.notes)


def test_keys_are_in_no_file(tuned):
    _, folder = tuned
    for path in folder.iterdir():
        assert b"sk-of-the-user" not in path.read_bytes(), path


def test_off_is_chosen_where_nothing_is_accepted(dataset, tmp_path, monkeypatch, capsys):
    launch = command("--fake", "never=0", "--fake", "step=0.003")
    words = f"tune --launch {shlex.quote(launch)} --engine vllm --method eagle3 --draft-model D --dataset {dataset} --max-concurrency 1..2 --isl 16 --osl 24"
    words += (
        f" --texts 4 --check-texts 0 --max-draft-len 2 --objective tpot --model {SIZE['model']} --system {SIZE['system']} -q -o {tmp_path / 'out'}"
    )
    monkeypatch.setattr(sys, "argv", ["planner", *shlex.split(words)])
    main_ok()
    said = capsys.readouterr().out
    assert "off: do not draft" in said and "Add to your command" not in said and "none is accepted" in " ".join(said.split())
    assert not journal_path(tmp_path / "out" / TUNING).exists()


def main_ok() -> None:
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


def test_an_engine_without_schedules_is_told_one_length(dataset, tmp_path):
    launch = shlex.join([sys.executable, SERVER, "-m", "model.gguf"])
    asked = QUICK._replace(launch=launch, engine="llama.cpp", draft_model="drafter.gguf", method="draft_model", repeats=1)
    tuning = planner.tune([dataset], tmp_path / "out", asked, objective="tpot")
    assert len(tuning.chosen) == 1 and len({load.setting for load in tuning.loads}) == 1
    assert f"--spec-draft-n-max {tuning.chosen[0].draft_len}" in tuning.paste and "drafter.gguf" in tuning.paste
    assert len({run.launch for run in tuning.runs}) == 4, "off and three lengths"
    assert not any("idle" in note for note in tuning.notes), "it is never idle"


@pytest.mark.model
def test_the_llama_cpp_server_is_tuned(dataset, tmp_path):
    """The real server; the model is its own drafter, which guesses everything and saves nothing."""
    model = str(gguf_file())
    asked = AskedTune(
        launch=shlex.join([llama_server(), "-m", model, "-t", "1", "-c", "2048"]), method="draft_model", draft_model=model, max_draft_len=2,
        concurrency=(1, 1), output_len=16, num_texts=3, check_texts=0, repeats=1, keep_repetitive=True,
    )  # fmt: skip
    tuning = planner.tune([dataset], tmp_path / "out", asked, objective="tpot")
    counted = {run.setting.draft_len: run.counted for run in tuning.runs}
    assert set(counted) == {0, 1, 2} and counted[2].accepted == counted[2].drafted > 0
    profile = load_serving_profile(tmp_path / "out" / PROFILE)
    assert profile.model.num_layers == 30 and profile.drafters["draft_model"].num_layers == 30
    pool = tuning.launches[0].pool
    assert pool.bytes == pytest.approx(pool.expected_bytes, rel=0.01), "as its log says"
    assert all(cell.tokens_per_round == pytest.approx(cell.draft_len + 1, rel=0.1) for cell in profile.cells if cell.draft_len)


def test_servers_that_are_there_are_measured_as_they_are(dataset, tmp_path):
    own = '{"method": "eagle3", "model": "D", "num_speculative_tokens": 3}'
    with launched("serve", "m", "--speculative-config", own) as base, launched("serve", "m") as baseline:
        asked = QUICK._replace(base_url=base, baseline_url=baseline, draft_len=3)
        tuning = planner.tune([dataset], tmp_path / "out", asked, objective="tpot")
    assert tuning.loads[0].gain_over_off.value > 0.2 and len(tuning.launches) == 2 and not tuning.checked
    assert any("one draft length was measured" in note for note in tuning.notes)


def test_a_bound_is_kept_and_said(dataset, tmp_path):
    asked = QUICK._replace(launch=command(), cap_minutes=0.0)
    with pytest.raises(Unfinished, match="--cap-minutes"):
        planner.tune([dataset], tmp_path / "none", asked)
    with pytest.raises(BadInput, match="sends at least"):
        planner.tune([dataset], tmp_path / "few", asked._replace(cap_minutes=10.0, cap_requests=20))
    tuning = planner.tune([dataset], tmp_path / "cut", asked._replace(cap_minutes=10.0, cap_requests=70), objective="tpot")
    assert tuning.requests <= 70


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_tuning_goes_on_and_leaves_no_server(dataset, tmp_path, end):
    out = tmp_path / "out"
    words = ["tune", "--launch", command(), "--engine", "vllm", "--method", "eagle3", "--draft-model", "D", "--dataset", dataset, "--max-concurrency"]
    words += ["1..4", "--isl", "16", "--osl", "24", "--texts", "4", "--check-texts", "0", "--max-draft-len", "2", "-q", "-o", str(out)]
    words += ["--model", SIZE["model"], "--system", SIZE["system"], "--json"]
    process = subprocess.Popen([sys.executable, "-m", "planner.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = journal_path(out / TUNING)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 6):
        time.sleep(0.02)
    process.send_signal(end)
    _, said = process.communicate(timeout=30)
    if end == signal.SIGTERM:
        assert process.returncode == 143 and "--resume goes on from there" in said
    held = journal.read_bytes()
    finished = held[: held.rfind(b"\n") + 1]
    done = subprocess.run([sys.executable, "-m", "planner.cli", *words, "--resume"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    tuning = json.loads(done.stdout)
    earlier = [json.loads(line)["run"] for line in finished.splitlines()[1:] if json.loads(line).get("run")]
    assert earlier and tuning["runs"][: len(earlier)] == earlier, "what was finished is not run again"
    assert not journal.exists()
    ports = [word for launch in tuning["launches"] for word in launch["command"]]
    assert ports and not still_running(out)


def still_running(folder: Path) -> list[str]:
    """Processes that write into the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if str(folder) in os.readlink(entry):
                found.append(str(entry))
        except OSError:
            pass
    return found


def test_a_server_that_dies_ends_the_tuning_in_one_line(dataset, tmp_path):
    with pytest.raises(ServerError, match="127.0.0.1"):
        planner.tune([dataset], tmp_path / "out", QUICK._replace(launch=command("--fake", "die-after=6")))
    assert journal_path(tmp_path / "out" / TUNING).exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "--launch COMMAND, or --base-url"),
        ({"launch": "x", "base_url": "http://127.0.0.1:1"}, "one of them"),
        ({"launch": "vllm serve 'M"}, "check its quotes"),
        ({"launch": "  "}, "got nothing"),
        ({"launch": "vllm serve M", "engine": None, "method": "warp"}, "got warp"),
        ({"launch": "vllm serve M", "engine": None, "method": None}, "the command drafts nothing"),
        ({"launch": "vllm serve M", "engine": None, "draft_model": None}, "give --draft-model"),
        ({"launch": "serve M", "engine": "vllm@9.9"}, "the versions known"),
        ({"launch": "vllm serve M", "concurrency": (1, 5000)}, "--max-concurrency"),
        ({"launch": "vllm serve M", "num_texts": 0}, "--texts"),
        ({"launch": "vllm serve M", "draft_len": 3}, "--draft-len are for a server that is there"),
        ({"base_url": "http://127.0.0.1:1", "draft_len": 3, "method": "eagle3", "model": None}, "give --model"),
        ({"base_url": "http://127.0.0.1:1", "baseline_url": "http://127.0.0.1:1/v1", "draft_len": 3}, "two, both addresses"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(dataset, tmp_path, changes, words):
    with pytest.raises(BadInput) as refusal:
        planner.tune([dataset], tmp_path / "out", QUICK._replace(**changes))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_too_few_prompts_are_refused_before_anything_starts(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "one"}\n')
    with pytest.raises(BadInput, match="prompts are needed"):
        planner.tune([str(path)], tmp_path / "out", QUICK._replace(launch=command()))
