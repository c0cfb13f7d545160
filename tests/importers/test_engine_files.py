"""Benchmark JSON, answers and metrics of engines: one truth written in each of their forms is read back as the same cell."""

import json

import pytest
from benches import PER_ROUND, SHARES, answer, metrics, sglang, table, vllm

from planner.errors import BadInput
from planner.importers.contract import Given, conditional
from planner.importers.recognise import read_any

EAGLE = Given(drafter="eagle3")
AT_8 = Given(drafter="eagle3", concurrency=8)


def read(content: str | dict | list, given: Given = EAGLE, since: str | None = None):
    text = content if isinstance(content, str) else json.dumps(content)
    return read_any(text.encode(), "f", given, None if since is None else (since.encode(), "before"))


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("content", "given", "engine"),
    [
        (lines(vllm()), EAGLE, "vLLM"),
        (json.dumps(vllm(), indent=1), EAGLE, "vLLM"),
        (lines(sglang()), EAGLE, "SGLang 0.5.23"),
        (lines(*[answer(accepted=[0] * 3 + [1] * 2 + [2] * 2 + [3] * 3) for _ in range(4)]), AT_8, "vLLM"),
        (metrics(), AT_8, "vLLM"),
        (metrics(engines=2), AT_8, "vLLM"),
        (metrics(prefix="llamacpp:"), AT_8._replace(context_len=1024, output_len=256), "llama.cpp"),
        (table().split("\n")[0] + "\n" + table().split("\n")[4], EAGLE, ""),
    ],
    ids=["vllm", "vllm indented", "sglang", "answers", "vllm metrics", "two engines", "llama.cpp metrics", "table"],
)
def test_one_truth_is_read_from_every_form(content, given, engine):
    found = read(content, given)
    (cell,) = found.cells
    assert (cell.drafter, cell.draft_len, cell.concurrency, cell.context_len) == ("eagle3", 3, 8, 1024)
    assert cell.tpot_s == pytest.approx(0.007) and found.engine == engine
    per_round = 2.5 if cell.source == "f" and "histogram" in content else PER_ROUND
    assert cell.tokens_per_round == pytest.approx(per_round)
    if cell.itl_s is not None:
        assert cell.itl_s == pytest.approx(0.007 * per_round)
    if cell.acceptance and per_round == PER_ROUND:
        assert cell.acceptance == pytest.approx([0.7, 0.6, 0.5])


# ---- vLLM


def test_unconditional_rates_become_conditional_ones():
    assert conditional("f", SHARES) == pytest.approx([0.7, 0.6, 0.5])
    assert conditional("f", [0.5, 0.0, 0.0]) == [0.5, 0.0]  # nothing is known of the third: no round got there
    assert conditional("f", []) == []
    for wrong in ([0.5, 0.6], [1.2], [-0.1]):
        with pytest.raises(BadInput, match="must lie between 0 and that of the position before"):
            conditional("f", wrong)


def test_a_vllm_run_without_counters_is_off_and_says_so_beside_a_drafter():
    assert [(c.drafter, c.draft_len) for c in read(lines(vllm(draft_len=0), vllm())).cells] == [("none", 0), ("eagle3", 3)]
    off = read(vllm(draft_len=0))
    assert off.cells[0].drafter == "none" and "taken as off and not as eagle3 loaded and idle" in off.warnings[0]
    assert read(vllm(draft_len=0), Given()).warnings == []
    idle = read(vllm(draft_len=0), Given(drafter="eagle3", draft_len=0))
    assert (idle.cells[0].drafter, idle.cells[0].draft_len, idle.warnings) == ("eagle3", 0, [])


def test_metadata_of_the_benchmark_name_the_drafter():
    (cell,) = read(vllm(drafter="mtp", draft_len_="", tp="2") | {"draft_len": "3"}, Given()).cells
    assert (cell.drafter, cell.draft_len, cell.tensor_parallel) == ("mtp", 3, 2)
    (idle,) = read(vllm(draft_len=0, drafter="mtp"), Given()).cells
    assert (idle.drafter, idle.draft_len) == ("mtp", 0)


@pytest.mark.parametrize(
    ("record", "given", "message"),
    [
        (vllm(), Given(), "drafted tokens and does not name the drafter; give --drafter"),
        (vllm(), Given(drafter="eagle3", draft_len=4), "draft_len is 3 in the file, --draft-len says 4"),
        (vllm(), Given(drafter="eagle3", concurrency=16), "concurrency is 8 in the file, --max-concurrency says 16"),
        (vllm(), Given(drafter="eagle3", context_len=2048), "context_len is 1024 in the file, --isl says 2048"),
        (vllm(max_concurrency=None), EAGLE, "does not say concurrency; give --max-concurrency"),
        (vllm(mean_tpot_ms=0.0), EAGLE, "mean_tpot_ms must be a number above 0, got 0.0"),
        (vllm(mean_tpot_ms="7"), EAGLE, "mean_tpot_ms must be a finite number, got '7'"),
        (vllm(mean_tpot_ms=None), EAGLE, "mean_tpot_ms must be a number above 0, got None"),
        (vllm(completed=2.5), EAGLE, "completed must be a whole number"),
        (vllm() | {"max_concurrency": 10**30}, EAGLE, "f: concurrency: "),
        (vllm(spec_decode_per_position_acceptance_rates=[0.2, 0.5, 0.1]), EAGLE, "these are not per-position acceptance rates"),
        (vllm(spec_decode_per_position_acceptance_rates={"0": 1}), EAGLE, "must be a list of finite numbers"),
        ([vllm(), 3], EAGLE, "entry 2 must be a JSON object, got 3"),
        ({"completed": 3}, EAGLE, "JSON of no known kind; looked for total_input_tokens"),
        ("[]", EAGLE, "must hold at least one JSON object"),
        ("{" * 100_000, EAGLE, "is not JSON"),
        (json.dumps(vllm())[:300], EAGLE, "line 1 is not JSON .*; the file may be cut off"),
        (json.dumps(vllm(mean_itl_ms=float("nan"))), EAGLE, "hold NaN where nothing was measured"),
    ],
)  # fmt: skip
def test_what_a_vllm_file_lacks_or_contradicts_is_refused(record, given, message):
    with pytest.raises(BadInput, match=message) as error:
        read(record, given)
    assert "\n" not in str(error.value)


def test_doubtful_vllm_runs_are_kept_with_a_warning_and_empty_ones_left_out():
    found = read(lines(vllm(completed=0), vllm(failed=20), vllm(request_rate=3.0), vllm(spec_decode_draft_tokens=2000)))
    assert len(found.cells) == 3 and len(found.warnings) == 4
    for piece, warning in zip(
        ("line 1: left out", "20 of 120 requests failed", "at a rate", "2.00 tokens were drafted"), found.warnings, strict=True
    ):
        assert piece in warning
    assert found.date == "2026-11-01T10:15:00"


def test_flags_about_length_may_differ_a_little_from_the_mean_that_was_sent():
    assert read(vllm(), Given(drafter="eagle3", context_len=1000, output_len=256)).cells[0].context_len == 1024


# ---- SGLang


def test_sglang_names_its_drafter_itself_and_trees_are_left_out():
    found = read(lines(sglang(algorithm=None), sglang(algorithm="NEXTN"), sglang(topk=4)), Given())
    assert [(c.drafter, c.draft_len) for c in found.cells] == [("none", 0), ("mtp", 3)]
    assert found.cells[0].itl_s == pytest.approx(0.007) and found.cells[1].itl_s is None  # a time per token there, no round
    assert found.warnings == ["f, line 3: left out, it verified trees (speculative_eagle_topk 4)"]


def test_sglang_without_server_info_needs_flags():
    bare = sglang(server_info=None)
    assert read(bare, Given(drafter="eagle3", draft_len=3)).cells[0].draft_len == 3
    for given, message in ((EAGLE, "does not say draft_len; give --draft-len"), (Given(draft_len=3), "does not name the drafter")):
        with pytest.raises(BadInput, match=message):
            read(bare, given)
    assert read(sglang(server_info=None, accept_length=None), Given()).cells[0].drafter == "none"


# ---- answers with metrics


def test_a_draft_that_ended_early_is_no_rejection():
    accepted, drafted = [3, 1, 1, 0], [3, 1, 3, 3]
    (exact,) = read(lines(answer(accepted=accepted, drafted=drafted)), AT_8).cells
    (coarse,) = read(lines(answer(accepted=accepted)), AT_8).cells
    assert exact.acceptance == pytest.approx([3 / 4, 1 / 2, 1.0])  # of position 2, two rounds that got there drafted it
    assert coarse.acceptance == pytest.approx([3 / 4, 1 / 3, 1.0])
    assert exact.tokens_per_round == coarse.tokens_per_round == pytest.approx(1 + 5 / 4)
    assert exact.ttft_s == pytest.approx(0.15)


def test_answers_may_be_wrapped_and_lines_without_metrics_are_counted():
    found = read(lines({"data": answer(accepted=[1, 2])}, {"usage": {}}, {"response": answer(accepted=[3])}), AT_8)
    assert len(found.cells) == 1 and found.warnings == ["f: 1 of 3 lines are left out, they hold no metrics"]


def test_answers_of_several_lengths_are_refused():
    other = answer(accepted=[1])
    other["metrics"]["speculative_decoding"] |= {"num_spec_tokens": 2, "acceptance_histogram": [0, 1, 0]}
    with pytest.raises(BadInput, match=r"requests of one draft_len up to 1024, got \[2, 3\]"):
        read(lines(answer(accepted=[1]), other), AT_8)


# ---- Prometheus


def test_two_scrapes_count_what_lies_between_them():
    slow_start = metrics(requests=10, drafts=1000).replace(
        "request_time_per_output_token_seconds_sum{", "request_time_per_output_token_seconds_sum{", 1
    )
    (cell,) = read(metrics(), AT_8, since=slow_start).cells
    assert cell.tpot_s == pytest.approx(0.007) and cell.acceptance == pytest.approx([0.7, 0.6, 0.5])
    (idle,) = read(metrics(drafts=1000), AT_8._replace(draft_len=0), since=metrics(requests=10, drafts=1000)).cells
    assert (idle.drafter, idle.draft_len, idle.acceptance) == ("eagle3", 0, [])


def test_throughput_follows_from_the_time_of_whole_requests():
    (cell,) = read(metrics(), AT_8).cells
    assert cell.output_tokens_per_s == pytest.approx(8 * 256 / (0.15 + 0.007 * 255))
    assert cell.output_tokens_per_s * cell.tpot_s == pytest.approx(8 * 0.92, rel=0.01)  # who is not being prefilled decodes


@pytest.mark.parametrize(
    ("after", "since", "message"),
    [
        (metrics(requests=50), metrics(), "must not be below that of before .* the server was restarted"),
        (metrics().replace("1.7e9", "1.8e9"), metrics(requests=10, drafts=10), "same run of the server as before"),
        (metrics(prefix="llamacpp:"), metrics(), "one is of vLLM, the other of llama.cpp"),
        (table(), metrics(), "--since goes with Prometheus text"),
        (metrics(requests=0), None, "nothing was observed; scrape after the load ran"),
        (metrics() + "vllm:broken{ 3\n", None, "is not Prometheus text: 'vllm:broken"),
        (metrics() + "vllm:x_total NaN\n", None, "must be a finite number of at least 0, got 'NaN'"),
        (metrics() + "vllm:x_total -1\n", None, "must be a finite number of at least 0, got '-1'"),
        (metrics() + 'vllm:x_total{model_name="b"} 1\n', None, "metrics of one model"),
        (metrics().replace('position="2"', 'position="7"'), None, "must be 0, 1, .."),
        (metrics().replace('position="2"', 'x="2"'), None, "must be 0, 1, .., got"),
        (metrics() + "llamacpp:x_total 1\n", None, "metrics of one engine"),
        ("# HELP a b\na 1\n", None, "prefix vllm: or llamacpp:, got 'none'|got none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_metrics_is_named(after, since, message):
    with pytest.raises(BadInput, match=message):
        read(after, AT_8, since)


def test_metrics_do_not_name_drafter_or_concurrency():
    for given, message in ((Given(concurrency=8), "does not name the drafter"), (EAGLE, "does not say concurrency; give --max-concurrency")):
        with pytest.raises(BadInput, match=message):
            read(metrics(), given)


# ---- what is none of them


@pytest.mark.parametrize("content", ["", "hello", "drafter;draft_len;tpot_s\n", "<html>", "\x00\x01"])
def test_an_unknown_kind_is_refused_with_what_was_looked_for(content):
    with pytest.raises(BadInput, match=r"of no known kind; looked for a CSV header \(columns drafter, .* Prometheus text"):
        read(content)
