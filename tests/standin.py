"""A stand-in for a GPU on machines without one: a device that computes with real CPU values and refuses to mix with the CPU.

`installed()` claims PyTorch's one private-use backend, so this belongs in a process of its own; `main()` is what
tests/runtime/test_standin_device.py starts. As on CUDA, an op takes tensors of one device, except single numbers
(dim 0) and copies. CUDA also accepts a CPU index; here it is refused, for it is a copy that nobody asked for.
What it cannot show: CUDA's generators, events, graphs and kernels.
"""

import json
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tiny import BLOCK_HEAD, HEAD, prefilled, random_prompt, tiny_model, with_block_head, with_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from planner.profiler.acceptance import replay, replay_trees, write_texts
from planner.profiler.texts import Prompt
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters import make_drafter
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.drafters.protocol import Draft
from planner.runtime.graphs import GraphKernels
from planner.runtime.kernels import Kernels
from planner.specs import PLAIN, DraftConfig, DrafterSpec, FixedTree, FullKV, Sampler, SparseKV

STANDIN = "standin:0"
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}  # bring a value, or the shape of a result, to the host
counts = Counter()  # host "reads" and "uploads" since somebody cleared it
on_cpu = Counter()  # ops that ran on the CPU alone, by name


class StandinTensor(torch.Tensor):
    """Says that it lies on the stand-in; its values are those of `value`."""

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        assert type(value) is torch.Tensor, "a stand-in of a stand-in"
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype, device=torch.device(STANDIN)
        )
        wrapper.value = value
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.cpu().tolist()  # as it is on CUDA; PyTorch refuses it to subclasses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Run one op on the real values, as the device would."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Standin():  # inference mode hands us int() and .to() whole; what they are made of tells a read from a copy
            return func.decompose(*args, **kwargs)
    name = func.overloadpacket.__name__
    leaves, tree = tree_flatten((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, StandinTensor)]
    theirs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, StandinTensor)]
    if kwargs.get("device") is not None:
        on_standin = torch.device(kwargs["device"]).type == "standin"
    else:
        on_standin = isinstance(args[0], StandinTensor) if name == "copy_" else bool(ours)

    if name in ("_to_copy", "copy_"):
        from_standin = isinstance(args[name == "copy_"], StandinTensor)
        counts["uploads"] += on_standin and not from_standin
        counts["reads"] += from_standin and not on_standin
    elif ours and any(tensor.dim() > 0 for tensor in theirs):
        raise RuntimeError(f"{func} mixes {STANDIN} with cpu tensors of shapes {[tuple(tensor.shape) for tensor in theirs]}")
    by_mask = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
    counts["reads"] += bool(ours) and (by_mask or name in READS)
    if not ours and not on_standin:
        on_cpu[name] += 1

    owners = {id(tensor.value): tensor for tensor in ours}
    args, kwargs = tree_unflatten([leaf.value if isinstance(leaf, StandinTensor) else leaf for leaf in leaves], tree)
    kwargs |= {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
    with torch.inference_mode(False):  # a view of a tensor from outside inference mode has to be an ordinary one
        out = func(*args, **kwargs)
        if not on_standin:
            return out
        # An op in place returns the very tensor it was given.
        return tree_map_only(torch.Tensor, lambda tensor: owners[id(tensor)] if id(tensor) in owners else StandinTensor(tensor), out)


class Standin(TorchDispatchMode):
    """Sees what no tensor argument brings to us: torch.zeros(..., device=standin)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Generator(torch.Generator):
    """A CPU generator that names the device it was asked for: PyTorch has none for a private-use backend."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self._asked = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self._asked


def _tensor(data, *, dtype=None, device="cpu", plain=torch.tensor):
    """torch.tensor in two steps: its own copy to a device passes Python's dispatch by."""
    return plain(data, dtype=dtype).to(device)


@contextmanager
def installed():
    """Claim the private-use backend, for good, and compute on it inside the block."""
    _setup_privateuseone_for_python_backend("standin")
    plain = torch.Generator, torch.tensor
    torch.Generator, torch.tensor = Generator, _tensor
    try:
        with Standin():
            yield
    finally:
        torch.Generator, torch.tensor = plain


NEW_TOKENS, DRAFT_LEN = 8, 3
SAMPLERS = {"greedy": Sampler(), "warm": Sampler(temperature=0.8, top_p=0.9, top_k=20)}
CONFIGS = {
    "none": PLAIN,
    "ngram": DraftConfig(drafter=DrafterSpec(kind="ngram"), draft_len=DRAFT_LEN),
    "window": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=20, sink=4, recent=8), draft_len=DRAFT_LEN),
    "chunk": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=21, recent=9, selection="chunk"), draft_len=DRAFT_LEN),
    "eagle3": DraftConfig(drafter=HEAD, draft_len=DRAFT_LEN),
    "dflash": DraftConfig(drafter=BLOCK_HEAD, draft_len=DRAFT_LEN),
    "dflash, window": DraftConfig(drafter=BLOCK_HEAD, kv=SparseKV(budget=20, sink=4, recent=8, storage="evict"), draft_len=DRAFT_LEN),
    "snapkv": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=40, selection="snapkv"), draft_len=DRAFT_LEN),
    "retrieval": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=21, recent=9, selection="retrieval", refresh=4), draft_len=DRAFT_LEN),
    "draft model": DraftConfig(drafter=DrafterSpec(kind="draft_model", path="one layer"), kv=FullKV(), draft_len=DRAFT_LEN),
    "window, tree": DraftConfig(drafter=DrafterSpec(kind="self_sparse"), kv=SparseKV(budget=20, sink=4, recent=8), draft_len=DRAFT_LEN, tree=FixedTree(size=7)),
    "eagle3, tree": DraftConfig(drafter=HEAD, draft_len=DRAFT_LEN, tree=FixedTree(size=7)),
    "draft model, tree": DraftConfig(drafter=DrafterSpec(kind="draft_model", path="one layer"), kv=FullKV(), draft_len=DRAFT_LEN, tree=FixedTree(size=7)),
    "draft model, window": DraftConfig(drafter=DrafterSpec(kind="draft_model", path="one layer"), kv=SparseKV(budget=21, recent=9, storage="evict"), draft_len=DRAFT_LEN),
    "draft model, retrieval": DraftConfig(drafter=DrafterSpec(kind="draft_model", path="one layer"), kv=SparseKV(budget=21, recent=9, selection="retrieval", refresh=4), draft_len=DRAFT_LEN),
}  # fmt: skip
KINDS = "none", "ngram", "chunk", "eagle3", "dflash", "draft model"  # one of each drafter: what a run greedily, or alone, does differently is theirs
RAGGED = [(config, "warm", [70, 51]) for config in CONFIGS]
RUNS = [(config, "greedy", [50]) for config in KINDS] + RAGGED
CHUNK = 64  # of a prefill: every operation is slow here


class ForgetsTheDevice(NoDrafter):
    """Wrong: leaves the tokens it drafts on the CPU."""

    def propose(self, histories, draft_lens, sampler, generators):
        tokens = torch.zeros(len(histories), 1, dtype=torch.long)
        return Draft(tokens, torch.ones(len(histories), 1, self.vocab_size, device=self.device), [min(1, n) for n in draft_lens])


class ReadsTwice(NoDrafter):
    """Wrong: looks at a value on the device in every round."""

    def commit(self, target_cache, histories, counts):
        float(target_cache.keys[0, 0, 0, 0, 0])


def standin_model(config: DraftConfig, sharpness: float, **options):
    """The target, with its first layer beside it, which agrees with it now and then, and a head where one is to draft."""
    model = tiny_model(sharpness=sharpness, **options)
    model.beside["one layer", None] = tiny_model(sharpness=sharpness, device=str(model.device), kernels=model.kernels, num_layers=1)
    if config.drafter not in (HEAD, BLOCK_HEAD):
        return model
    with tempfile.TemporaryDirectory() as folder:
        return (with_head if config.drafter == HEAD else with_block_head)(model, Path(folder) / "head")


def rounds_of(device: str, lengths: list[int], config: DraftConfig, sampler: Sampler, drafter_class=None, kernels: Kernels | None = None) -> dict:
    """Texts of a decoding run, and the host reads of each round, the first token's included."""
    model = standin_model(config, sharpness=1.5, device=device, kernels=kernels)
    prompts = [random_prompt(length, seed=length) for length in lengths]
    cache, logits = prefilled(model, prompts, cache_capacity(max(lengths), NEW_TOKENS, max(DRAFT_LEN, config.verified)), CHUNK)
    drafter = drafter_class(61, model.device) if drafter_class else make_drafter(config, model, batch=len(prompts))
    generators = [torch.Generator(device=model.device).manual_seed(b) for b in range(len(prompts))]
    texts, reads, accepted = [[] for _ in prompts], [], 0
    counts.clear(), on_cpu.clear()
    for round_ in decode(
        model, cache, prompts, logits, drafter, draft_len=config.draft_len, sampler=sampler, generators=generators, max_new_tokens=NEW_TOKENS
    ):  # fmt: skip
        reads.append(counts["reads"])
        counts["reads"] = 0
        accepted += sum(round_.accepted)
        for text, tokens in zip(texts, round_.tokens, strict=True):
            text += tokens
    return {
        "texts": texts,
        "reads": reads,
        "uploads": counts["uploads"],
        "accepted": accepted,
        "on_cpu": dict(on_cpu),
        "device": str(cache.keys.device),
    }


def replay_of(device: str, config: DraftConfig, sampler: Sampler) -> dict:
    """Acceptance along two texts that the target wrote."""
    model = standin_model(config, sharpness=1.1, device=device)
    prompt = random_prompt(50)
    cache, logits = prefilled(model, [prompt, prompt], 50 + NEW_TOKENS, CHUNK)
    on_cpu.clear()
    written = write_texts(
        model, cache, [Prompt("kind", "source", 0, 50, prompt)] * 2, 50, logits, sampler, output_len=NEW_TOKENS, stop_tokens=(), seeds=[0, 1]
    )  # fmt: skip
    if config.tree is None:
        found = [replay(model, text.target_text, config, index).accept_prob for index, text in enumerate(written)]
    else:
        found = [replay_trees(model, text.target_text, config, [DRAFT_LEN], config.tree.size, index)[0].sizes for index, text in enumerate(written)]
    return {
        "texts": [text.target_text.tokens for text in written], "accept_prob": [packed.unpack().tolist() for packed in found],
        "on_cpu": dict(on_cpu), "device": str(written[0].target_text.token_probs.device),
    }  # fmt: skip


def refusal(function, *args) -> str | None:
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)


def cpu_index(device: str):
    """Wrong: indexes a tensor of the device with one of the CPU."""
    return torch.zeros(3, 4, device=device)[:, torch.arange(2)]


def main() -> None:
    """Everything on the CPU and then on the stand-in, as one JSON document."""
    result = {}
    for device in ("cpu", STANDIN):
        with nullcontext() if device == "cpu" else installed():
            result[device] = {
                "decode": {
                    f"{config}, {sampler}, prompts of {lengths}": rounds_of(device, lengths, CONFIGS[config], SAMPLERS[sampler])
                    for config, sampler, lengths in RUNS
                },
                "static shapes": {
                    f"{config}, {sampler}, prompts of {lengths}": rounds_of(
                        device, lengths, CONFIGS[config], SAMPLERS[sampler], kernels=GraphKernels(capture=False)
                    )
                    for config, sampler, lengths in RAGGED
                },
                "replay": {
                    f"{config}, {sampler}": replay_of(device, CONFIGS[config], SAMPLERS[sampler])
                    for config in CONFIGS if config != "none" for sampler in (SAMPLERS if config in KINDS else ["warm"])
                },
                "wrong": {
                    "cpu index": refusal(cpu_index, device),
                    "drafter on the cpu": refusal(rounds_of, device, [50], PLAIN, Sampler(), ForgetsTheDevice),
                    "reads": rounds_of(device, [50], PLAIN, Sampler(), ReadsTwice)["reads"],
                },
            }  # fmt: skip
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
