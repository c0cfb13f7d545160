"""Profile a model on the device it is deployed on, and plan for it. Needs the extra [runtime]; minutes on a GPU.

    python examples/profile_gpu.py MODEL TEXTS OUT.json [cuda|cpu]

MODEL is a Hugging Face folder or a GGUF file, TEXTS a .txt or .jsonl file or a folder of them: text like that of the deployment.
"""

import sys

import planner
from planner.files import remove_journal
from planner.specs import describe


def main(model: str, texts: str, out: str, device: str = "cuda", **changes) -> None:
    """changes  of the settings, for a quicker look"""
    settings = planner.Settings(
        contexts=[2048, 8192],
        samplers=[planner.Sampler(), planner.Sampler(temperature=1.0)],  # greedy and sampled: acceptance does not carry over between them
        policies=[planner.SparseKV(budget=budget, selection=selection) for budget in (256, 1024) for selection in ("window", "retrieval")],
        batches=[1, 4, 16],
    )._replace(**changes)
    profile = planner.profile(model, [texts], settings=settings, device=device, out=out, resume=True)  # goes on after a crash
    planner.save_profile(profile, out)
    remove_journal(out)  # what it would have gone on from
    for warning in profile.warnings:  # a busy machine, repetitive text
        print(f"warning: {warning}", file=sys.stderr)
    for context_len in profile.contexts:
        for sampler in profile.samplers:
            plan = planner.plan(out, context_len=context_len, temperature=sampler.temperature)
            gain = plan.speedup
            print(
                f"{context_len} tokens, temperature {sampler.temperature:g}: {describe(plan.chosen)}, {gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}] times as fast"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
