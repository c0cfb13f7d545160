"""A public vLLM measurement of Qwen3-32B drafted for by Qwen3-1.7B, one stream, one 80 GB GPU: fitted on some rows, asked for all.

Inter-token latency in ms, mean accepted length, acceptance per position in percent (unconditional), by num_speculative_tokens.
"""

import numpy as np
import pytest

from planner.cost.serving import Cells, fit_serving
from planner.serving import ModelSize, ServedCell, ServingProfile, SystemSpec

ROWS = {
    0: (23.65, 1.0, []),
    1: (26.81, 1.8, [79.51]),
    2: (29.58, 2.4, [79.18, 60.82]),
    3: (31.7, 2.87, [77.12, 59.8, 49.67]),
    4: (34.33, 3.28, [78.28, 60.67, 49.44, 39.7]),
    5: (36.87, 3.53, [78.23, 58.47, 46.37, 38.31, 31.85]),
    6: (39.36, 3.7, [76.79, 55.7, 44.73, 37.13, 29.96, 25.74]),
    7: (41.4, 3.9, [75.56, 56.0, 45.33, 36.0, 29.33, 25.33, 22.22]),
    8: (44.7, 4.04, [76.04, 55.76, 44.24, 35.48, 28.11, 24.42, 21.66, 18.43]),
}
BEST, SPEEDUP = 5, 2.27
TPOT_MS = np.array([itl / tokens for itl, tokens, _ in ROWS.values()])


def cell(k: int) -> ServedCell:
    itl, tokens, reached = ROWS[k]
    kept = [b / a for a, b in zip([100, *reached], reached, strict=False)]
    return ServedCell(
        drafter="draft_model" if k else "none", draft_len=k, concurrency=1, context_len=1000, output_len=300, tpot_s=itl / tokens / 1e3,
        itl_s=itl / 1e3, tokens_per_round=tokens if k else None, acceptance=kept,
    )  # fmt: skip


@pytest.mark.parametrize("seen", [(0, 1, 3, 5, 8), (0, 2, 4, 8), (0, 1, 8), (0, 5), (0, 3)])
def test_some_rows_say_the_best_length_and_what_it_gains(seen):
    profile = ServingProfile(
        source="published", date="2026", planner_version="0", drafters={}, cells=[cell(k) for k in seen],
        model=ModelSize(name="Qwen3-32B", num_layers=64, num_kv_heads=8, head_dim=128, weights_bytes=65 * 10**9),
        system=SystemSpec(name="80 GB", memory_bytes=80 * 10**9, fraction=0.9),
    )  # fmt: skip
    model, k = fit_serving(profile), np.arange(9)
    cells = Cells(np.minimum(k, 1), k, *(np.array([value]) for value in (1, 1000, 300)))
    off = Cells(np.zeros(9, int), np.zeros(9, int), *cells[2:])
    found = model.predict(cells)
    assert int(found.tpot_s.argmin()) == BEST
    assert np.abs(1e3 * found.tpot_s / TPOT_MS - 1).max() < 0.05
    assert (np.abs(np.log(1e3 * found.tpot_s / TPOT_MS)) < 1.645 * found.sd_tpot).all()
    speedup = found.tpot_s[0] / found.tpot_s[BEST]
    half = 1.645 * model.ratio_sd(off, cells, "tpot")[BEST]
    assert speedup * np.exp(-half) < SPEEDUP < speedup * np.exp(half)
