"""Steps composed of one layer's kernel times: what made the tables comes back, and a real vLLM run is simulated with it."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from planner.cost.layer_step import ONCE, PER_LAYER, PER_SEQUENCE, LayerStep
from planner.errors import BadInput
from planner.importers.layer_tables import Curve, LayerTables, read_layer_tables
from planner.simulator.engine import Server, StepLoad, simulate
from planner.simulator.scheduler import Batching, KVRoom
from planner.simulator.workload import Request

SHARED = Path(os.environ.get("PLANNER_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "measured/serving"
RUN, LAYER = SHARED / "rtx4090_real_run/Llama-3.1-8B", SHARED / "rtx4090_layer_profile/meta-llama/Llama-3.1-8B/bf16/tp1"
CHUNKS, KEPT, DECODING, LENGTHS = (16, 64, 256), (0, 16, 256, 1024), (1, 4, 16), (16, 128, 1024)


def attention_s(chunk: float, kept: float, decoding: float, length: float) -> float:
    """Linear in each of its four, so that interpolation is exact."""
    return 1e-6 * (5 + 0.1 * chunk + 0.002 * kept + 0.0001 * chunk * kept + decoding * (1 + 0.02 * length))


def made(attention=attention_s) -> LayerTables:
    points = [(0, 0, n, length) for n in DECODING for length in LENGTHS]
    points += [(chunk, kept, n, length) for chunk in CHUNKS for kept in KEPT for n in DECODING for length in LENGTHS]
    points += [(chunk, kept, 0, 0) for chunk in CHUNKS for kept in KEPT]
    linear = Curve(np.array([1, 512]), 1e-6 * np.array([10.0, 521.0]))  # 9 + tokens
    return LayerTables(
        {name: linear for name in PER_LAYER | ONCE}, {name: Curve(np.array([1, 64]), 1e-6 * np.array([1.0, 64.0])) for name in PER_SEQUENCE},
        np.array(points), np.array([attention(*point) for point in points]),
    )  # fmt: skip


def load(prefill=0, prompts=0, pairs=0, decoding=0, context=0, draft_len=0) -> StepLoad:
    return StepLoad(prefill, prompts, pairs, decoding, context, draft_len)


def dense_s(tokens: int, requests: int, layers: int) -> float:
    return 1e-6 * ((8 * layers + 2) * (9 + tokens) + 2 * requests)


def test_a_step_is_the_sum_of_its_kernels():
    step = LayerStep(made(), 32, captured=(), overhead_s=1e-4)
    decode = step.step_s(load(decoding=3, context=3 * 500))
    assert decode == pytest.approx(dense_s(3, 3, 32) + 32 * attention_s(0, 0, 3, 500) + 1e-4)
    mixed = step.step_s(load(100, 1, 100 * 300 + 100 * 101 // 2, 3, 3 * 500))
    assert mixed == pytest.approx(dense_s(103, 4, 32) + 32 * attention_s(100, 300, 3, 500) + 1e-4)
    alone = step.step_s(load(100, 1, 100 * 101 // 2))
    assert alone == pytest.approx(dense_s(100, 1, 32) + 32 * attention_s(100, 0, 0, 16) + 1e-4)


def test_several_steps_at_once_are_each_step_alone():
    step = LayerStep(made(), 2)
    context = np.arange(600, 660, 3)
    at_once = step.step_s(StepLoad(*[np.zeros(20, dtype=int)] * 3, np.full(20, 3), context, 0))
    assert at_once.tolist() == [float(step.step_s(load(decoding=3, context=int(c)))) for c in context]
    several = StepLoad(np.array([0, 64]), np.array([0, 1]), np.array([0, 2080]), np.array([3, 5]), np.array([600, 900]), 0)
    assert step.step_s(several).tolist() == [float(step.step_s(load(*(int(column[i]) for column in several[:5])))) for i in range(2)]


def test_graphs_round_tokens_up_to_a_captured_size():
    step = LayerStep(made(lambda *point: 1e-6), 1)
    seconds = [float(step.step_s(load(decoding=n, context=20 * n))) - 2e-6 * n for n in range(1, 17)]
    assert np.allclose(seconds[8:16], seconds[15]) and np.allclose(seconds[4:8], seconds[7]) and seconds[7] < seconds[8]


def test_prompts_that_share_a_step_cost_less_than_one_as_long():
    step = LayerStep(made(), 32)
    together = step.step_s(load(200, 4, 4 * 50 * 51 // 2))
    assert step.step_s(load(50, 1, 50 * 51 // 2)) < together < step.step_s(load(200, 1, 200 * 201 // 2))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (load(decoding=2, context=100, draft_len=3), "no drafter and no verification, got draft_len 3"),
        (load(decoding=2, context=2 * 1100), "reaches 1024, a step has 1100"),
        (load(decoding=17, context=17 * 100), "reaches 16, a step has 17"),
        (load(500, 1, 500 * 501 // 2, 20, 2000), "reach 512 tokens and 64 requests a step, got 520 and 21"),
        (load(300, 1, 300 * 301 // 2), "reaches 256, a step has 300"),
    ],
)
def test_what_the_tables_do_not_reach_is_refused(asked, message):
    with pytest.raises(BadInput, match=message):
        LayerStep(made(), 32).step_s(asked)


def test_tables_with_a_hole_or_an_unknown_kernel_are_refused():
    tables = made()
    with pytest.raises(BadInput, match=r"every combination of its values, \[1, 16\] is missing"):
        LayerStep(tables._replace(attention=tables.attention[1:], attention_s=tables.attention_s[1:]), 32)
    with pytest.raises(BadInput, match=r"dense must hold the layers layernorm.*, got moe"):
        LayerStep(tables._replace(dense={"moe": tables.dense["o_proj"]}), 32)


@pytest.mark.skipif(not LAYER.is_dir(), reason=f"{LAYER} does not exist; set PLANNER_SHARED to the folder that holds measured/")
def test_a_real_vllm_run_is_predicted_from_the_layer_tables_alone():
    """casys-kaist/LLMServingSim (MIT): 300 requests, Llama-3.1-8B on an RTX 4090, vLLM 0.19."""
    requests = [json.loads(line) for line in gzip.decompress((RUN / "requests.jsonl.gz").read_bytes()).splitlines()]
    queued, first, last = (np.array([request[name] for request in requests]) for name in ("queued_ts", "first_token_ts", "last_token_ts"))
    arrivals = [
        Request(arrival_s=float(at), input_len=request["input_toks"], output_len=request["output_toks"])
        for at, request in zip(queued - queued.min(), requests, strict=True)
    ]
    server = Server(cost=LayerStep(read_layer_tables(LAYER), 32), room=KVRoom(blocks=2588), batching=Batching(max_num_batched_tokens=2048))
    outcome = simulate(arrivals, server)
    tpot_s = (last - first) / (outcome.output_len - 1)
    assert outcome.tpot_s.mean() == pytest.approx(tpot_s.mean(), rel=0.03) and outcome.e2e_s.mean() == pytest.approx((last - queued).mean(), rel=0.05)
    assert outcome.ttft_s.mean() == pytest.approx((first - queued).mean(), rel=0.10)
    for share in (10, 50, 90, 99):
        assert np.percentile(outcome.tpot_s, share) == pytest.approx(np.percentile(tpot_s, share), rel=0.05)
    assert np.median(np.abs(outcome.e2e_s / (last - queued) - 1)) < 0.01  # request by request
