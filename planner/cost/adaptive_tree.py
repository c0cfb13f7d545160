"""The adaptive tree of a plan: the cost table, the calibration and the rate that its rule goes by at run time.

The calibration and the rate are those of rounds as they begin in a run, and where they begin depends on the sizes that
they make the rule choose. So both are found again from the rounds of the rule that they gave, until those stay the same.
"""

import numpy as np
from msgspec.structs import replace

from planner.cost.acceptance import AcceptanceModel
from planner.cost.draft_tree import fit_calibration, long_run_rate
from planner.cost.latency import LatencyModel
from planner.cost.tree_rounds import TreeText, nodes_of, walk_trees
from planner.draft_trees import expected_tokens
from planner.specs import AdaptiveTree, DraftConfig, FixedTree, TreeCosts, Workload

ROUNDS_OF_FITTING = 6


def adaptive_tree(
    acceptance: AcceptanceModel,
    latency: LatencyModel,
    largest: DraftConfig,  # with a fixed tree, the largest that may be chosen
    workload: Workload,
    *,
    by_round: bool = False,  # the best ratio of every round instead of the best of the whole run
) -> AdaptiveTree:
    """BadInput where the profile says too little. The table is that of the middle of the output.

    In a batch each stream weighs its own nodes, as if the others took as many: a pass is as wide as the widest.
    """
    position = workload.context_len + workload.output_len / 2
    draft_s, verify_s = latency.tree_costs(largest, workload.context_len, position, workload.batch)
    texts = acceptance.tree_texts(largest, workload)
    return AdaptiveTree(costs=_fitted(TreeCosts(draft_s=draft_s, verify_s=tuple(verify_s.tolist())), texts, by_round))


def _fitted(costs: TreeCosts, texts: list[tuple[float, TreeText]], by_round: bool) -> TreeCosts:
    max_size = len(costs.verify_s) - 1
    probs = np.concatenate([text.probs[:, :max_size] for _, text in texts])
    member = np.concatenate([text.member[:, :max_size] for _, text in texts])
    seconds = costs.draft_s + np.array(costs.verify_s)
    there, starts = probs > 0, _starts(FixedTree(size=max_size), texts)
    for _ in range(ROUNDS_OF_FITTING):
        per_node = np.broadcast_to(starts[:, None], probs.shape)[there]
        calibration = fit_calibration(probs[there], member[there], per_node)
        rate = None if by_round else long_run_rate(expected_tokens(probs, calibration), seconds, starts)
        costs = replace(costs, calibration=calibration, rate=rate)
        before, starts = starts, _starts(AdaptiveTree(costs=costs), texts)
        if (before == starts).all():
            break
    return costs


def _starts(tree: FixedTree | AdaptiveTree, texts: list[tuple[float, TreeText]]) -> np.ndarray:
    """How often a round starts behind each token of each text, by the weight of the text."""
    return np.concatenate([weight * walk_trees(text, nodes_of(tree, text)).starts for weight, text in texts])
