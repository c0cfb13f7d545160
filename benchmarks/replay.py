"""Is replay right? Tokens per round predicted from texts that plain decoding wrote, beside the real decode loop's.

SmolLM2-135M, real texts, self_sparse at two budgets and two temperatures, the same prompts for both; at temperature 1
both are samples, so the two agree within the interval of their difference, not exactly. About five minutes.
"""

import numpy as np
import torch
from common import report, texts, wants_json
from scipy import stats

from planner.commands.session import open_session
from planner.cost.renewal import expected_rounds
from planner.datasets import expand
from planner.profiler.acceptance import replay, write_texts
from planner.profiler.texts import draw_prompts
from planner.profiler.trial import run_trials
from planner.runtime.model import prefill
from planner.specs import DraftConfig, DrafterSpec, Sampler, SparseKV

CONTEXT_LEN, OUTPUT_LEN, NUM_TEXTS, DRAFT_LEN = 1024, 64, 6, 4


def main() -> None:
    as_json = wants_json(__doc__)
    session = open_session("smollm2")
    model = session.model
    prompts = draw_prompts(session.tokenizer, expand([texts()]), length=CONTEXT_LEN, count=NUM_TEXTS, seed=0)
    cache = model.new_cache(CONTEXT_LEN + OUTPUT_LEN, batch=NUM_TEXTS)
    logits = prefill(model, torch.tensor([prompt.tokens for prompt in prompts]), cache)
    configs = [DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=budget), draft_len=DRAFT_LEN) for budget in (64, 512)]
    rows, figures = [], {}
    for temperature in (0.0, 1.0):
        sampler = Sampler(temperature=temperature)
        cache.truncate(CONTEXT_LEN)
        written = write_texts(
            model, cache, prompts, CONTEXT_LEN, logits, sampler, output_len=OUTPUT_LEN, stop_tokens=(), seeds=list(range(NUM_TEXTS))
        )
        predicted = {}
        for config in configs:
            samples = [replay(model, text, config, index) for index, (_, text) in enumerate(written)]
            accept_prob = np.stack([sample.accept_prob.unpack() / 255 for sample in samples])
            drafted = np.stack([sample.drafted.unpack().astype(int) for sample in samples])
            predicted[config] = expected_rounds(accept_prob, drafted, DRAFT_LEN).rounds
        trials = list(run_trials(model, prompts, configs, sampler, output_len=OUTPUT_LEN, stop_tokens=(), seed=100))
        for config in configs:
            measured = np.array([len(trial.round_s) for trial in trials if trial.config == config])
            gap = measured - predicted[config]
            half = stats.t.ppf(0.95, NUM_TEXTS - 1) * gap.std(ddof=1) / np.sqrt(NUM_TEXTS)
            later = OUTPUT_LEN - 1
            ratio = predicted[config].mean() / measured.mean()  # of tokens per round, loop over replay
            rows.append(
                {
                    "budget": config.kv.budget,
                    "temperature": temperature,
                    "replay tokens/round": f"{later / predicted[config].mean():.3f}",
                    "loop tokens/round": f"{later / measured.mean():.3f}",
                    "rounds per text, loop - replay": f"{gap.mean():+.2f} [{gap.mean() - half:+.2f}, {gap.mean() + half:+.2f}]",
                }
            )
            figures[f"loop_over_replay/{config.kv.budget}/{temperature:g}"] = float(ratio)
    report(rows, figures, as_json)


if __name__ == "__main__":
    main()
