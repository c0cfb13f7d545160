"""Training a head that drafts blocks: what a step sees is what the drafter sees, it learns, and an interrupted run ends as a whole one."""

import math

import msgspec
import numpy as np
import pytest
import torch
from tiny import BLOCK_HEAD, block_head_files, prefilled, random_prompt, tiny_model, with_block_head, write_head, write_model

from planner.commands.train_block_diffusion import train_block_diffusion
from planner.commands.train_texts import train_texts
from planner.errors import BadInput
from planner.runtime.dflash_head import load_head, published
from planner.runtime.drafters import make_drafter
from planner.specs import DraftConfig, FullKV, Sampler, SparseKV
from planner.training.block_diffusion import BlockDiffusion, BlockSettings, begun, drafted, seen_contexts, trainable
from planner.training.data import TaughtTexts, TextsSettings, add_text, open_folder, taught, write_on
from planner.training.trainer import TrainSettings, train

LENGTH, PROMPT, TAPS, BLOCK = 72, 8, (1, 0), 4
SETTINGS = BlockSettings(layers=[0, 1], mask_token=60, block_size=BLOCK, anchors=12, span=48, sampled=None)
FAST = TrainSettings(steps=40, learning_rate=3e-3, warmup=4, accumulation=1, autocast=False, save_every=3)


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=5, sharpness=1.1)


@pytest.fixture(scope="module")
def texts(target, tmp_path_factory):
    """Texts that the target wrote, with its hidden states."""
    folder = tmp_path_factory.mktemp("texts") / "all"
    written = write_on(target, [random_prompt(PROMPT, seed=i) for i in range(6)], Sampler(temperature=0.7), LENGTH - PROMPT, seed=0)
    settings = TextsSettings(
        target=target.fingerprint, vocab_size=61, hidden_size=32, num_layers=2, files=[], length=LENGTH, written=6, prompt_len=PROMPT,
        output_len=LENGTH - PROMPT, temperatures=[0.7], top=16, taps=list(TAPS), seed=0,
    )  # fmt: skip
    for index in open_folder(folder, settings, [PROMPT - 1] * 6):
        add_text(folder, index, taught(target, written[index], 16, TAPS))
    return TaughtTexts(folder, target)


# ---- what a step sees


@pytest.mark.parametrize("kv", [FullKV(), SparseKV(budget=20, sink=4, recent=8, storage="evict")], ids=str)
@pytest.mark.parametrize("style", ["qwen3", "llama"])
def test_a_step_says_at_every_mask_what_the_drafter_says_at_run_time(target, texts, tmp_path, kv, style):
    model = with_block_head(tiny_model(seed=5, sharpness=1.1), tmp_path / "head", ids=TAPS, block_size=BLOCK, model_type=style)
    head, text = model.beside[BLOCK_HEAD.path, None], texts.text(0, features=True)
    anchors = torch.tensor([9, 11, 12, 30, 47, LENGTH - BLOCK])
    seen_at, sees = seen_contexts(anchors, None if isinstance(kv, FullKV) else kv)
    with torch.inference_mode():
        hidden = drafted(head, text.features[seen_at].flatten(1), seen_at, sees, text.tokens[anchors], anchors, torch.float32)
        probs = head.logits(hidden).softmax(-1)
        for a, own in zip(anchors.tolist(), probs, strict=True):
            tokens = text.tokens[: a + 1].tolist()
            cache, _ = prefilled(model, [tokens[:-1]], LENGTH + BLOCK)
            drafter = make_drafter(DraftConfig(drafter=BLOCK_HEAD, draft_len=BLOCK - 1, kv=kv), model)
            drafter.start(cache, [tokens[:-1]])
            draft = drafter.propose([tokens], [BLOCK - 1], Sampler(temperature=1.0), [torch.Generator().manual_seed(0)])
            torch.testing.assert_close(own, draft.probs[0], atol=1e-5, rtol=0)


def test_the_masks_of_a_block_are_taught_what_the_target_says_at_their_places(target, texts):
    """With features, head and teacher of one position, the loss is the weighted divergence, written out."""
    head = begun(target, SETTINGS, TAPS)
    parts = BlockDiffusion(head, texts, SETTINGS, torch.float32)
    example, text = parts.example(3), texts.text(parts.example(3).text, features=True)
    anchors = torch.from_numpy(example.anchors)
    loss, weights = 0.0, [math.exp(-k / 2) for k in range(BLOCK - 1)]
    with torch.no_grad():
        learnt = parts.learn(3)
        for a in anchors.tolist():
            one = torch.tensor([a])
            seen_at, sees = seen_contexts(one, None)
            hidden = drafted(head, text.features[seen_at].flatten(1), seen_at, sees, text.tokens[one], one, torch.float32)
            log_q = head.logits(hidden)[0].log_softmax(-1)
            for k in range(BLOCK - 1):
                p, named = text.teacher.log_probs[a + k].exp(), text.teacher.tokens[a + k]
                loss += weights[k] * float((p * (p.log() - log_q[k, named])).sum())
    assert learnt.num_tokens == len(anchors) * (BLOCK - 1)
    assert float(learnt.loss) == pytest.approx(loss / sum(weights) / len(anchors), rel=1e-4)


def test_anchors_are_different_places_where_a_whole_block_follows(target, texts):
    parts = BlockDiffusion(begun(target, SETTINGS, TAPS), texts, SETTINGS, torch.float32)
    examples = [parts.example(number) for number in range(60)]
    assert {example.text for example in examples[:6]} == set(range(6))
    for example in examples:
        assert len(set(example.anchors.tolist())) == len(example.anchors) == 12
        assert example.anchors.min() >= PROMPT - 1 and example.anchors.max() + BLOCK - 1 <= LENGTH - 1
        assert np.ptp(example.anchors) < SETTINGS.span
    assert [parts.example(7).anchors.tolist()] == [examples[7].anchors.tolist()]


def test_budgets_are_drawn_as_often_as_they_weigh(target, texts):
    settings = msgspec.structs.replace(SETTINGS, budgets=[(None, 1.0), (48, 3.0)])
    parts = BlockDiffusion(begun(target, settings, TAPS), texts, settings, torch.float32)
    drawn = [parts.example(number).policy for number in range(200)]
    assert {policy and policy.budget for policy in drawn} == {None, 48}
    assert 130 < sum(policy is not None for policy in drawn) < 170


@pytest.mark.parametrize(("block_size", "decay"), [(8, 4), (10, 5), (16, 7)])
def test_losses_decay_as_in_the_paper(block_size, decay):
    weights = BlockSettings(layers=[0], mask_token=0, block_size=block_size).weights()
    assert weights.tolist() == pytest.approx([math.exp(-(k - 1) / decay) for k in range(1, block_size)])


# ---- learning


def test_a_head_begins_as_layers_of_its_target_and_shares_its_embedding_and_head(target):
    head = begun(target, SETTINGS, TAPS)
    assert torch.equal(head.layers[1].qkv.weights, target.layers[1].qkv.weights)
    assert torch.equal(head.embedding, target.embedding) and torch.equal(head.head.weights, target.head.weights)
    learns = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert learns == set(trainable(head)) and not {"embedding", "head.weights"} & learns and {"fc.weights", "hidden_norm", "norm"} < learns


def test_the_loss_falls_and_drafts_are_accepted_more_often(target, texts):
    head, losses = begun(target, SETTINGS, TAPS), []
    parts = BlockDiffusion(head, texts, SETTINGS, torch.float32)
    with torch.no_grad():
        before = np.mean([float(parts.learn(number).loss) for number in range(6)])
    settings = msgspec.structs.replace(FAST, steps=60, save_every=1000)
    train(trainable(head), parts.learn, settings, texts.folder / "unused.safetensors", SETTINGS, stepped=lambda done: losses.append(done.loss))
    assert np.mean(losses[-12:]) < 0.7 * before


def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(target, texts, tmp_path):
    settings = msgspec.structs.replace(FAST, steps=7)

    class Interrupted(Exception):
        pass

    def run(checkpoint, stop_at=None):
        head = begun(target, SETTINGS, TAPS)

        def stepped(done):
            if done.step == stop_at:
                raise Interrupted

        train(trainable(head), BlockDiffusion(head, texts, SETTINGS, torch.float32).learn, settings, checkpoint, SETTINGS, stepped=stepped)
        return {name: parameter.detach().clone() for name, parameter in trainable(head).items()}

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stop_at=5)
    resumed = run(tmp_path / "cut")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["fc.weights"], begun(target, SETTINGS, TAPS).fc.weights)


def test_what_is_written_is_read_as_a_published_head(target, tmp_path):
    head = begun(target, SETTINGS, TAPS)
    loaded = load_head(write_head(tmp_path / "head", *published(head, 2)), target, torch.float32)
    assert (loaded.taps, loaded.block_size, loaded.mask_token, loaded.spec.qk_norm) == (TAPS, BLOCK, 60, False)
    for name, tensor in trainable(head).items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    config, tensors = block_head_files(target, ids=TAPS)
    first = load_head(write_head(tmp_path / "qwen", config, tensors), target, torch.float32)
    again = load_head(write_head(tmp_path / "again", *published(first, 2)), target, torch.float32)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


# ---- the command


def test_texts_to_a_head_that_can_be_loaded(tmp_path):
    model, dataset, other = write_model(tmp_path / "model", max_context_len=512), tmp_path / "words.txt", tmp_path / "others.txt"
    dataset.write_text(" ".join(f"{word} of {number}" for number, word in enumerate(["one", "two", "three"] * 60)))
    other.write_text(" ".join(f"{number} is {word}" for number, word in enumerate(["four", "five"] * 90)))
    texts, out = tmp_path / "texts", tmp_path / "run"
    train_texts(
        str(model), [str(dataset)], texts, length=128, written=2, prompt_len=32, output_len=24, temperatures=[1.0], taps=[0, 1], dtype="float32"
    )
    settings = BlockSettings(block_size=BLOCK, anchors=8, span=32)
    training = TrainSettings(steps=2, accumulation=1, autocast=False, save_every=1)
    options = {"held_out": [str(other)], "context_len": 128, "temperatures": [1.0], "budgets": [40], "look_every": 1}
    log = train_block_diffusion(str(model), texts, out, settings=settings, training=training, **options)
    assert [met.step for met in log] == [1, 2] and set(log[-1].acceptance) == set(log[-1].tokens) == {"1/40", "1/full"}
    assert all(0 <= share <= 1 for share in log[-1].acceptance.values()) and all(1 <= tokens <= BLOCK for tokens in log[-1].tokens.values())
    target = tiny_model(vocab_size=256, max_context_len=512)
    head = load_head(out / "head", target, torch.float32)
    assert head.taps == (0, 1) and head.spec.num_layers == 2 and head.mask_token == 255
    assert train_block_diffusion(str(model), texts, out, settings=settings, training=training, **options) == log  # nothing is left to do
    size = (out / "head" / "model.safetensors").stat().st_size
    assert train_block_diffusion(str(model), texts, out, settings=settings, training=training, head_dtype="fp8", **options) == log
    again = load_head(out / "head", target, torch.float32)
    assert (out / "head" / "model.safetensors").stat().st_size < 0.7 * size and again.fingerprint != head.fingerprint
    for name, tensor in head.state_dict().items():
        off = (again.state_dict()[name] - tensor).abs()
        most = 0 if tensor.dim() == 1 else (2**-4 + 2**-8) * tensor.abs() + tensor.abs().max() / 448 * 2**-10  # one in e4m3, one in bfloat16
        assert (off <= most).all(), name


REFUSALS = [
    ({"mask_token": 61}, TAPS, "the mask must be a token from 0 to 60, got 61"),
    ({}, (), "these texts hold none; write them with"),
    ({"layers": [0, 2]}, TAPS, "layers are different ones of the target's 0 to 1"),
]


@pytest.mark.parametrize(("changes", "taps", "message"), REFUSALS)
def test_heads_that_cannot_be_are_refused(target, changes, taps, message):
    with pytest.raises(BadInput, match=message):
        begun(target, msgspec.structs.replace(SETTINGS, **changes), taps)


@pytest.mark.parametrize(
    "changes", [{"block_size": 1}, {"anchors": 0}, {"decay": 0.0}, {"budgets": []}, {"budgets": [(8, 1.0)]}, {"variant": "ce"}], ids=str
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError):
        BlockSettings(layers=[0], mask_token=0, **changes)


def test_a_block_longer_than_what_texts_go_on_for_is_refused(target, texts):
    settings = msgspec.structs.replace(SETTINGS, block_size=LENGTH - PROMPT + 1)
    with pytest.raises(BadInput, match="must go on for more than a block"):
        BlockDiffusion(begun(target, settings, TAPS), texts, settings, torch.float32)
