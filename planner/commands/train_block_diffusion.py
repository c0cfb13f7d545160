"""planner train block-diffusion: a head that drafts a block in one pass, begun as layers of its target.

A folder holds the run: checkpoint.safetensors, log.jsonl with the acceptance met on the way, and in the end head/, the head as
it is published: config.json and model.safetensors, which --draft-model takes. Needs the extra [runtime].
"""

from pathlib import Path

import msgspec

from planner.commands.configs import valid
from planner.commands.progress import Progress, Silent
from planner.commands.session import open_session
from planner.commands.training_run import Met, Run, followed, held_out_texts, make_folder, training_folder
from planner.errors import BadInput
from planner.files import write_whole
from planner.specs import SparseKV

HEAD = "head"
HEAD_DTYPES = ("bfloat16", "fp8")  # of which vLLM loads no quantised one (vllm-project/vllm#51581)


def train_block_diffusion(
    model: str, texts: str | Path, out: str | Path, *, settings: "BlockSettings", training: "TrainSettings",  # noqa: F821
    held_out: list[str] = (), context_len: int = 1024, temperatures: list[float] = (0.0, 0.7, 1.0), budgets: list[int] = (256,), look_every: int = 200,
    head_dtype: str = "bfloat16", device: str | None = None, progress: Progress = Silent(),
) -> list[Met]:  # fmt: skip
    """Train, or go on with what `out` holds; what held-out texts accepted on the way.

    head_dtype  of the head as it is written; nothing of the training depends on it
    """
    if head_dtype not in HEAD_DTYPES:
        raise BadInput(f"a head is written in {' or '.join(HEAD_DTYPES)}, got {head_dtype!r}; change --head-dtype")
    session = open_session(model, device=device, whole=True)
    import torch
    from safetensors.torch import save

    from planner.runtime import fp8
    from planner.runtime.dflash_head import published
    from planner.training import block_diffusion
    from planner.training.data import TaughtTexts

    folder, target = training_folder(out), session.model
    taught = TaughtTexts(texts, target)
    taps, settings = tuple(taught.manifest.settings.taps), settings.filled(target)
    policies = [valid(SparseKV, budget=budget, storage="evict") for budget in budgets]
    head = block_diffusion.begun(target, settings, taps)
    published(head, target.spec.num_layers)  # refuses what could not be written, before anything is trained
    parts = block_diffusion.BlockDiffusion(head, taught, settings, torch.bfloat16 if training.autocast else torch.float32)
    run = Run(target=target.fingerprint, texts=taught.digest, settings=settings, training=training, ranks=session.ranks.size)
    seen = taught.manifest.settings.files
    watched = held_out_texts(session, held_out, seen, context_len, temperatures, taps) if held_out and session.ranks.rank == 0 else []
    log = followed(
        folder, run, block_diffusion.trainable(head), parts.learn, ranks=session.ranks, look_every=look_every,
        look=lambda: _met(head, target, watched, policies), progress=progress,
    )  # fmt: skip
    if session.ranks.rank == 0:
        make_folder(folder / HEAD)
        config, tensors = published(head, target.spec.num_layers)
        config |= {"dtype": "bfloat16", "specplan_card": msgspec.to_builtins({"run": run, "log": log})}
        stored = {name: tensor.bfloat16().cpu() for name, tensor in tensors.items()}
        if head_dtype == "fp8":
            config |= {"quantization_config": fp8.QUANTIZATION}
            stored |= fp8.quantized({name: tensor.cpu() for name, tensor in tensors.items() if tensor.dim() == 2})
        write_whole(folder / HEAD / "model.safetensors", save(stored, {"format": "pt"}))
        write_whole(folder / HEAD / "config.json", msgspec.json.format(msgspec.json.encode(config)))
    return log


def _met(head: "DFlashHead", target: "Transformer", texts: list, policies: list[SparseKV]) -> tuple[dict[str, float], dict[str, float]]:  # noqa: F821
    """Mean acceptance of first drafts and mean tokens of a round, by replay with the weights as they are."""
    import numpy as np

    from planner.runtime.dflash_head import build_head, published
    from planner.runtime.drafters.dflash import DFlashDrafter
    from planner.specs import FullKV

    tensors = {name: tensor.to(target.dtype) for name, tensor in published(head, target.spec.num_layers)[1].items()}
    now = build_head(head.spec, head.taps, head.block_size, head.mask_token, "training", tensors, target)
    first, tokens, K = {}, {}, head.block_size - 1
    for kv in [*policies, FullKV()]:
        budget = kv.budget if isinstance(kv, SparseKV) else "full"
        for text in texts:
            chances = DFlashDrafter(now, kv, draft_len=K, batch=1, weights_bytes=0).replay(text, K).accept_prob
            name = f"{text.sampler.temperature:g}/{budget}"
            first.setdefault(name, []).append(float(chances[:, 0].mean()))
            tokens.setdefault(name, []).append(1 + float(chances.cumprod(1).sum(1).mean()))
    return ({name: float(np.mean(values)) for name, values in found.items()} for found in (first, tokens))
