"""Two devices by their profiles: what each pass costs on the one and the other, and whether the choice may be carried over. Needs no torch.

    python examples/compare_gpus.py A.json B.json

Profiles of the own runtime (`planner profile` on each device) or of a server (`planner import bench`, `planner tune`).
"""

import sys

import planner


def main(before: str, after: str) -> None:
    found = planner.diff(before, after, objective="tpot")
    for ratio in found.ratios:
        sure = "" if ratio.differs else " (not told apart)"
        print(f"{ratio.quantity}, {ratio.of}, {ratio.at}: {ratio.ratio.value:.2f} [{ratio.ratio.low:.2f}, {ratio.ratio.high:.2f}] times{sure}")
    for choice in found.choices:
        lost = "" if choice.carried_loss is None else f"; the first's choice would lose {100 * choice.carried_loss:.1f} % there"
        print(f"{choice.at}: {choice.before} on the one, {choice.after} on the other{lost}")


if __name__ == "__main__":
    main(*sys.argv[1:])
