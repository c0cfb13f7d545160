"""Train a drafter for a model that has none, and write it as ordinary checkpoints. Needs the extra [runtime]; an hour or more.

    python examples/train_drafter.py MODEL TEXTS HELD_OUT FOLDER

MODEL is a Hugging Face folder, a GGUF file or smollm2; TEXTS and HELD_OUT are .txt files or folders of them, HELD_OUT not among
TEXTS. The same command goes on with what FOLDER holds.
"""

import sys
from pathlib import Path

import planner
from planner.training.multi_view import MultiViewSettings
from planner.training.trainer import TrainSettings


def main(model: str, texts: str, held_out: str, folder: str, *, steps: int = 2000, length: int = 4096, **changes) -> None:
    """changes  of what a step sees, for a quicker look"""
    out = Path(folder)
    out.mkdir(exist_ok=True)
    count = planner.train_texts(model, [texts], out / "texts", length=length, written=0)
    print(f"{count} texts of {length} tokens")
    training = TrainSettings(steps=steps, warmup=steps // 20)
    log = planner.train_multi_view(
        model, out / "texts", out / "run", settings=MultiViewSettings(**changes), training=training, held_out=[held_out],
        context_len=length // 4, look_every=max(1, steps // 10),
    )  # fmt: skip
    for met in log:
        shown = ", ".join(f"{name}: {share:.2f}" for name, share in met.acceptance.items())
        print(f"step {met.step}: loss {met.loss:.3f}; first drafts accepted by temperature/budget: {shown}")
    for path in planner.materialize(str(out / "run/drafter.safetensors"), out / "drafter", model=model):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
