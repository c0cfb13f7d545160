"""A llama.cpp server whose drafts are accepted at rates that are given, until its standard input ends. Needs xllamacpp.

    python benchmarks/synthetic_server.py '{"model": "target.gguf", "port": 8080, "threads": 1,
                                            "drafter": "drafter.gguf", "draft_len": 4, "rates": [0.9, 0.8, 0.7, 0.6]}'

drafter   none: the server does not speculate
rates[i]  share of rounds that accept draft i, not rising; the drafter runs and is timed as usual, what it proposes does not count
"""

import json
import sys

import xllamacpp


def main() -> None:
    asked = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.port, params.endpoint_metrics = asked["port"], True
    params.n_parallel, params.n_ctx, params.n_gpu_layers = 1, 1024, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    if asked.get("drafter"):
        speculative = params.speculative
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = asked["drafter"]
        speculative.draft.n_max, speculative.draft.p_min = asked["draft_len"], 0.0
        speculative.draft.cpuparams.n_threads = speculative.draft.cpuparams_batch.n_threads = asked["threads"]
        speculative.synth_rates = asked["rates"]
    server = xllamacpp.Server(params)  # parameters are copied: other rates need another server
    print(f"listening on {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
