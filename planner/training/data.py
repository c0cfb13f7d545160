"""Texts to train on, with what the teacher says of them: written once, then read by every training.

A folder holds texts.json and a safetensors file per text, each written whole, so that an interrupted run goes on. A text
is a stretch of a file, or a shorter one that the target has continued itself.

L  tokens of a text     k  tokens kept of a distribution     C  hidden_size
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from planner.errors import BadInput
from planner.files import read_bytes, write_whole
from planner.runtime.decode import cache_capacity, decode
from planner.runtime.drafters.none import NoDrafter
from planner.runtime.kv_cache import KVCache
from planner.runtime.model import PREFILL_CHUNK, Transformer, prefill
from planner.runtime.safetensors_folder import reading
from planner.specs import Sampler
from planner.training.losses import Teacher

MANIFEST = "texts.json"
FIRST_TRAINED = 64  # tokens of a file's stretch that are only read: what follows so few is not what a drafter is for


class TextsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the content of a folder of texts."""

    target: str  # fingerprint
    vocab_size: int
    hidden_size: int
    num_layers: int
    files: list[str]  # name and the beginning of its sha256
    length: int  # tokens of a stretch
    written: int  # texts that the target continued
    prompt_len: int  # of those
    output_len: int
    temperatures: list[float]
    top: int  # k
    taps: list[int]  # layers whose output is kept
    seed: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    settings: TextsSettings
    begins: list[int]  # of each text: the first position whose successor may be trained on


class TaughtText(NamedTuple):
    tokens: Tensor  # [L] int64
    begin: int
    teacher: Teacher  # [L, k]: row i is what follows position i
    features: Tensor | None  # [L, taps, C]


def taught(
    model: Transformer,
    tokens: list[int],
    top: int,
    taps: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """What the target says behind every position of a text, as its file holds it."""
    L = len(tokens)
    cache = KVCache(model.spec, batch=1, capacity=L, dtype=model.dtype, device=model.device, taps=taps)
    text, named, log_probs = torch.tensor(tokens, device=model.device), [], []
    with torch.inference_mode():
        for positions in torch.arange(L, device=model.device).split(PREFILL_CHUNK):
            hidden = model(text[positions][None], positions[None], cache, taps=taps).hidden[0]
            cache.commit([len(positions)])
            for part in hidden.split(PREFILL_CHUNK // 4):
                logits = model.logits(part)
                best, ids = logits.topk(top, dim=-1)
                z = logits.float()
                most = z.amax(-1, keepdim=True)
                total = most + z.sub_(most).exp_().sum(-1, keepdim=True).log()  # torch.logsumexp takes ten times as long on a CPU
                named.append(ids.int())
                log_probs.append(best.float() - total)
        found = {"tokens": text.int(), "named": torch.cat(named), "log_probs": torch.cat(log_probs).half()}
        if taps:
            found["features"] = cache.features[0].clone()
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def write_on(model: Transformer, prompts: list[list[int]], sampler: Sampler, output_len: int, seed: int) -> list[list[int]]:
    """The prompts, all of one length, with what the target writes behind them; an end of text is a token like others."""
    B, L = len(prompts), len(prompts[0])
    cache = KVCache(model.spec, batch=B, capacity=cache_capacity(L, output_len, 0), dtype=model.dtype, device=model.device)
    first = prefill(model, torch.tensor(prompts, device=model.device), cache)
    generators = [torch.Generator(device=model.device).manual_seed(seed + b) for b in range(B)]
    rounds = decode(
        model, cache, prompts, first, NoDrafter(model.spec.vocab_size, model.device), draft_len=0, sampler=sampler, generators=generators,
        max_new_tokens=output_len,
    )  # fmt: skip
    texts = [list(prompt) for prompt in prompts]
    for round_ in rounds:
        for text, tokens in zip(texts, round_.tokens, strict=True):
            text += tokens
    return texts


def open_folder(folder: Path, settings: TextsSettings, begins: list[int]) -> list[int]:
    """Texts that are still to be made. BadInput if the folder holds others."""
    manifest = Manifest(settings=settings, begins=begins)
    if (folder / MANIFEST).exists():
        if read_manifest(folder) != manifest:
            raise BadInput(f"{folder} holds texts of other settings; give them as they were, or take another folder")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make the folder {folder}: {error.strerror}; change --out") from None
        write_whole(folder / MANIFEST, msgspec.json.encode(manifest))
    return [index for index in range(len(begins)) if not text_file(folder, index).exists()]


def add_text(folder: Path, index: int, tensors: dict[str, Tensor]) -> None:
    write_whole(text_file(folder, index), save(tensors))


def text_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    path = Path(folder) / MANIFEST
    try:
        return msgspec.json.decode(read_bytes(path, "list of texts"), type=Manifest)
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not a list of texts: {error}; make the folder with `planner train texts`") from None


class TaughtTexts:
    """A complete folder of texts for one target."""

    def __init__(self, folder: Path, target: Transformer):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        settings, count = self.manifest.settings, len(self.manifest.begins)
        if settings.target != target.fingerprint:
            raise BadInput(f"{folder} was written by another target ({settings.target}), this one is {target.fingerprint}; write texts with this one")
        if not 0 <= settings.written <= count or not all(0 <= begin < self.length(index) - 1 for index, begin in enumerate(self.manifest.begins)):
            raise BadInput(
                f"{self.folder / MANIFEST} is not a list of texts: positions lie outside of them; make the folder with `planner train texts`"
            )
        missing = [index for index in range(count) if not text_file(self.folder, index).is_file()]
        if missing or not count:
            raise BadInput(f"{folder} must hold all of its {count} texts, {len(missing)} are missing; go on with `planner train texts`")
        self.digest = hashlib.sha256(read_bytes(self.folder / MANIFEST, "list of texts")).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.manifest.begins)

    def length(self, index: int) -> int:
        """Tokens of one of them."""
        settings = self.manifest.settings
        written = index >= len(self) - settings.written
        return settings.prompt_len + settings.output_len if written else settings.length

    def text(self, index: int, *, features: bool = False) -> TaughtText:
        """One of them; with the target's hidden states where they are asked for and the folder has them."""
        settings, path = self.manifest.settings, text_file(self.folder, index)
        with reading(path, safe_open, path, framework="pt") as file:
            names = set(file.keys())
            found = {name: file.get_tensor(name) for name in names if features or name != "features"}
        begin = self.manifest.begins[index]
        L = self.length(index)
        if (
            not {"tokens", "named", "log_probs"} <= names
            or found["tokens"].shape != (L,)
            or any(found[name].shape != (L, settings.top) for name in ("named", "log_probs"))
            or not all(0 <= int(found[name].min()) <= int(found[name].max()) < settings.vocab_size for name in ("tokens", "named"))
            or features
            and tuple(found.get("features", found["tokens"]).shape) != (L, len(settings.taps), settings.hidden_size)
        ):
            raise BadInput(f"{path} is not a text of this folder; delete it and go on with `planner train texts`")
        return TaughtText(found["tokens"].long(), begin, Teacher(found["named"].long(), found["log_probs"].float()), found.get("features"))
