"""From what flags ask for (flags.py) to drafters, KV policies and configurations; BadInput where it cannot be. Does not need torch."""

import os
from collections.abc import Sequence
from typing import get_args

import msgspec
from msgspec.structs import replace

from planner.commands.flags import Asked, AskedGrid
from planner.errors import BadInput
from planner.files import read_bytes
from planner.specs import (
    CACHED,
    LOADED,
    QUANTIZED,
    REDUCIBLE,
    DraftConfig,
    DrafterSpec,
    FullKV,
    KVPolicy,
    Selection,
    SparseKV,
    Weights,
    checked,
    describe_drafter,
    describe_kv,
    listed,
    usual_storage,
)  # fmt: skip
from planner.trained import checkpoint_path
from planner.units import parse_numbers, words


def make_config(asked: Asked, profiled: Sequence[tuple[DrafterSpec, KVPolicy]] = ()) -> DraftConfig:
    """A configuration from flags. What they leave open is as it was profiled, where that is one thing only."""
    path = asked.draft_model and _plain_path(asked.draft_model)
    given = _said({"path": path, "dtype": asked.draft_dtype, "weights": asked.drafter_weights})
    if asked.drafter_vocab is not None:
        given["vocab"] = _head_size(str(asked.drafter_vocab), "--drafter-vocab")
    variants = list(dict.fromkeys(own for own, _ in profiled if own.kind == asked.drafter and _agrees(own, given)))
    if len(variants) > 1:
        names = "; ".join(describe_drafter(variant) for variant in variants)
        flags = "--draft-model, --draft-dtype, " * (asked.drafter in LOADED) + "--drafter-weights and --drafter-vocab"
        raise BadInput(f"the profile holds several drafters ({names}); choose one with {flags}")
    spec = asked.drafter, path, asked.draft_dtype, asked.drafter_weights or "full", given.get("vocab")
    drafter = variants[0] if variants else drafter_spec(*spec)
    return valid(DraftConfig, drafter=drafter, kv=_policy(asked, [kv for own, kv in profiled if own == drafter]), draft_len=asked.draft_len)


def _policy(asked: Asked, profiled: Sequence[KVPolicy]) -> KVPolicy:
    given = _said({name: getattr(asked, name) for name in ("selection", "sink", "recent", "refresh", "storage")})
    if asked.kv_budget is None or asked.drafter not in CACHED:
        said = ["--kv-budget"] * (asked.kv_budget is not None) + [f"--{name}" for name in given]
        if asked.drafter == "self_sparse":
            raise BadInput("drafter self_sparse needs --kv-budget, the tokens it attends to")
        if said and asked.drafter in CACHED:
            raise BadInput(f"{said[0]} goes with a kv budget, got none; give --kv-budget or drop it")
        if said:
            raise BadInput(f"{said[0]} goes with drafter {listed(CACHED, 'or')}, got drafter {asked.drafter}; drop it")
        return FullKV()
    check_selection(asked.selection)
    # Policies but for their budget; several choices with refresh and without are several.
    families = list(dict.fromkeys(replace(kv, budget=2**30) for kv in profiled if isinstance(kv, SparseKV) and _agrees(kv, given)))
    if len({(kv.selection, kv.refresh, kv.storage) for kv in families}) > 1:
        names = ", ".join(dict.fromkeys(describe_kv(kv).replace(f" {2**30}", "") for kv in families))
        raise BadInput(f"the profile holds selections {names}; choose one with --selection, --refresh and --storage")
    if families:
        return valid(SparseKV, **(_fields(families[0]) | {"budget": asked.kv_budget}))
    storage = usual_storage(asked.drafter, asked.refresh)
    return valid(SparseKV, budget=asked.kv_budget, **({"storage": storage} | given))


def drafter_spec(kind: str, path: str | None, dtype: str | None, weights: str, vocab: int | None) -> DrafterSpec:
    """A drafter, its own rules turned into BadInput."""
    kinds = get_args(DrafterSpec.__annotations__["kind"])
    if kind not in kinds:
        raise BadInput(f"a drafter is one of {', '.join(kinds)}, got {kind!r}")
    if weights not in get_args(Weights):
        raise BadInput(f"weights of a drafter are one of {', '.join(get_args(Weights))}, got {weights!r}")
    if kind in LOADED and path is None:
        raise BadInput(f"drafter {kind} has a checkpoint of its own, got none; give --draft-model PATH")
    if kind not in LOADED and path is not None:
        raise BadInput(
            f"a draft model goes with --drafter {listed(LOADED, 'or')}, got drafter {kind} with {path}; give one of them or drop --draft-model"
        )
    return valid(DrafterSpec, kind=kind, path=path, dtype=dtype, weights=weights, vocab=vocab)


def _plain_path(path: str) -> str:
    """Without what a shell's completion adds: drafters are told apart by it."""
    return os.path.normpath(path)


def drafter_specs(asked: AskedGrid, weights: str) -> list[DrafterSpec]:
    """Every drafter asked for. weights  of self_sparse where nobody said"""
    if asked.draft_dtype is not None and not asked.draft_model:
        raise BadInput(f"--draft-dtype goes with a draft model, got {asked.draft_dtype} without one; give --draft-model or drop it")
    sizes = [_head_size(word, "--drafter-vocabs") for word in words(asked.drafter_vocabs)]

    def variants(kind: str, usual: str, path: str | None = None, dtype: str | None = None) -> list[DrafterSpec]:
        bits = words(asked.drafter_weights or usual) if kind in QUANTIZED else ["full"]
        return [drafter_spec(kind, path, dtype, own, size) for own in bits for size in (sizes if kind in REDUCIBLE else [None])]

    found = []
    for kind in words(asked.drafters):
        if kind in LOADED:
            raise BadInput(f"drafter {kind} is named by its checkpoint, got --drafters {kind}; give --draft-model PATH")
        found += variants(kind, weights)
    for path in map(_plain_path, asked.draft_model):
        found += variants(checkpoint_kind(path), "full", path, asked.draft_dtype)
    return list(dict.fromkeys(found))


def checkpoint_kind(path: str) -> str:
    """eagle3 or dflash for a folder whose config.json says so, else draft_model."""
    config = checkpoint_path(path) / "config.json"
    if not config.is_file():
        return "draft_model"
    try:
        architectures = msgspec.json.decode(read_bytes(config, "config"), type=_Config).architectures
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{config} must be a model's config.json, got {error}; give another --draft-model") from None
    return next((kind for kind, part in HEADS.items() if any(part in name for name in architectures or [])), "draft_model")


HEADS = {"eagle3": "Eagle3", "dflash": "DFlash"}  # kinds, and what the architectures of their folders have in their names


class _Config(msgspec.Struct):
    architectures: list[str] | None = None


def policies(asked: AskedGrid) -> list[SparseKV]:
    """Every budget and selection asked for; a refresh is for those that choose."""
    if asked.storage == "evict" and not asked.draft_model:
        raise BadInput("--kv-storage evict is for a drafter with keys of its own, got none; give --draft-model or drop it")
    found = []
    for selection in words(asked.selections):
        check_selection(selection)
        refresh = None if selection == "window" else asked.refresh
        storage = asked.storage or usual_storage("draft_model" if asked.draft_model else "self_sparse", refresh)
        for budget in parse_numbers(asked.kv_budgets, int, "--kv-budgets"):
            found.append(valid(SparseKV, budget=budget, sink=asked.sink, recent=asked.recent, selection=selection, refresh=refresh, storage=storage))
    if asked.refresh is not None and all(kv.refresh is None for kv in found):
        raise BadInput(f"a refresh is for selections that choose, got --refresh {asked.refresh} with {asked.selections}; add chunk to --selections")
    return found


def check_selection(name: str | None) -> None:
    if name is not None and name not in get_args(Selection):
        *names, last = get_args(Selection)
        raise BadInput(f"a selection is {', '.join(names)} or {last}, got {name!r}")


def kv_choices(drafter: DrafterSpec, sparse: Sequence[SparseKV]) -> list[KVPolicy]:
    """The policies that a drafter can be run with, of those asked for."""
    match drafter.kind:
        case "self_sparse":  # reads the target's keys, which stay anyway
            return list(dict.fromkeys(replace(kv, storage="retain") for kv in sparse))
        case "draft_model":
            return [*dict.fromkeys(sparse), FullKV()]
        case "dflash":  # nothing would read again what its window has passed
            return [*dict.fromkeys(replace(kv, storage="evict") for kv in sparse if kv.selection == "window"), FullKV()]
    return [FullKV()]


def grid(drafters: Sequence[DrafterSpec], policies: Sequence[SparseKV], draft_lens: Sequence[int]) -> list[DraftConfig]:
    """Every combination: drafters with all policies that they can be run with, at every length."""
    asked = [(drafter, kv) for drafter in drafters if drafter.kind != "none" for kv in kv_choices(drafter, policies)]
    return [valid(DraftConfig, drafter=drafter, kv=kv, draft_len=draft_len) for drafter, kv in asked for draft_len in draft_lens]


def _head_size(word: str, flag: str) -> int | None:
    """Tokens that a head knows, as DrafterSpec has them."""
    if word == "all":
        return None
    if len(sizes := parse_numbers(word, int, flag)) > 1:
        raise BadInput(f"{flag} takes one number of tokens, or all, got {word[:80]!r}; choose one")
    return sizes[0]


def _said(given: dict) -> dict:
    """Without what the user left open."""
    return {name: value for name, value in given.items() if value is not None}


def _agrees(value: DrafterSpec | SparseKV, given: dict) -> bool:
    return all(getattr(value, name) == wanted for name, wanted in given.items())


def _fields(value: msgspec.Struct) -> dict:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def valid(kind: type, /, **fields):
    """A value of a kind, its own rules turned into BadInput."""
    try:
        return checked(kind(**fields))
    except ValueError as error:
        raise BadInput(str(error)) from None
