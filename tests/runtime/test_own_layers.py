"""A drafter's own layers on disk: what was saved is loaded, beside the target it was cut from, and what is broken is refused by name."""

import hashlib
import json

import pytest
import torch
from checkpoints import refused
from safetensors.torch import load_file, save_file
from tiny import native_kernels, prefilled, random_prompt, tiny_model, tiny_spec

from planner.commands.sizes import sized
from planner.errors import BadInput
from planner.runtime.kernels import Kernels
from planner.runtime.linear import GROUP, Int4Linear
from planner.runtime.own_layers import SCALES, load_own_layers, own_tensors, packed, save_own_layers
from planner.runtime.weights import expected_shapes
from planner.trained import FORMAT, NAMES, SUFFIX, own_layers_path, read_header
from planner.training.multi_view import cut, own_weights

CPU = torch.device("cpu")
LAYERS = [0, 2]


def saved(path, model, layers=LAYERS, bits=8):
    drafter = cut(model, layers)
    save_own_layers(path, drafter.spec, layers, own_weights(drafter), {"trained": "not at all", "steps": 0}, bits)
    return path


def target(**changes):
    return tiny_model(num_layers=3, sharpness=1.5, **changes)


@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen2"}, {"architecture": "qwen3"}, {"tie_embeddings": False}], ids=str)
def test_what_was_saved_is_loaded_to_within_half_a_step_of_its_row(changes, tmp_path):
    model = target(**changes)
    before = own_weights(cut(model, LAYERS))
    path = saved(tmp_path / "own.safetensors", model)
    header = read_header(path)
    assert header.layers == LAYERS and header.spec.num_layers == 2 and header.card == {"trained": "not at all", "steps": 0}
    after = own_tensors(path, header, torch.float32, CPU)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        step = tensor.abs().amax(-1, keepdim=True) / 127 if tensor.dim() == 2 else torch.zeros(1)
        assert ((after[name] - tensor).abs() <= step / 2 * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen2"}, {"architecture": "qwen3"}, {"tie_embeddings": False}], ids=str)
def test_in_4_bits_it_is_loaded_to_within_half_a_step_of_its_group(changes, tmp_path):
    model = target(intermediate_size=64, **changes)
    before = own_weights(cut(model, LAYERS))
    path = saved(tmp_path / "own.safetensors", model, bits=4)
    header = read_header(path)
    assert header.bits == 4 and header.layers == LAYERS
    after = own_tensors(path, header, torch.float32, CPU)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if tensor.dim() == 1:
            assert torch.equal(after[name], tensor), name
            continue
        groups, error = tensor.unflatten(1, (-1, GROUP)), (after[name] - tensor).abs().unflatten(1, (-1, GROUP))
        least, most = groups.aminmax(dim=-1, keepdim=True)
        rounding = (least.abs() + (most - least)) * 2**-8  # of minimum and scale to bfloat16
        assert (error <= 0.51 * (most - least) / 15 + rounding).all() and error.max() > 0, name
        assert torch.equal(after[name], Int4Linear(tensor, Kernels()).restored(torch.float32)), name  # what --drafter-weights int4 computes with


def test_files_take_the_bits_that_they_say(tmp_path):
    model = target(intermediate_size=64)
    own = own_weights(cut(model, LAYERS))
    weights = sum(tensor.numel() for tensor in own.values() if tensor.dim() == 2)
    rows, rest = (sum(4 * len(tensor) for tensor in own.values() if tensor.dim() == dim) for dim in (2, 1))
    for bits, size in ((8, weights + rows + rest), (4, weights * 5 // 8 + rest)):
        content = saved(tmp_path / f"{bits}.safetensors", model, bits=bits).read_bytes()
        assert len(content) - 8 - int.from_bytes(content[:8], "little") == size


def test_files_in_8_bits_are_byte_for_byte_what_they_were_before_there_was_a_choice(tmp_path):
    tensors = {MATRIX: torch.arange(-48.0, 48.0).reshape(3, 32) / 7, NORM: torch.linspace(0.5, 1.5, 32)}
    save_own_layers(tmp_path / "own.safetensors", tiny_spec(num_layers=1), [0], tensors, {})
    content = (tmp_path / "own.safetensors").read_bytes()
    assert json.loads(read_header_text(tmp_path / "own.safetensors")).keys() == {"format", "spec", "layers", "card"}
    assert hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:16] == "c6d527f19262e06e"
    assert read_header(tmp_path / "own.safetensors").bits == 8


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}], ids=str)
def test_embedding_and_head_are_the_targets_own_memory(changes, tmp_path):
    model = target(**changes)
    drafter = load_own_layers(saved(tmp_path / "own.safetensors", model), model, torch.float32, model.kernels)
    assert drafter.embedding is model.embedding and drafter.head is model.head
    own = sum(tensor.numel() for tensor in own_weights(cut(model, LAYERS)).values())
    assert model.extra_nbytes(drafter) == 4 * own
    wide = load_own_layers(tmp_path / "own.safetensors", model, torch.bfloat16, Kernels())
    heads = 1 if model.spec.tie_embeddings else 2
    assert model.extra_nbytes(wide) == 2 * (own + heads * model.spec.vocab_size * model.spec.hidden_size)
    quantised = model.cheaper("int8")
    assert load_own_layers(tmp_path / "own.safetensors", quantised, torch.float32, model.kernels).head is quantised.head
    assert drafter.cheaper("int8").embedding is model.embedding


def test_it_computes_what_was_cut(tmp_path):
    model, prompt = target(), random_prompt(50)
    drafter = load_own_layers(saved(tmp_path / "own.safetensors", model), model, torch.float32, native_kernels(torch.float32))
    _, theirs = prefilled(cut(model, LAYERS), [prompt], 50)
    _, ours = prefilled(drafter, [prompt], 50)
    assert (ours.softmax(-1) - theirs.softmax(-1)).abs().max() < 0.02  # 8 bits


def test_a_target_of_another_shape_is_refused(tmp_path):
    path = saved(tmp_path / "own.safetensors", target())
    for field, changes in (("hidden_size", {"hidden_size": 64}), ("vocab_size", {"vocab_size": 60}), ("tie_embeddings", {"tie_embeddings": False})):
        with refused("own.safetensors", field, "the target it was trained for"):
            load_own_layers(path, target(**changes), torch.float32, Kernels())


def test_weights_that_cannot_be_written_so_are_refused(tmp_path):
    model = target()
    with refused("multiples of 32, got 48", "take 8 bits"):
        saved(tmp_path / "own.safetensors", model, bits=4)
    with refused("8 or 4 bits, got 5", "--bits"):
        saved(tmp_path / "own.safetensors", model, bits=5)
    assert not (tmp_path / "own.safetensors").exists()


MATRIX, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def spoil(path, change=dict, metadata=dict):
    header = json.loads(read_header_text(path))
    save_file(change(load_file(path)), path, {"header": json.dumps(metadata(header))})


def read_header_text(path) -> str:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["header"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: {name: tensor for name, tensor in t.items() if name != NORM}, f"{NORM}' must be F32 [32], got absent"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != MATRIX + SCALES}, f"{MATRIX}{SCALES}' must be F32 [48], got absent"),
        (lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[MATRIX].clone()}, "model.layers.2.mlp.up_proj.weight' must be absent"),
        (lambda t: t | {"model.embed_tokens.weight": torch.ones(61, 32)}, "model.embed_tokens.weight' must be absent"),
        (lambda t: t | {MATRIX: t[MATRIX][:-1].contiguous()}, f"{MATRIX}' must be I8 [48, 32], got I8 [47, 32]"),
        (lambda t: t | {MATRIX: t[MATRIX].float()}, f"{MATRIX}' must be I8 [48, 32], got F32 [48, 32]"),
        (lambda t: t | {NORM: t[NORM].reshape(1, 32)}, f"{NORM}' must be F32 [32], got F32 [1, 32]"),
        (lambda t: t | {NORM: t[NORM] * torch.nan}, f"{NORM} holds values that are not finite"),
        (lambda t: t | {MATRIX + SCALES: t[MATRIX + SCALES] * 1e38 * 1e38}, f"{MATRIX} holds values that are not finite"),
    ],
)
def test_tensors_that_the_header_does_not_promise_are_refused(change, word, tmp_path):
    path = saved(tmp_path / "own.safetensors", target())
    spoil(path, change)
    with refused("own.safetensors", word):
        own_tensors(path, read_header(path), torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t | packed({MATRIX: torch.ones(64, 32)}, 8), f"{MATRIX}' must be U8 [64, 16], got I8 [64, 32]"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != MATRIX + SCALES}, f"{MATRIX}{SCALES}' must be BF16 [64, 1, 2], got absent"),
        (lambda t: t | {MATRIX + SCALES: t[MATRIX + SCALES].float()}, f"{MATRIX}{SCALES}' must be BF16 [64, 1, 2], got F32 [64, 1, 2]"),
        (lambda t: t | {MATRIX + SCALES: t[MATRIX + SCALES][..., 0].contiguous()}, f"{MATRIX}{SCALES}' must be BF16 [64, 1, 2], got BF16 [64, 1]"),
        (lambda t: t | {MATRIX: t[MATRIX][:, 1:].contiguous()}, f"{MATRIX}' must be U8 [64, 16], got U8 [64, 15]"),
        (lambda t: t | {MATRIX + SCALES: t[MATRIX + SCALES] * torch.inf}, f"{MATRIX} holds values that are not finite"),
    ],
)
def test_a_file_in_4_bits_holds_nothing_else(change, word, tmp_path):
    path = saved(tmp_path / "own.safetensors", target(intermediate_size=64), bits=4)
    spoil(path, change)
    with refused("own.safetensors", word):
        own_tensors(path, read_header(path), torch.float32, CPU)


@pytest.mark.parametrize(("bits", "other", "word"), [(8, 4, "must be U8"), (4, 8, "must be I8")])
def test_bits_that_the_tensors_do_not_have_are_refused(bits, other, word, tmp_path):
    path = saved(tmp_path / "own.safetensors", target(intermediate_size=64), bits=bits)
    spoil(path, metadata=lambda header: header | {"bits": other})
    with refused("own.safetensors", word):
        own_tensors(path, read_header(path), torch.float32, CPU)
    path = saved(tmp_path / "own.safetensors", target())
    spoil(path, metadata=lambda header: header | {"bits": 4})
    with refused("own.safetensors", "down_proj", "multiple of 32, got 48"):
        own_tensors(path, read_header(path), torch.float32, CPU)


@pytest.mark.parametrize("count", [3, 2**40], ids=["a layer too many", "layers without end"])
def test_a_claim_of_more_layers_is_refused(count, tmp_path):
    path = saved(tmp_path / "own.safetensors", target())
    spoil(path, metadata=lambda header: header | {"spec": header["spec"] | {"num_layers": count}})
    with refused("own.safetensors", "layer"):
        own_tensors(path, read_header(path), torch.float32, CPU)


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        (lambda header: header | {"format": "specplan own layers 2"}, f"format must be {FORMAT!r}"),
        (lambda header: header | {"format": 1}, "format"),
        (lambda header: header | {"layers": "all"}, "layers"),
        (lambda header: header | {"bits": 2}, "bits"),
        (lambda header: header | {"spec": header["spec"] | {"head_dim": 7}}, "head_dim must be even"),
        (lambda header: header | {"spec": header["spec"] | {"hidden_size": 2**41}}, "hidden_size"),
        (lambda header: {name: value for name, value in header.items() if name != "spec"}, "spec"),
        (lambda header: [], "own layers"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(metadata, word, tmp_path):
    path = saved(tmp_path / "own.safetensors", target())
    spoil(path, metadata=metadata)
    with refused("own.safetensors", word):
        read_header(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", b"plain text, and some of it", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (100_000).to_bytes(8, "little") + b"[" * 100_000, (5).to_bytes(8, "little") + b"\xff{}}}"],
    ids=["empty", "cut short", "text", "huge", "endless header", "list", "nested", "no UTF-8"],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "own.safetensors"
    path.write_bytes(content)
    with refused("own.safetensors", "own layers"):
        read_header(path)


def test_a_whole_checkpoint_is_pointed_to_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in expected_shapes(target().spec)}, path, {"format": "pt"})
    with refused("model.safetensors", "give its folder"):
        read_header(path)


def test_a_name_that_comes_with_the_package_is_found_there_and_no_other_is():
    for name in NAMES:
        try:
            path = own_layers_path(name)
        except BadInput as error:
            assert name in str(error) and "install specplan again" in str(error)
        else:
            assert path.name == name + SUFFIX and read_header(path).format == FORMAT and path.stat().st_size <= 30e6
    with refused("no-such.safetensors", "check the path", *NAMES):
        own_layers_path("no-such.safetensors")


def test_capacity_is_planned_with_the_checkpoint_that_an_engine_loads(tmp_path):
    path = saved(tmp_path / "own.safetensors", model := target())
    found = sized(str(path))
    spec = cut(model, LAYERS).spec
    assert (found.model.weights_bytes, found.model.num_layers, found.model.name) == (2 * spec.num_parameters, 2, "own")
    assert "planner train materialize" in found.notes[0] and sized(f"{path},weights_gib=1").notes == []
