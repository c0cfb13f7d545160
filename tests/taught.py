"""A small target, a drafter to be cut from it, and a folder of texts that it has taught; run as a script by each of torchrun's processes."""

import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from tiny import random_prompt, tiny_model

from planner.files import process_rank
from planner.runtime.model import Transformer
from planner.runtime.ranks import Ranks, join_ranks
from planner.training import data
from planner.training.multi_view import MultiView, MultiViewSettings, cut, trainable
from planner.training.trainer import TrainSettings, train

LENGTH, BEGIN = 160, 63
SETTINGS = MultiViewSettings(layers=[0, 2], budgets=[(48, 0.7), (64, 0.3)], continuation=32, sampled=None)
TRAINING = TrainSettings(steps=5, learning_rate=1e-2, warmup=2, accumulation=1, autocast=False, save_every=2)


class Run(msgspec.Struct, frozen=True):
    settings: MultiViewSettings = SETTINGS


def target(**changes) -> Transformer:
    return tiny_model(**({"num_layers": 3, "sharpness": 1.5} | changes))


def texts_settings(model: Transformer, **changes) -> data.TextsSettings:
    values = {
        "target": model.fingerprint, "vocab_size": model.spec.vocab_size, "hidden_size": model.spec.hidden_size, "num_layers": model.spec.num_layers,
        "files": ["made"], "length": LENGTH, "written": 0, "prompt_len": 0, "output_len": 0, "temperatures": [], "top": 8, "taps": [], "seed": 0,
    }  # fmt: skip
    return data.TextsSettings(**values | changes)


def taught_folder(folder: Path, model: Transformer, count: int = 3) -> Path:
    for index in data.open_folder(folder, texts_settings(model), [BEGIN] * count):
        data.add_text(folder, index, data.taught(model, random_prompt(LENGTH, seed=index), top=8))
    return folder


def trained(folder: Path, checkpoint: Path, training: TrainSettings = TRAINING, **options) -> dict[str, torch.Tensor]:
    """The weights that a training of SETTINGS ends with."""
    model = target()
    drafter = cut(model, SETTINGS.layers)
    learn = MultiView(drafter, data.TaughtTexts(folder, model), SETTINGS, torch.float32).learn
    train(trainable(drafter), learn, training, checkpoint, Run(), **options)
    return {name: weight.detach().clone() for name, weight in trainable(drafter).items()}


if __name__ == "__main__":
    texts, out = map(Path, sys.argv[1:])
    ranks: Ranks = join_ranks(torch.device("cpu"))[0]
    save_file(trained(texts, out / "ranks.checkpoint", ranks=ranks), out / f"{process_rank()}.safetensors")
