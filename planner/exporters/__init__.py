"""A plan in the words of engines: one module for each."""

from collections.abc import Callable
from typing import NamedTuple

from planner.engine_rules import DraftRules
from planner.exporters import llamacpp, own_runtime, sglang, transformers, trtllm, vllm
from planner.exporters.contract import Deployed, Spelled


class Exporter(NamedTuple):
    spell: Callable[[Deployed, DraftRules], Spelled]
    checked: str  # by what its files are checked before they are written
    files: tuple[str, ...]  # all that it may write


_VLLM = Exporter(vllm.spell, vllm.CHECKED, (vllm.FILE, vllm.SWEEP))
EXPORTERS = {
    "vllm": _VLLM,
    "vllm-draft-window": _VLLM,
    "vllm-ascend": _VLLM,
    "sglang": Exporter(sglang.spell, sglang.CHECKED, (sglang.FILE, sglang.ADAPTIVE)),
    "tensorrt-llm": Exporter(trtllm.spell, trtllm.CHECKED, (trtllm.FILE,)),
    "llama.cpp": Exporter(llamacpp.spell, llamacpp.CHECKED, (llamacpp.FILE,)),
    "transformers": Exporter(transformers.spell, transformers.CHECKED, (transformers.CONFIG, transformers.SETTINGS, transformers.SCRIPT)),
    "planner": Exporter(own_runtime.spell, own_runtime.CHECKED, ()),
}
