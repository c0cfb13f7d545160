"""Sizes out of a config.json, of any decoder that names its fields as transformers does, and of the weights beside it. Needs no torch.

Not only what the own runtime can run: bytes are counted here, nothing is computed with them. Files are untrusted.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from planner.commands.configs import HEADS, valid
from planner.errors import BadInput, MissingExtra
from planner.runtime.fields import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Fields, one_line, read_json
from planner.runtime.model_spec import model_name
from planner.serving import ModelSize
from planner.trained import read_header

MAX_BYTES = 2**60
MAX_EXPERTS = 2**16
BYTES_OF = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0, "float8_e5m2": 1.0}
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
CACHING = ("full_attention", "sliding_attention", "chunked_attention", "attention", "full", "hybrid")  # of layer_types
STATEFUL = ("ssm_cfg", "mamba_d_state", "ssm_state_size", "mamba_num_heads", "time_step_rank", "attn_layer_period")  # layers without keys

# Whose layers are: q, k, v, o; a gated MLP, dense or of experts; norms. For others, parameters are not guessed from the config.
GATED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "olmoe",
    "granite", "smollm3", "ministral", "ministral3", "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "gpt_oss", "internlm2", "exaone4", "seed_oss",
    "glm", "glm4", "cohere", "cohere2", "stablelm", "yi", "baichuan", "ernie4_5", "hunyuan_v1_dense",
)  # fmt: skip
_OUTER = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")  # which a nested config may leave to the outer one


class Sized(NamedTuple):
    model: ModelSize
    notes: list[str]  # what was taken for granted
    kind: Literal["draft_model", "eagle3", "dflash"] = "draft_model"  # what it would be as a drafter


def config_size(path: Path, *, name: str, weights_bytes: int | None, kv_bytes_per_element: float | None) -> Sized:
    """The size of the model that a config.json describes; BadInput where it says too little. None: as the config says."""
    whole = Fields(path, read_json(path))
    inner = next((key for key in NESTED if isinstance(whole.get(key), dict) and whole.get("num_hidden_layers") is None), None)
    config = whole if inner is None else Fields(path, {**{key: whole.get(key) for key in _OUTER}, **whole.get(inner)})
    notes: list[str] = []

    num_layers = _caching_layers(config, notes)
    num_heads = config.integer("num_attention_heads", MAX_HEADS)
    hidden_size = config.integer("hidden_size", MAX_WIDTH)
    latent = config.get("kv_lora_rank") is not None
    if latent:
        head_dim = config.integer("kv_lora_rank", MAX_WIDTH) + config.integer("qk_rope_head_dim", MAX_HEAD_DIM)
        kv_heads = 1
    else:
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise config.refusal("hidden_size", f"must be a multiple of num_attention_heads ({num_heads}) where head_dim is absent")
        head_dim = config.integer("head_dim", MAX_HEAD_DIM, max(1, hidden_size // num_heads))
        kv_heads = config.integer("num_key_value_heads", MAX_HEADS, num_heads)
    dtype = config.text("dtype", config.text("torch_dtype", "bfloat16"))
    if dtype not in BYTES_OF:
        raise config.refusal("torch_dtype", f"must be one of {', '.join(BYTES_OF)}")
    element = kv_bytes_per_element
    if element is None:
        element = max(2.0, BYTES_OF[dtype])  # weights of 8 bits have keys of 16 unless the engine is told otherwise
        if dtype == "float32":
            notes.append("a float32 checkpoint: weights and keys are counted as stored, most engines load it in 16 bit and need half")
    weights = weights_bytes
    if weights is None:
        weights = _stored_bytes(path.parent) if path.name == "config.json" else None
    if weights is None:
        weights = _computed_bytes(whole, config, BYTES_OF[dtype], notes)
    if any(config.get(key) is not None for key in EXPERTS):
        notes.append("a mixture of experts: times count all weights as read, a small batch reads fewer")
    model = valid(
        ModelSize, name=name or model_name(path.parent if path.name == "config.json" else path)[-500:], num_layers=num_layers, num_kv_heads=kv_heads, head_dim=head_dim,
        weights_bytes=weights, kv_bytes_per_element=element, latent=latent, hidden_size=hidden_size, num_heads=num_heads,
        intermediate_size=_optional(config, "intermediate_size", MAX_WIDTH), vocab_size=_optional(config, "vocab_size", MAX_VOCAB),
        max_context_len=_optional(config, "max_position_embeddings", MAX_CONTEXT),
    )  # fmt: skip
    return Sized(model, notes, _head_kind(config) or "draft_model")


def gguf_size(path: Path, *, name: str, weights_bytes: int | None, kv_bytes_per_element: float | None) -> Sized:
    """The size of the model in a GGUF file, of whatever architecture; keys and values are 16 bit where nobody says else."""
    try:
        from planner.runtime.gguf_file import read_gguf
    except ModuleNotFoundError as error:
        raise MissingExtra(f"a GGUF file needs the extra [runtime] ({error.name} is missing); pip install 'specplan[runtime]'") from None
    gguf = read_gguf(path)
    header = Fields(path, gguf.metadata)
    at = header.text("general.architecture")
    num_heads = header.integer(f"{at}.attention.head_count", MAX_HEADS)
    hidden_size = header.integer(f"{at}.embedding_length", MAX_WIDTH)
    embedding = gguf.tensors["token_embd.weight"].shape if "token_embd.weight" in gguf.tensors else ()
    model = valid(
        ModelSize, name=(name or model_name(path))[-500:], num_layers=header.integer(f"{at}.block_count", MAX_LAYERS),
        num_kv_heads=header.integer(f"{at}.attention.head_count_kv", MAX_HEADS, num_heads),
        head_dim=header.integer(f"{at}.attention.key_length", MAX_HEAD_DIM, max(1, hidden_size // num_heads)),
        weights_bytes=weights_bytes or sum(tensor.num_bytes for tensor in gguf.tensors.values()),
        kv_bytes_per_element=kv_bytes_per_element or 2.0, hidden_size=hidden_size, num_heads=num_heads,
        intermediate_size=_optional(header, f"{at}.feed_forward_length", MAX_WIDTH), vocab_size=embedding[0] if embedding else None,
        max_context_len=_optional(header, f"{at}.context_length", MAX_CONTEXT),
    )  # fmt: skip
    return Sized(model, [])


def own_layers_size(path: Path, *, name: str, weights_bytes: int | None, kv_bytes_per_element: float | None) -> Sized:
    """The size of the checkpoint that a drafter's own layers make with the target's embedding and head: what an engine loads."""
    spec = read_header(path).spec
    model = valid(
        ModelSize, name=(name or path.stem)[-500:], num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        weights_bytes=weights_bytes or 2 * spec.num_parameters, kv_bytes_per_element=kv_bytes_per_element or 2.0, hidden_size=spec.hidden_size,
        num_heads=spec.num_heads, intermediate_size=spec.intermediate_size, vocab_size=spec.vocab_size, max_context_len=spec.max_context_len,
    )  # fmt: skip
    return Sized(model, [] if weights_bytes else ["weights are counted as `planner train materialize` writes them, in bfloat16"])


def _optional(config: Fields, name: str, most: int) -> int | None:
    return None if config.get(name) is None else config.integer(name, most)


def _caching_layers(config: Fields, notes: list[str]) -> int:
    """Layers that keep keys and values of every token. Those that slide are counted like the rest, and that is said."""
    num_layers = config.integer("num_hidden_layers", MAX_LAYERS)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(isinstance(kind, str) for kind in kinds):
            raise config.refusal("layer_types", f"must be a list of num_hidden_layers ({num_layers}) names")
        keeping = sum(kind in CACHING for kind in kinds)
        if not keeping:
            raise config.refusal("layer_types", f"must hold a layer that keeps keys and values ({', '.join(CACHING)})")
        if keeping < num_layers:
            notes.append(f"{num_layers - keeping} of {num_layers} layers keep a fixed state instead of keys and values; the state is not counted")
        if sliding := sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds):
            notes.append(f"{sliding} of {num_layers} layers have a sliding window; their keys are counted as if they kept every token")
        return keeping
    if (interval := _optional(config, "full_attention_interval", MAX_LAYERS)) is not None:
        notes.append(f"every {interval}th of {num_layers} layers keeps keys and values; the fixed state of the others is not counted")
        return max(1, num_layers // interval)
    if state := next((name for name in STATEFUL if config.get(name) is not None), None):
        raise config.refusal(state, "must be absent, or layer_types say which layers keep keys; give num_layers=..,num_kv_heads=.. by hand")
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        notes.append("the sliding window is not counted on: keys of every token are counted")
    return num_layers


def _stored_bytes(folder: Path) -> int | None:
    """Bytes of the weights that lie in the folder, None where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        read = Fields(index, read_json(index))
        if not isinstance(read.get("metadata"), dict):
            raise read.refusal("metadata", "must be an object that holds total_size")
        size = read.get("metadata").get("total_size")
        if type(size) not in (int, float) or not 1 <= size <= MAX_BYTES:
            raise BadInput(f"{index}: metadata.total_size must be a number of bytes, got {one_line(size)}; give weights_gib behind the folder")
        return int(size)
    files = sorted(folder.glob("model*.safetensors")) or sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated")
    )
    if not files:
        return None
    if (cut := re.search(r"-of-0*([0-9]{1,6})\.safetensors$", files[0].name)) and int(cut[1]) != len(files):
        raise BadInput(
            f"{folder} must hold all of its {cut[1]} weight files, got {len(files)}; download the rest, or give weights_gib behind the folder"
        )
    total = 0
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                header = 8 + int.from_bytes(opened.read(8), "little")
        except OSError as error:
            raise BadInput(f"{file} cannot be read: {error.strerror or error}") from None
        if not 8 < header < size:
            raise BadInput(f"{file} must be a safetensors file, its header of {header} bytes does not fit into {size}; download it again")
        total += size - header
    return total


def _computed_bytes(whole: Fields, config: Fields, element: float, notes: list[str]) -> int:
    """Parameters by the shapes in the config, times the bytes of their dtype."""
    remedy = "give weights_gib behind it, as in config.json,weights_gib=15.0"
    kind = config.text("model_type", "unknown")
    if kind not in GATED:
        raise BadInput(f"{config.source}: weights are not counted from the config of model_type {one_line(kind)}; {remedy}")
    if extra := next((key for key in ("vision_config", "audio_config", "speech_config") if whole.get(key) is not None), None):
        raise BadInput(f"{whole.source}: {extra} has weights that the text model's config does not count; {remedy}")

    hidden, heads = config.integer("hidden_size", MAX_WIDTH), config.integer("num_attention_heads", MAX_HEADS)
    head_dim = config.integer("head_dim", MAX_HEAD_DIM, max(1, hidden // heads))
    layers = config.integer("num_hidden_layers", MAX_LAYERS)
    vocab = config.integer("vocab_size", MAX_VOCAB)
    tied = config.flag("tie_word_embeddings", kind.startswith(("gemma", "cohere")))
    head = _head_kind(config)
    bits = _bits(whole if whole.get("quantization_config") is not None else config, element)
    if config.get("kv_lora_rank") is not None:
        rank, rope = config.integer("kv_lora_rank", MAX_WIDTH), config.integer("qk_rope_head_dim", MAX_HEAD_DIM)
        nope, value = config.integer("qk_nope_head_dim", MAX_HEAD_DIM), config.integer("v_head_dim", MAX_HEAD_DIM)
        query = heads * (nope + rope)
        q_rank = _optional(config, "q_lora_rank", MAX_WIDTH)
        attention = hidden * query if q_rank is None else q_rank * (hidden + query)
        attention += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    else:
        kv_heads = config.integer("num_key_value_heads", MAX_HEADS, heads)
        inputs = hidden * (2 if head == "eagle3" else 1)  # the head of EAGLE-3 sees embedding and features side by side
        attention = inputs * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    small = layers * hidden * (4 if kind in ("gemma2", "gemma3_text", "glm4") else 2) + hidden  # norms
    if kind.startswith("qwen2"):
        small += layers * head_dim * (heads + 2 * kv_heads)  # biases
    if kind.startswith(("qwen3", "gemma3")):
        small += layers * 2 * head_dim  # norms of queries and keys
    dense, expert = _mlp(config, kind, hidden, layers)

    notes.append("weights are counted from the config, parameters times dtype; weights_gib behind it replaces that")
    if head == "dflash":
        notes.append("a DFlash head, which shares the target's embedding and head")
        return int((layers * attention + dense + expert + _num_taps(config, layers) * hidden * hidden) * bits + (small + hidden) * element)
    if head:
        notes.append("an EAGLE-3 head, taken to share the target's embedding")
        features = 3 * hidden * config.integer("target_hidden_size", MAX_WIDTH, hidden)
        rows = config.integer("draft_vocab_size", MAX_VOCAB, vocab)
        return int((layers * attention + dense + expert + features) * bits + (rows * hidden + small) * element)
    body = layers * attention + dense
    others = vocab * hidden * (1 if tied else 2) + small
    body_bytes = body * (element if kind == "gpt_oss" else bits)  # of which the experts alone are in 4 bit
    return int(body_bytes + expert * bits + others * element)


def _head_kind(config: Fields) -> str | None:
    """Which kind of head on hidden states of a target this is; None for a model that stands alone."""
    return next((kind for kind, part in HEADS.items() if part in str(config.get("architectures"))), None)


def _num_taps(config: Fields, usual: int) -> int:
    """Layers of the target that a DFlash head reads."""
    nested = config.get("dflash_config")
    ids = (nested if isinstance(nested, dict) else {}).get("target_layer_ids") or config.get("target_layer_ids")
    return len(ids) if isinstance(ids, list) and ids else usual


def _mlp(config: Fields, kind: str, hidden: int, layers: int) -> tuple[int, int]:
    """Parameters of the MLPs of all layers: dense and shared ones, and those of experts."""
    width = config.integer("intermediate_size", MAX_WIDTH)
    experts = next((config.integer(key, MAX_EXPERTS) for key in EXPERTS if config.get(key) is not None), 0)
    if not experts:
        return layers * 3 * hidden * width, 0
    inner = config.integer("moe_intermediate_size", MAX_WIDTH, width)
    first = config.integer("first_k_dense_replace", MAX_LAYERS, 0, least=0)
    step = config.integer("decoder_sparse_step", MAX_LAYERS, config.integer("moe_layer_freq", MAX_LAYERS, 1))
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or len(only) > layers:
        raise config.refusal("mlp_only_layers", f"must be a list of at most num_hidden_layers ({layers}) numbers")
    sparse = sum(layer >= first and layer not in only and (layer + 1) % step == 0 for layer in range(layers))
    shared = config.integer("shared_expert_intermediate_size", MAX_WIDTH, 0, least=0)
    shared += inner * config.integer("n_shared_experts", MAX_EXPERTS, 0, least=0)
    dense = (layers - sparse) * 3 * hidden * width + sparse * (3 * hidden * shared + hidden * experts)
    return dense, sparse * experts * 3 * hidden * inner


def _bits(config: Fields, element: float) -> float:
    """Bytes of a parameter in a matrix of the body, scales of its groups included."""
    stored = config.get("quantization_config")
    if stored is None:
        return element
    if not isinstance(stored, dict):
        raise config.refusal("quantization_config", "must be an object")
    quant = Fields(config.source, {f"quantization_config.{key}": value for key, value in stored.items()})
    method = quant.text("quantization_config.quant_method")
    match method:
        case "fp8" | "fbgemm_fp8":
            return 1.0
        case "mxfp4":
            return 0.5 + 1 / 32
        case "awq" | "gptq":
            bits = quant.integer("quantization_config.bits", 16)
            group = quant.integer("quantization_config.group_size", 2**16, 128, least=-1)
            return bits / 8 + (0 if group < 1 else (2 + bits / 8) / group)  # a 16-bit scale and a zero point for each group
        case "bitsandbytes":
            return 0.5 + 4 / 64 if quant.flag("quantization_config.load_in_4bit", False) else 1.0
    raise quant.refusal(
        "quantization_config.quant_method", "must be fp8, mxfp4, awq, gptq or bitsandbytes to count weights; give weights_gib behind it; it"
    )
