"""From what flags ask for to draft trees; BadInput where it cannot be. Does not need torch."""

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from planner.commands.configs import make_config, valid
from planner.commands.flags import Asked
from planner.errors import BadInput
from planner.files import read_bytes
from planner.measurements import decode_checked, kind_of
from planner.plans import PLAN_SCHEMA_VERSION, Plan, TreeFile
from planner.specs import TREELESS, AdaptiveTree, DraftConfig, FixedTree, Tree, Workload
from planner.units import parse_numbers

ADAPTIVE, BY_ROUND = "adaptive", "adaptive-by-round"  # by the rate of the whole run, or by the ratio of each round
LARGEST = 255  # nodes that a profile can say something about


def make_tree_config(asked: Asked) -> DraftConfig:
    """A configuration from flags that is to run as it is, its tree included."""
    config = make_config(asked)
    if asked.tree_costs is not None:
        if asked.tree_size != ADAPTIVE:
            raise BadInput(f"--tree-costs goes with --tree-size {ADAPTIVE}, got --tree-size {asked.tree_size}; give that or drop it")
        return _with_tree(config, read_adaptive(asked.tree_costs))
    if asked.tree_size in (ADAPTIVE, BY_ROUND):
        raise BadInput(f"--tree-size {asked.tree_size} needs the costs that a plan carries, got none; give --tree-costs PLAN.json")
    return config if asked.tree_size is None else _with_tree(config, _fixed(asked.tree_size))


def sized_for(models: "Models", config: DraftConfig, asked: Asked, workload: Workload) -> DraftConfig:  # noqa: F821  planner.search.objective
    """A chain's configuration with the tree that was asked for, an adaptive one by the profile's costs."""
    from planner.cost.adaptive_tree import adaptive_tree

    if asked.tree_costs is not None:
        raise BadInput(f"an estimate takes the costs of a tree from its profile, got --tree-costs {asked.tree_costs}; drop it")
    if asked.tree_size is None:
        return config
    if asked.tree_size not in (ADAPTIVE, BY_ROUND):
        return _with_tree(config, _fixed(asked.tree_size))
    sizes = models.latency.tree_sizes(config.drafter, workload.batch)
    largest = _with_tree(config, FixedTree(size=sizes[-1] if sizes else 1))
    return replace(config, tree=adaptive_tree(models.acceptance, models.latency, largest, workload, by_round=asked.tree_size == BY_ROUND))


def read_adaptive(path: str | Path) -> AdaptiveTree:
    """The adaptive tree of a plan's choice, or of the folder that it was exported to."""
    content = read_bytes(path, "tree")
    if kind_of(content) == "tree":
        return decode_checked(content, TreeFile, PLAN_SCHEMA_VERSION, f"tree {path}", "tree").tree
    tree = decode_checked(content, Plan, PLAN_SCHEMA_VERSION, f"plan {path}").chosen.tree
    if not isinstance(tree, AdaptiveTree):
        raise BadInput(f"--tree-costs takes a plan whose choice is an adaptive tree, {path} chose another; drop it, or give another plan")
    return tree


def tree_grid(configs: Sequence[DraftConfig], sizes: Sequence[int]) -> list[DraftConfig]:
    """Every configuration of a grid with every size of tree; drafters without probabilities have none."""
    able = [config for config in configs if config.drafter.kind not in TREELESS]
    if sizes and not able:
        raise BadInput("a tree is made of a drafter's probabilities, got --tree-sizes without a drafter that has some; drop it, or add one")
    return [_with_tree(config, FixedTree(size=size)) for config in able for size in sizes]


def parse_sizes(text: str) -> list[int]:
    """The sizes of --tree-sizes, ascending; none where it is empty."""
    sizes = sorted(parse_numbers(text, int, "--tree-sizes")) if text else []
    if sizes and not 1 <= sizes[0] <= sizes[-1] <= LARGEST:
        raise BadInput(f"tree sizes count nodes and lie in 1..{LARGEST}, got --tree-sizes {text}")
    return sizes


def _fixed(text: str) -> FixedTree:
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--tree-size takes a number of nodes, {ADAPTIVE} or {BY_ROUND}, got {text[:80]!r}")
    return valid(FixedTree, size=int(text))


def _with_tree(config: DraftConfig, tree: Tree) -> DraftConfig:
    return valid(DraftConfig, drafter=config.drafter, kv=config.kv, draft_len=config.draft_len, tree=tree)
