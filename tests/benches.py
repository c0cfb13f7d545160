"""Files of benchmark tools in the shape that they write them, with numbers that agree with each other."""

MODEL = "num_layers=32,num_kv_heads=8,head_dim=128,weights_gib=14.96"
SYSTEM = "memory_gib=80,fraction=0.9"
SHARES = [0.7, 0.42, 0.21]  # of rounds that accept position 1, 2, 3; 0.7, 0.6, 0.5 conditional on the one before
PER_ROUND = 1 + sum(SHARES)

HEADER = "drafter,draft_len,concurrency,context_len,output_len,tpot_s,itl_s,output_tokens_per_s,ttft_s,tokens_per_round,acceptance_1,acceptance_2,acceptance_3,tp"


def table(*rows: str) -> str:
    """A CSV table; without rows, off, an idle and a drafting drafter at two loads."""
    usual = [
        ",0,8,1024,256,0.012,0.012,640,0.2,,,,,1",
        ",0,64,1024,256,0.020,0.020,3100,0.4,,,,,1",
        "eagle3,0,8,1024,256,0.013,0.013,600,0.2,1,,,,1",
        f"eagle3,3,8,1024,256,0.007,{0.007 * PER_ROUND},1100,0.2,{PER_ROUND},0.7,0.6,0.5,1",
        f"eagle3,3,64,1024,256,0.015,{0.015 * PER_ROUND},4200,0.4,{PER_ROUND},0.7,0.6,0.5,1",
    ]
    return "\n".join([HEADER, *(rows or usual)]) + "\n"


def vllm(*, draft_len: int = 3, tpot_ms: float = 7.0, max_concurrency: int | None = 8, **changes) -> dict:
    """What vllm bench serve 0.33 saves without --save-detailed; draft_len 0: the server had no drafter."""
    tokens_per_s = 0.95 * (max_concurrency or 8) / tpot_ms * 1e3
    itl_ms = tpot_ms * (PER_ROUND if draft_len else 1)
    record = {
        "date": "20261101-101500", "endpoint_type": "openai", "backend": "openai", "label": None, "model_id": "org/model", "tokenizer_id": "org/model",
        "num_prompts": 100, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": max_concurrency, "duration": 25_600 / tokens_per_s,
        "completed": 100, "failed": 0, "total_input_tokens": 102_400, "total_output_tokens": 25_600, "request_throughput": tokens_per_s / 256,
        "request_goodput": None, "output_throughput": tokens_per_s, "total_token_throughput": 5 * tokens_per_s, "max_output_tokens_per_s": 2e3,
        "max_concurrent_requests": 9, "rtfx": 0.0,
        **{f"{which}_{name}_ms": value for name, value in (("ttft", 150.0), ("tpot", tpot_ms), ("itl", itl_ms)) for which in ("mean", "median", "p99")},
    }  # fmt: skip
    if draft_len:
        record |= {
            "spec_decode_acceptance_rate": 100 * sum(SHARES) / 3, "spec_decode_acceptance_length": PER_ROUND, "spec_decode_num_drafts": 1000,
            "spec_decode_draft_tokens": 3000, "spec_decode_accepted_tokens": 1330, "spec_decode_per_position_acceptance_rates": SHARES,
        }  # fmt: skip
    return record | changes


def sglang(*, algorithm: str | None = "EAGLE3", tpot_ms: float = 7.0, max_concurrency: int = 8, topk: int = 1, **changes) -> dict:
    """What sglang.bench_serving 0.5.23 appends without --output-details."""
    tokens_per_s = 0.95 * max_concurrency / tpot_ms * 1e3
    server = {"version": "0.5.23", "tp_size": 1, "speculative_algorithm": algorithm, "internal_states": [{}]}
    if algorithm:
        server |= {"speculative_num_steps": 3, "speculative_eagle_topk": topk, "speculative_num_draft_tokens": 4}
    return {
        "tag": None, "backend": "sglang", "dataset_name": "random", "request_rate": 1e9, "max_concurrency": max_concurrency,
        "random_input_len": 1024, "random_output_len": 256, "random_range_ratio": 1.0, "server_info": server, "duration": 25_600 / tokens_per_s,
        "completed": 100, "total_input_tokens": 102_400, "total_output_tokens": 25_600, "total_output_tokens_retokenized": 25_590,
        "request_throughput": tokens_per_s / 256, "output_throughput": tokens_per_s, "mean_ttft_ms": 150.0, "median_ttft_ms": 140.0,
        "mean_tpot_ms": tpot_ms, "median_tpot_ms": tpot_ms, "mean_itl_ms": tpot_ms, "median_itl_ms": tpot_ms, "concurrency": 7.6,
        "accept_length": PER_ROUND if algorithm else None,
    } | changes  # fmt: skip


def answer(*, accepted: list[int], drafted: list[int] | None = None, tpot_ms: float = 7.0) -> dict:
    """An answer of a vLLM 0.33 server with per-request metrics; with `drafted` at the level `detailed`."""
    tokens = 1 + len(accepted) + sum(accepted)
    speculation = {
        "mean_acceptance_length": 1 + sum(accepted) / len(accepted), "draft_acceptance_rate": sum(accepted) / sum(drafted or [3] * len(accepted)),
        "acceptance_histogram": [accepted.count(j) for j in range(4)], "num_spec_steps": len(accepted), "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted or [3] * len(accepted)), "num_spec_tokens": 3,
        **({"per_step_accepted": accepted, "per_step_drafted": drafted} if drafted else {}),
    }  # fmt: skip
    times = {"time_to_first_token_ms": 100.0, "generation_time_ms": tpot_ms * (tokens - 1), "queue_time_ms": 50.0}
    return {
        "object": "chat.completion",
        "usage": {"prompt_tokens": 1024, "completion_tokens": tokens, "total_tokens": 1024 + tokens},
        "metrics": {**times, "speculative_decoding": speculation},
    }


def metrics(requests: int = 100, *, drafts: int = 10_000, prefix: str = "vllm:", engines: int = 1) -> str:
    """A scrape of a server that answered so many requests of 1024 and 256 tokens, at 7 ms a token."""
    lines = [
        "# HELP python_info Python platform information",
        'python_info{implementation="CPython",version="3.12"} 1.0',
        "process_start_time_seconds 1.7e9",
    ]
    for engine in range(engines):
        labels = f'engine="{engine}",model_name="org/model, \\"8B\\""'
        share = requests / engines
        values = {
            "request_prompt_tokens_sum": 1024 * share, "request_prompt_tokens_count": share, "request_generation_tokens_sum": 256 * share,
            "request_generation_tokens_count": share, "request_time_per_output_token_seconds_sum": 0.007 * share,
            "request_time_per_output_token_seconds_count": share, "inter_token_latency_seconds_sum": 0.007 * 255 * share,
            "inter_token_latency_seconds_count": 255 * share / PER_ROUND, "time_to_first_token_seconds_sum": 0.15 * share,
            "time_to_first_token_seconds_count": share, "e2e_request_latency_seconds_sum": (0.15 + 0.007 * 255) * share,
            "e2e_request_latency_seconds_count": share, "spec_decode_num_drafts_total": drafts / engines,
            "spec_decode_num_draft_tokens_total": 3 * drafts / engines, "spec_decode_num_accepted_tokens_total": sum(SHARES) * drafts / engines,
            "tokens_predicted_total": 256 * share, "tokens_predicted_seconds_total": 0.007 * 256 * share,
        }  # fmt: skip
        lines += [f"{prefix}{name}{{{labels}}} {value}" for name, value in values.items()]
        for position, accepted in enumerate(SHARES):
            lines.append(f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{position}"}} {accepted * drafts / engines}')
        lines += [f'{prefix}time_to_first_token_seconds_bucket{{{labels},le="+Inf"}} {share}', f"{prefix}kv_cache_usage_perc{{{labels}}} NaN"]
    return "\n".join(lines) + "\n"
