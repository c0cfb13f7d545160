"""Tune your own inference server: it is started a few times, measured under load, and the words to add to its command are printed.

    python examples/tune_server.py 'vllm serve M -tp 2' eagle3 HEAD chats.jsonl tuned/

Needs no torch here; the server brings its own.
"""

import sys

import planner


def main(launch: str, method: str, draft_model: str, dataset: str, folder: str, **changes) -> None:
    """changes  of what is asked, for a quicker look"""
    asked = planner.AskedTune(launch=launch, method=method, draft_model=draft_model, concurrency=(1, 64), cap_minutes=60.0)._replace(**changes)
    tuning = planner.tune([dataset], folder, asked, objective="tpot", resume=True)
    for load in tuning.loads:
        off = f", {100 * load.gain_over_off.value:+.0f} % over off" if load.gain_over_off else ""
        print(f"{load.concurrency} at once: K={load.setting.draft_len}{off}")
    print(tuning.paste)


if __name__ == "__main__":
    main(*sys.argv[1:])
