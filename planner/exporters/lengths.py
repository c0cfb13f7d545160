"""What each engine calls the number of drafted tokens. Here is every off-by-one.

K  tokens drafted in sequence; a block drafter of DFlash drafts its block without the first slot, which holds the committed token,
   DSpark the whole block      D, w, N  depth and width of a tree, and its nodes without the root
"""

from collections.abc import Callable
from typing import NamedTuple

from planner.errors import BadInput

Words = dict[str, object]  # an engine's own keys


class Tree(NamedTuple):
    depth: int
    width: int
    num_nodes: int


class Lengths(NamedTuple):
    chain: Callable[[int], Words]
    dflash: Callable[[int], Words] | None = None  # None: as a chain, or not at all
    dspark: Callable[[int], Words] | None = None
    tree: Callable[[Tree], Words] | None = None


def _vllm(K: int) -> Words:
    return {"num_speculative_tokens": K}


def _llamacpp(K: int) -> Words:
    return {"spec-draft-n-max": K}


def _tensorrt_tree(tree: Tree) -> Words:
    if not tree.depth <= tree.num_nodes <= tree.width * tree.depth:
        raise BadInput(f"a tree has from depth to width x depth nodes ({tree.depth} to {tree.width * tree.depth}), got {tree.num_nodes}")
    return {
        "max_draft_len": tree.depth, "use_dynamic_tree": True, "dynamic_tree_max_topK": tree.width, "max_total_draft_tokens": tree.num_nodes,
    }  # fmt: skip


def _sglang_tree(tree: Tree) -> Words:
    most = tree.width + (tree.depth - 1) * tree.width**2  # the pool it chooses from
    if not tree.depth <= tree.num_nodes <= most:
        raise BadInput(f"a tree of depth {tree.depth} and width {tree.width} has {tree.depth} to {most} nodes, got {tree.num_nodes}")
    return {"speculative-num-steps": tree.depth, "speculative-eagle-topk": tree.width, "speculative-num-draft-tokens": tree.num_nodes + 1}


LENGTHS: dict[str, Lengths] = {
    "vllm": Lengths(_vllm),  # a block of B: B - 1 for DFlash, B for DSpark, so K either way
    "sglang": Lengths(
        chain=lambda K: {"speculative-num-steps": K, "speculative-eagle-topk": 1, "speculative-num-draft-tokens": K + 1},
        dflash=lambda K: {"speculative-num-draft-tokens": K + 1},  # the block
        dspark=lambda K: {"speculative-dspark-block-size": K},
        tree=_sglang_tree,
    ),
    "tensorrt-llm": Lengths(lambda K: {"max_draft_len": K}, tree=_tensorrt_tree),  # of DSpark it is the block
    "llama.cpp": Lengths(_llamacpp),
    "transformers": Lengths(lambda K: {"num_assistant_tokens": K}),
    "planner": Lengths(lambda K: {"--draft-len": K}),
}


def spell_length(engine: str, method: str, drafted: int | Tree) -> Words:
    """The engine's keys for K drafted tokens, or for a tree; BadInput where it has no trees."""
    row = LENGTHS[engine]
    if isinstance(drafted, Tree):
        if row.tree is None:
            raise BadInput(f"{engine} verifies no trees, got one of {drafted.num_nodes} nodes; plan a chain")
        return row.tree(drafted)
    special = {"dflash": row.dflash, "dspark": row.dspark}.get(method)
    return (special or row.chain)(drafted)
