"""A tiny model on one process and on several, doing the same; run as a script by each of torchrun's processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import NATIVE, prefilled, random_prompt, tiny_checkpoint

from planner.errors import BadInput, PlannerError
from planner.files import process_rank, write_whole
from planner.runtime.decode import decode
from planner.runtime.drafters import drafting_model, make_drafter
from planner.runtime.kernels import Kernels
from planner.runtime.model import Transformer
from planner.runtime.native import NativeKernels
from planner.runtime.parallel import build_sharded, load_shard
from planner.runtime.ranks import Ranks, join_ranks
from planner.specs import PLAIN, DraftConfig, DrafterSpec, Sampler, SparseKV

SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(temperature=1.0, top_p=0.95)}
FULL, CHEAP = DrafterSpec(kind="self_sparse"), DrafterSpec(kind="self_sparse", weights="int8", vocab=40)
CONFIGS = {
    "none": PLAIN,
    "ngram": DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=3),
    "window": DraftConfig(drafter=FULL, kv=SparseKV(budget=24, sink=2, recent=8), draft_len=3),
    "chunk": DraftConfig(drafter=FULL, kv=SparseKV(budget=24, sink=2, recent=8, selection="chunk"), draft_len=3),
    "cheap": DraftConfig(drafter=CHEAP, kv=SparseKV(budget=24, sink=2, recent=8), draft_len=3),
}
PROMPTS = [random_prompt(60, seed=1), random_prompt(47, seed=2)]
OUTPUT = 16
MODELS = {"tied": {}, "untied": {"tie_embeddings": False, "num_kv_heads": 4}}


def checkpoint(**changes):
    found = tiny_checkpoint(sharpness=1.5, **changes)
    if not found.spec.tie_embeddings:
        found.tensors["lm_head.weight"] = found.tensors["model.embed_tokens.weight"].flip(0).contiguous()
    return found


def written(model: Transformer, config: DraftConfig, sampler: Sampler) -> list[list[int]]:
    """What two streams write, and how many of their drafts were accepted."""
    cache, logits = prefilled(model, PROMPTS, 60 + OUTPUT + config.draft_len)
    rounds = decode(
        model, cache, PROMPTS, logits, make_drafter(config, model, batch=2), draft_len=config.draft_len, sampler=sampler,
        generators=[torch.Generator().manual_seed(7 + b) for b in range(2)], max_new_tokens=OUTPUT,
    )  # fmt: skip
    outputs = [[], [], [0]]
    for round_ in rounds:
        for output, tokens in zip(outputs, round_.tokens):
            output += tokens
        outputs[2][0] += sum(round_.accepted)
    return outputs


def all_written(model: Transformer) -> dict[str, list[list[int]]]:
    configs = CONFIGS if model.spec.tie_embeddings else {"chunk": CONFIGS["chunk"]}
    return {f"{name} {how}": written(model, config, sampler) for name, config in configs.items() for how, sampler in SAMPLERS.items()}


@torch.inference_mode()
def logits(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """[60, V] of a whole prompt, and the hidden state that a tap sees after the first layer."""
    cache = model.new_cache(60)
    out = model(torch.tensor(PROMPTS[:1]), torch.arange(60)[None], cache, taps=(0,))
    return model.logits(out.hidden)[0], out.taps[0][0]


def run_on_ranks(*words: str, size: int = 2, module: bool = False) -> subprocess.CompletedProcess:
    """torchrun, with a thread for each process; `words` name a script, or a module, and its arguments."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *["-m"] * module, *map(str, words)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths})


def refusal(work) -> str:
    try:
        work()
    except PlannerError as error:
        return str(error)
    return ""


def _main(folder: Path) -> None:
    ranks, device = join_ranks(torch.device("cpu"))

    def build(kernels=None, **changes):
        part, _ = load_shard(lambda: checkpoint(**changes), ranks)
        return build_sharded(part, kernels or Kernels(), ranks, device)

    tensors, facts = {}, {}
    for name, changes in MODELS.items():
        model = build(**changes)
        facts[name] = {
            "written": all_written(model),
            "cache": model.new_cache(50, batch=2).nbytes,
            "weights": model.nbytes,
            "int8 copy": model.extra_nbytes(drafting_model(DrafterSpec(kind="self_sparse", weights="int8"), model)),
            "reduced copy": model.extra_nbytes(drafting_model(CHEAP, model)),
            "int4": refusal(lambda model=model: model.cheaper("int4")),
        }
        tensors[f"{name} logits"], tensors[f"{name} tap"] = logits(model)
    try:
        native = build(NativeKernels(torch.float32), **NATIVE)
        facts["native"] = written(native, CONFIGS["window"], SAMPLERS["greedy"]), native.kernels.execution
    except BadInput:
        facts["native"] = None

    agreed = build().kernels.agreed
    facts["alike"] = agreed(torch.tensor([[3, 4]])).tolist()
    facts["different"] = refusal(lambda: agreed(torch.tensor([[3, 4 + ranks.rank]])))
    facts["first"] = ranks.first(lambda: [Ranks(9, 9), os.getpid()], list[Ranks | int])
    facts["refused"] = refusal(lambda: ranks.first(lambda: (_ for _ in ()).throw(BadInput("rank 0 said no")), int))
    facts["indivisible"] = refusal(lambda: load_shard(lambda: checkpoint(num_heads=3, num_kv_heads=3), ranks))
    write_whole(folder / "written.txt", str(ranks.rank).encode())
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{ranks.rank}.safetensors")
    (folder / f"{ranks.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    assert process_rank() == int(os.environ["RANK"])
    _main(Path(sys.argv[1]))
