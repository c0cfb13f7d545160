"""Runs in the environment of SGLang: words of `sglang` through its own dispatch, parser and resolution, without a server or a GPU.

Reads a line of JSON for each question and answers with one.

question  {"argv": words after `sglang`, or `python3 -m` and a benchmark, "cwd": folder}
answer    {"config": ...} or {"error": ...}, and what was logged
`--device cuda` makes it apply the rules of a CUDA device. Abbreviations are refused, so that each word is a whole name: SGLang takes them.
"""

import argparse
import contextlib
import importlib.machinery
import io
import json
import logging
import os
import sys
import types

FIELDS = (
    "model_path", "context_length", "max_running_requests", "mem_fraction_static", "dtype", "kv_cache_dtype", "tp_size", "speculative_algorithm",
    "speculative_draft_model_path", "speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens",
    "speculative_draft_window_size", "speculative_draft_sink_size", "speculative_draft_kv_cache_dtype", "speculative_adaptive",
)  # fmt: skip
OWN_NOISE = "SGLANG_USE_CUDA_IPC_TRANSPORT"  # said of a default of its own


class Lines(logging.Handler):
    """Warnings of one request."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        if OWN_NOISE not in (line := record.getMessage()):
            self.lines.append(line)


class Anything(types.ModuleType):
    """A module that has every name."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stub_torchvision() -> None:
    """SGLang imports it for models that see, and its wheel brings CUDA. After transformers, which looks whether it is there."""
    for name in ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.transforms.v2"):
        module = Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)


def serve(words: list[str]) -> dict:
    """What `sglang serve` would start its server with."""
    from sglang.cli import serve
    from sglang.srt.arg_groups.overrides import resolving_view

    caught = []
    launch = types.ModuleType("sglang.launch_server")
    launch.run_server = caught.append
    sys.modules[launch.__name__] = launch
    serve.kill_process_tree = lambda *args, **kwargs: None  # it ends by killing what it started: this process
    serve.serve(None, [*words, "--device", "cuda", "--skip-tokenizer-init"])
    server_args = caught[0]
    server_args.resolve_once()
    server_args.check_server_args()
    view = resolving_view(server_args)
    found = {name: getattr(view, name) for name in FIELDS}
    if view.speculative_adaptive:
        from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config

        found["candidate_steps"] = resolve_candidate_steps_from_config(cfg_path=view.speculative_adaptive_config)
    return found


def bench(module: str, words: list[str]) -> dict:
    """What its benchmark would run with; `module` is called as by python -m."""
    sys.modules.setdefault("datasets", Anything("datasets"))  # which it downloads with
    from sglang.benchmark import serving

    caught = []
    serving.run_benchmark = caught.append
    sys.argv = [module, *words]
    serving.cli_main()
    return {"bench": module, "dataset_name": caught[0].dataset_name, "max_concurrency": caught[0].max_concurrency}


def answer(request: dict) -> dict:
    os.chdir(request["cwd"])
    root, lines, shown = logging.getLogger(), Lines(), io.StringIO()
    usual, logging.basicConfig = logging.basicConfig, lambda **options: None  # SGLang's call would take our handler away
    root.addHandler(lines)
    first, *words = request["argv"]
    try:
        with contextlib.redirect_stderr(shown):
            found = {"config": serve(words) if first == "serve" else bench(words[1], words[2:])}
    except SystemExit:  # argparse's
        found = {"error": shown.getvalue().strip().splitlines()[-1]}
    except Exception as error:  # noqa: BLE001, whatever it refuses by
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        root.removeHandler(lines)
        logging.basicConfig = usual
    return found | {"said": lines.lines}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to stderr
    argparse.ArgumentParser._get_option_tuples = lambda self, word: []
    import sglang
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer  # noqa: F401

    stub_torchvision()
    print(json.dumps(sglang.__version__), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line)), default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
