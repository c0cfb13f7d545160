"""A folder of texts: what the teacher says is what the target computes, and a folder that was begun is gone on with."""

import pytest
import torch
from checkpoints import refused
from msgspec import json
from safetensors.torch import load_file, save_file
from taught import BEGIN, LENGTH, target, taught_folder, texts_settings
from tiny import prefilled, random_prompt, write_model

from planner.commands.train_texts import train_texts
from planner.training import data


def test_the_teachers_words_are_the_targets_distribution():
    model, tokens = target(), random_prompt(90)
    found = data.taught(model, tokens, top=5, taps=(0, 2))
    cache, _ = prefilled(model, [tokens[:1]], 90)
    with torch.inference_mode():
        out = model(torch.tensor([tokens[1:]]), torch.arange(1, 90)[None], cache, taps=(0, 2))
        best, ids = model.logits(out.hidden[0]).log_softmax(-1).topk(5)
    torch.testing.assert_close(found["log_probs"][1:].float(), best, atol=5e-3, rtol=1e-3)  # kept in 16 bits
    assert (found["named"][1:] == ids).float().mean() > 0.99  # but for ties
    torch.testing.assert_close(found["features"][1:], torch.stack([out.taps[0][0], out.taps[2][0]], 1), atol=1e-4, rtol=1e-4)
    assert found["tokens"].tolist() == tokens


class Stopping:
    """Progress that is killed after some texts."""

    def __init__(self, after: int):
        self.left = after

    def stage(self, name, total):
        pass

    def advance(self, n=1):
        self.left -= n
        if not self.left:
            raise KeyboardInterrupt


def test_a_folder_that_was_begun_is_gone_on_with_and_ends_as_if_nobody_had_stopped(tmp_path):
    folder = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(700)))
    asked = {
        "length": 130,
        "written": 5,
        "prompt_len": 40,
        "output_len": 12,
        "temperatures": [0.0, 1.0],
        "top": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    count = train_texts(str(folder), [str(tmp_path / "text.txt")], tmp_path / "whole", **asked)
    assert count == 5 + 5
    for stop in (2, 3, 2, 1):  # within the stretches, between them and what is written, within a group
        with pytest.raises(KeyboardInterrupt):
            train_texts(str(folder), [str(tmp_path / "text.txt")], tmp_path / "begun", **asked, progress=Stopping(stop))
    assert train_texts(str(folder), [str(tmp_path / "text.txt")], tmp_path / "begun", **asked) == count
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "begun" / path.name).read_bytes() == path.read_bytes(), path.name
    with refused("texts of other settings", "another folder"):
        train_texts(str(folder), [str(tmp_path / "text.txt")], tmp_path / "begun", **asked | {"seed": 1})


@pytest.fixture
def made(tmp_path):
    model = target()
    return model, taught_folder(tmp_path / "taught", model)


def test_a_folder_of_another_target_or_with_texts_missing_is_refused(made):
    model, folder = made
    assert len(data.TaughtTexts(folder, model)) == 3
    model.fingerprint = "f" * 16
    with refused("another target", "f" * 16):
        data.TaughtTexts(folder, model)
    model.fingerprint = "0" * 16
    data.text_file(folder, 1).unlink()
    with refused("all of its 3 texts, 1 are missing", "planner train texts"):
        data.TaughtTexts(folder, model)


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"[]", b'{"settings": {}}', b"\xff\xfe",
        {"begins": [BEGIN, -1, BEGIN]}, {"begins": [LENGTH - 1] * 3}, {"begins": []}, {"written": 4}, {"written": -1}, {"length": -5}, {"length": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(manifest, made):
    model, folder = made
    if isinstance(manifest, dict):
        begins = manifest.pop("begins", [BEGIN] * 3)
        manifest = json.encode(data.Manifest(settings=texts_settings(model, **manifest), begins=begins))
    (folder / data.MANIFEST).write_bytes(manifest)
    with refused():
        data.TaughtTexts(folder, model)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda tensors: {"tokens": tensors["tokens"]},
        lambda tensors: tensors | {"tokens": tensors["tokens"][:-1]},
        lambda tensors: tensors | {"tokens": tensors["tokens"] + 61},
        lambda tensors: tensors | {"named": -tensors["named"] - 1},
        lambda tensors: tensors | {"log_probs": tensors["log_probs"][:, :3].contiguous()},
    ],
    ids=["missing", "short", "beyond the vocabulary", "negative", "fewer"],
)
def test_a_text_that_is_not_of_the_folder_is_refused(spoilt, made):
    model, folder = made
    path = data.text_file(folder, 2)
    save_file(spoilt(load_file(path)), path)
    with refused("000002.safetensors", "delete it"):
        data.TaughtTexts(folder, model).text(2)


def test_a_text_that_is_no_safetensors_file_is_refused(made):
    model, folder = made
    data.text_file(folder, 0).write_bytes(b"\xff" * 100)
    with refused("000000.safetensors"):
        data.TaughtTexts(folder, model).text(0)
    with refused("not a text of this folder"):
        data.TaughtTexts(folder, model).text(1, features=True)
