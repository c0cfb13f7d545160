"""How far into a draft the shipped drafters of SmolLM2-135M are right: acceptance by position, on texts that none was trained on.

The block-diffusion head, which drafts all positions in one pass, beside the multi-view drafter, which drafts one after the
other, and n-gram: replayed along the same continuations. The acceptance of a position is that of drafts whose earlier ones
were accepted, over all places of a text as a round's start. Intervals are 90 %, over texts. About four minutes on two cores.
"""

import itertools

import numpy as np
from common import held_out, make_parser, report_tables
from continuations import continuations
from scipy import stats

from planner.commands.session import load_drafters, open_session
from planner.profiler.texts import draw_prompts
from planner.runtime.drafters import make_drafter
from planner.specs import DraftConfig, DrafterSpec, SparseKV

CONTEXT_LEN, OUTPUT_LEN, TEMPERATURES, NUM_TEXTS, GROUP, DRAFT_LEN = 2048, 128, [0.0, 0.7, 1.0], 16, 8, 7
DFLASH = DrafterSpec(kind="dflash", path="smollm2-dflash")
DRAFTERS = {
    "dflash": DraftConfig(drafter=DFLASH, draft_len=DRAFT_LEN),
    "dflash, budget 512": DraftConfig(drafter=DFLASH, kv=SparseKV(budget=512, storage="evict"), draft_len=DRAFT_LEN),
    "multi-view": DraftConfig(drafter=DrafterSpec(kind="draft_model", path="smollm2-multi-view"), draft_len=DRAFT_LEN),
    "n-gram": DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=DRAFT_LEN),
}


def main() -> None:
    as_json = make_parser(__doc__).parse_args().json
    session = open_session("smollm2")
    load_drafters(session, [config.drafter for config in DRAFTERS.values()])
    prompts = draw_prompts(session.tokenizer, held_out(), length=CONTEXT_LEN, count=NUM_TEXTS, seed=0)
    reached = {(name, temperature): [] for temperature in TEMPERATURES for name in DRAFTERS}
    for found in continuations(session.model, prompts, [CONTEXT_LEN], TEMPERATURES, output_len=OUTPUT_LEN, group=GROUP):
        for name, config in DRAFTERS.items():
            replayed = make_drafter(config, session.model).replay(found.target_text, DRAFT_LEN)
            chance = replayed.accept_prob * (np.arange(DRAFT_LEN) < replayed.drafted[:, None])
            reached[name, found.temperature].append([1.0, *chance[:-DRAFT_LEN].cumprod(1).mean(0)])  # the last rounds meet the end
    tables, figures = {}, {}
    for temperature in TEMPERATURES:
        rows = []
        for name in DRAFTERS:
            texts = np.array(reached[name, temperature])  # [texts, 1 + K] chance that so many drafts are accepted
            by_position = [after / before for before, after in itertools.pairwise(texts.mean(0)) if before > 0]  # up to the last one reached
            tokens, half = texts.sum(1).mean(), stats.t.ppf(0.95, len(texts) - 1) * texts.sum(1).std(ddof=1) / np.sqrt(len(texts))
            rows.append(
                {"drafter": name}
                | {str(k): f"{by_position[k - 1]:.3f}" if k <= len(by_position) else "" for k in range(1, DRAFT_LEN + 1)}
                | {"tokens per round": f"{tokens:.2f} +-{half:.2f}"}
            )
            figures |= {f"acceptance/{name}/{k}/{temperature:g}": float(value) for k, value in enumerate(by_position, 1)}
            figures[f"tokens_per_round/{name}/{temperature:g}"] = float(tokens)
        tables[f"temperature {temperature:g}, {NUM_TEXTS} texts of {CONTEXT_LEN} tokens"] = rows
    report_tables(tables, figures, as_json)


if __name__ == "__main__":
    main()
