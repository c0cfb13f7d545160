"""The loop of every training: accumulate, clip, step, keep a checkpoint. What is learnt is the caller's business.

An example is a number. What it stands for follows from the seed, so a run that goes on from its checkpoint ends with the
weights of one that was never stopped. Under torchrun each rank takes its own examples, and gradients are averaged.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from planner.errors import BadInput, Unfinished
from planner.files import write_whole
from planner.runtime.ranks import Ranks
from planner.runtime.safetensors_folder import reading


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how fast."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50  # steps
    final_rate: float = 0.05  # of learning_rate, where the cosine ends
    clip: float = 1.0  # norm of the gradients
    weight_decay: float = 0.01
    accumulation: int = 2  # examples of a step, per rank
    autocast: bool = True  # matrix products in bfloat16
    save_every: int = 100  # steps between checkpoints
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup < 0 or not 0 <= self.final_rate <= 1:
            raise ValueError(f"warmup must be at least 0 and final_rate in [0, 1], got {self.warmup} and {self.final_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * done)) / 2)


class Learnt(NamedTuple):
    """What one example gave."""

    loss: Tensor
    num_tokens: int  # that the loss is about
    parts: dict[str, float]  # of the loss, to look at


class StepDone(NamedTuple):
    step: int  # counted from 1
    loss: float
    parts: dict[str, float]
    tokens_per_s: float


def train(
    parameters: dict[str, nn.Parameter],
    learn: Callable[[int], Learnt],
    settings: TrainSettings,
    checkpoint: Path,
    header: msgspec.Struct,  # what decides the run; a checkpoint of another is refused
    *,
    ranks: Ranks = Ranks(),
    stepped: Callable[[StepDone], None] = lambda done: None,
) -> None:
    """Train up to settings.steps, from the checkpoint if there is one; the parameters hold the result."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    device = next(iter(parameters.values())).device
    first = _restore(parameters, optimizer, checkpoint, header) if checkpoint.exists() else 0
    for step in range(first, settings.steps):
        began, loss, parts, num_tokens = time.perf_counter(), 0.0, {}, 0
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        for number in range(settings.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                learnt = learn((step * settings.accumulation + number) * ranks.size + ranks.rank)
            (learnt.loss / settings.accumulation).backward()
            loss += float(learnt.loss.detach()) / settings.accumulation
            num_tokens += learnt.num_tokens
            for name, value in learnt.parts.items():
                parts[name] = parts.get(name, 0.0) + value / settings.accumulation
        if ranks.size > 1:
            for parameter in parameters.values():
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks.size
        if not math.isfinite(float(nn.utils.clip_grad_norm_(parameters.values(), settings.clip))):
            raise Unfinished(f"the gradients of step {step + 1} are not finite; lower --learning-rate and go on from the last checkpoint")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            write_whole(checkpoint, _saved(parameters, optimizer, step + 1, header))
        stepped(StepDone(step + 1, loss, parts, num_tokens * ranks.size / (time.perf_counter() - began)))


def _saved(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, header: msgspec.Struct) -> bytes:
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"weight.{name}": parameter.detach(), f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, {"step": str(step), "header": _text(header)})


def _restore(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, checkpoint: Path, header: msgspec.Struct) -> int:
    """Steps that the checkpoint has behind it."""
    with reading(checkpoint, safe_open, checkpoint, framework="pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
        if metadata.get("header") != _text(header):
            raise BadInput(f"{checkpoint} belongs to a training with other settings or texts; give them as they were, or take another --out")
        step, expected = metadata.get("step", ""), {f"{kind}.{name}" for kind in ("weight", "first", "second") for name in parameters}
        if names != expected or not step.isdecimal() or len(step) > 12:
            raise BadInput(f"{checkpoint} is not a checkpoint of this training; delete it to begin again")
        with torch.no_grad():
            for name, parameter in parameters.items():
                weight, first, second = (file.get_tensor(f"{kind}.{name}").to(parameter) for kind in ("weight", "first", "second"))
                if not weight.shape == first.shape == second.shape == parameter.shape:
                    raise BadInput(f"{checkpoint} is not a checkpoint of this training; delete it to begin again")
                parameter.copy_(weight)
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    return int(step)


def _text(header: msgspec.Struct) -> str:
    return msgspec.json.encode(header).decode()
