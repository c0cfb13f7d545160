"""Tables that contradict themselves, and published ones that do not.

tests/published/budgetdraft.csv: arXiv:2606.00144, plain decoding, table 1 panel A (draft_len from figure 3 and, for LWM at 16K, from
its text), table 3 and the peaks of figure 3. Its 8K rows of table 1 are divided by plain decoding at 16K, and one acceptance of 16K
is higher at K = 20 than at K = 5.
"""

from pathlib import Path

import pytest

import planner
from planner.errors import BadInput
from planner.importers.published_table import COLUMNS, is_published, read_published

BUDGETDRAFT = Path(__file__).parents[1] / "published/budgetdraft.csv"
HEADER = "table,drafter,texts,context_len,kv_budget,draft_len,batch,temperature,tokens_per_round,speedup,tpot_s,round_s,tokens_per_s"

# Qwen3-32B with Qwen3-1.7B under vLLM, one stream: draft_len, accepted length, ITL ms, TPOT ms
SINGLE_STREAM = [(0, None, 23.65, 23.65), (1, 1.8, 26.81, 14.94), (2, 2.4, 29.58, 12.33), (3, 2.87, 31.7, 11.07), (4, 3.28, 34.33, 10.46),
                 (5, 3.53, 36.87, 10.44), (6, 3.7, 39.36, 10.65), (7, 3.9, 41.4, 10.63), (8, 4.04, 44.7, 11.07)]  # fmt: skip

# arXiv:2408.11049, its project page at 8K: ms a token and tokens a second, of 32, 48, 64 and 128 requests; the third 2237 is a copy
FRONTIER = {"": [(32, 16.53, 1936), (48, 21.45, 2237), (64, 31.49, 2237), (128, 49.89, 2565)],
            "self": [(32, 12.83, 2493), (48, 15.26, 3146), (64, 20.09, 3186), (128, 30.41, 4209)]}  # fmt: skip

# its table: device, target, drafter, prefill, batch, draft_len, speedup
MAGICDEC = """8xA100,Llama-3.1-8B,self,32768,32,3,1.22
8xA100,Llama-3.1-8B,self,32768,64,3,1.38
8xA100,Llama-3.1-8B,self,32768,128,4,1.47
8xA100,Llama2-7B,self,8192,32,3,1.18
8xA100,Llama2-7B,self,8192,64,3,1.48
8xA100,Llama2-7B,self,8192,128,4,1.63
8xA100,Llama2-7B,self,32768,32,4,2.0
8xA100,Llama2-7B,TinyLlama,8192,32,3,1.29
8xA100,Llama2-7B,TinyLlama,8192,64,3,1.57
8xA100,Llama2-7B,TinyLlama,8192,128,4,1.66
8xA100,Llama2-7B,TinyLlama,32768,32,4,1.91
8xH100,Llama-3.1-8B,self,32768,32,3,1.23
8xH100,Llama-3.1-8B,self,32768,64,3,1.43
8xH100,Llama2-7B,self,8192,32,3,1.19
8xH100,Llama2-7B,self,8192,64,4,1.42
8xH100,Llama2-7B,self,8192,128,4,1.65
8xH100,Llama2-7B,TinyLlama,8192,32,2,1.32
8xH100,Llama2-7B,TinyLlama,8192,64,3,1.48
8xH100,Llama2-7B,TinyLlama,8192,128,3,1.64"""

# TriForce (68M + 7B) and others on LWM, table 2 of arXiv:2606.00144
TRIFORCE = ["2,TriForce,LWM,8192,4096,3,1,0.6,,1.21,,,", "2,TriForce,LWM,16384,4096,3,1,0.6,,1.19,,,",
            "2,llama-68m,LWM,8192,2048,5,1,0,,2.54,,,", "2,llama-68m,LWM,16384,2048,5,1,0,,1.52,,,"]  # fmt: skip


@pytest.fixture
def audit(tmp_path):
    def call(*rows: str, header: str = HEADER, **flags):
        (tmp_path / "t.csv").write_text("\n".join([header, *rows]) + "\n")
        return planner.audit(tmp_path / "t.csv", **flags)

    return call


def single_stream(change=None) -> list[str]:
    rows = [("" if not k else "qwen3-1.7b", k, length, itl, tpot) for k, length, itl, tpot in SINGLE_STREAM]
    rows = rows if change is None else [change(row) for row in rows]
    return [f",{name},,1000,,{k},1,,{'' if length is None else length},,{tpot / 1e3},{itl / 1e3}," for name, k, length, itl, tpot in rows]


def kinds(found) -> set[str]:
    return {fault.kind for fault in found.faults}


def frontier_rows(third: float) -> list[str]:
    points = [(drafter, *point) for drafter, of in FRONTIER.items() for point in of]
    return [f",{drafter},,8192,,{3 if drafter else 0},{batch},,,,{ms / 1e3},,{third if ms == 31.49 else rate}" for drafter, batch, ms, rate in points]


def test_both_faults_of_budgetdraft_are_found_with_their_rows():
    found = planner.audit(BUDGETDRAFT)
    lines = BUDGETDRAFT.read_text().splitlines()
    by_kind = {fault.kind: {lines[int(row.rpartition(":")[2]) - 1] for row in fault.rows} for fault in found.faults}
    assert by_kind["baseline"] == {line for line in lines if line.startswith("1,") and ",8192," in line}
    assert "baseline at 16384 tokens of context, not 8192" in next(fault.what for fault in found.faults if fault.kind == "baseline")
    assert by_kind["acceptance"] == {"1,llama-68m,LWM,16384,2048,20,0.3417,2.10,", "3,llama-68m,LWM,16384,2048,5,0.3392,1.52,"}
    assert by_kind["speedup"] == {line for line in by_kind["baseline"] if ",LB," in line}  # 2.13 with 2.02 tokens per round
    assert len(found.distrust) == 14 and by_kind.keys() == {"baseline", "acceptance", "speedup"}


def test_a_table_corrected_by_the_ratio_of_the_baselines_has_the_other_fault_alone(audit):
    plain = {"GS": 30.4 / 19.41, "LB": 30.1 / 19.67, "LWM": 29.51 / 19.43}
    header, *rows = [line.split(",") for line in BUDGETDRAFT.read_text().splitlines()]
    for row in rows:
        if row[0] == "1" and row[3] == "8192":
            row[7] = str(float(row[7]) / plain[row[2]])
    assert kinds(audit(*map(",".join, rows), header=",".join(header))) == {"acceptance"}


def test_a_wrong_baseline_shows_in_the_cost_of_drafting_where_no_cell_is_printed_twice(audit):
    kept = [line for line in BUDGETDRAFT.read_text().splitlines()[1:] if not line.startswith("figure") and ",LB," not in line]
    found = audit(*kept, header=BUDGETDRAFT.read_text().splitlines()[0])
    (fault,) = [fault for fault in found.faults if fault.kind == "baseline"]
    assert len(fault.rows) == 8 and "0.245 ms a token at 8192 tokens of context, 2.74 ms at 4096" in fault.examples[0]


def test_consistent_tables_raise_no_alarm(audit):
    assert audit(*single_stream()).faults == []
    found = audit(*MAGICDEC.splitlines(), header="device,target,drafter,context_len,batch,draft_len,speedup")
    assert found.faults == [] and found.num_rows == 19
    assert audit(*TRIFORCE).faults == []
    assert audit(*frontier_rows(third=64 / 0.03149)).faults == []


def test_a_copied_number_of_a_published_frontier_is_found(audit):
    found = audit(*frontier_rows(third=2237))
    assert [(fault.what, fault.rows) for fault in found.faults] == [("tpot_s is not batch / tokens_per_s", ["t.csv:4"])]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda row: (*row[:2], 3.3, row[3], row[3] / 3.3) if row[1] == 7 else row, "acceptance"),  # 3.7 tokens with 6 drafted
        (lambda row: (*row[:2], 5.5, row[3], row[3] / 5.5) if row[1] == 8 else row, "acceptance"),  # .56 accepted, .41 with 7
        (lambda row: (*row[:2], 9.5, row[3], row[3] / 9.5) if row[1] == 8 else row, "tokens"),
        (lambda row: (*row[:3], row[3] / 2, row[4] / 2) if row[1] == 8 else row, "draft_cost"),
        (lambda row: (*row[:3], row[3] / 3, row[4] / 3) if row[1] == 3 else row, "speedup"),
        (lambda row: (*row[:3], row[3] * 1.2, row[4]) if row[1] == 3 else row, "row"),
    ],
)
def test_a_single_wrong_row_is_caught(audit, change, kind):
    assert kind in kinds(audit(*single_stream(change)))


def test_a_speedup_beside_its_own_time_shows_whose_baseline_it_has(audit):
    rows = [",,,4096,,0,1,,,,0.02,,", ",,,8192,,0,1,,,,0.03,,", ",,,16384,,0,1,,,,0.05,,", ",d,,8192,,5,1,,4,2,0.015,,"]
    assert audit(*rows).faults == []
    (fault,) = audit(*rows[:3], rows[3].replace("4,2,0.015", "4,3.33,0.015")).faults
    assert fault.kind == "baseline" and fault.what.endswith("at 16384 tokens of context, not 8192") and fault.rows == ["t.csv:5"]
    (fault,) = audit(*rows[:3], rows[3].replace("4,2,0.015", "4,2.6,0.015")).faults  # nobody's
    assert fault.what == "the speedup is not the ratio of the times"
    (fault,) = audit(*rows, ",,,8192,,0,1,,,,0.04,,").faults
    assert fault.what == "plain decoding of one context is given twice and differs" and fault.rows == ["t.csv:3", "t.csv:6"]


def test_steps_cannot_be_faster_than_reading_their_weights(audit):
    size = "num_layers=64,num_kv_heads=8,head_dim=128,weights_gb="
    fits = {"system": "h100_sxm", "model": f"{size}65.5", "draft_models": {"qwen3-1.7b": f"{size}4"}}  # 19.6 and 1.2 ms
    assert audit(*single_stream(), **fits).faults == []
    assert kinds(audit(*single_stream(), **fits | {"draft_models": {"qwen3-1.7b": f"{size}20"}})) == {"draft_cost"}
    assert kinds(audit(*single_stream(), **fits | {"system": "memory_gib=80,bandwidth_gb_s=1000,fraction=0.9"})) == {"weight_read", "draft_cost"}
    with pytest.raises(BadInput, match="give --system as well"):
        audit(*single_stream(), model=f"{size}65.5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",d,,8192,,5,1,0,,1.2,,", "a field for each"),
        (",,,8192,,5,1,0,,1.2,,,", "drafter must be empty where draft_len is 0, and only there"),
        (",d,,8192,,5,1,0,,-1,,,", "column speedup must lie between"),
        (",d,,,,5,1,0,,1,,,", "must say context_len and draft_len"),
        (",d,,8192,,5.5,1,0,,1,,,", "column draft_len must be a whole number"),
        (f",{'d' * 201},,8192,,5,1,0,,1,,,", "at most 200 characters"),
    ],
)
def test_a_bad_row_is_refused_with_line_and_column(audit, row, message):
    with pytest.raises(BadInput, match=f"line 2.*{message}"):
        audit(row)


def test_percent_and_unknown_columns_are_refused():
    with pytest.raises(BadInput, match="write a share, not percent"):
        read_published(b"drafter,context_len,draft_len,acceptance\nd,8192,5,67.9\n", "t")
    with pytest.raises(BadInput, match=r"unknown column 'accepted'; known are .*acceptance"):
        read_published(b"drafter,context_len,draft_len,accepted\nd,8192,5,0.6\n", "t")
    with pytest.raises(BadInput, match="draft_len is missing"):
        read_published(b"drafter,context_len\nd,8192\n", "t")
    assert is_published(set(COLUMNS)) and not is_published({"drafter", "draft_len", "context_len", "concurrency", "output_len", "tpot_s"})
