"""planner train, on a tiny folder model: texts, a drafter, its checkpoints, and the drafter at work; bad input is one line."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from tiny import write_model

from planner.cli import main
from planner.trained import NAMES, read_header

TEXT = " ".join(f"the {word} of {other} is {word}{other}" for word in ("sun", "sea", "sand", "salt") for other in ("one", "two", "six", "ten"))
TRAIN = "--continuation 32 --steps 4 --warmup 1 --accumulation 1 --save-every 2 --look-every 2 --budgets 48:.7,64:.3"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model", num_layers=3, intermediate_size=64, max_context_len=512)
    write_model(folder / "other", seed=1, max_context_len=512)
    write_model(folder / "wide", hidden_size=40, max_context_len=512)
    (folder / "text.txt").write_text(TEXT * 2)
    (folder / "held.txt").write_text(TEXT[::-1])
    (folder / "junk").write_bytes(b"junk")
    return {path.name.split(".")[0]: path for path in folder.iterdir()} | {"out": folder / "run", "texts": folder / "texts", "folder": folder}


@pytest.fixture
def run(files, monkeypatch, capsys):
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["planner", *(word.format_map(files) for word in line.split())])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def texts(files, run):
    """The folder of texts, filled by the first who asks."""
    if not files["texts"].exists():
        line = "train texts --model {model} --dataset {text} -o {texts} --length 160 --written 2 --prompt-len 60 --output-len 20 --top 8"
        code, out, err = run(f"{line} --dtype float32 --device cpu --json --quiet")
        assert code == 0 and err == "", err
        assert json.loads(out) == {"texts": len(TEXT) * 2 // 160 + 2, "folder": str(files["texts"])}
    return files["texts"]


def test_a_drafter_is_trained_and_written_and_drafts(files, texts, run):
    held = "--held-out {held} --held-out-isl 100 --held-out-budgets 48"
    code, out, err = run(f"train multi-view {{texts}} --model {{model}} -o {{out}} {TRAIN} {held} --device cpu --json --quiet")
    assert code == 0 and err == "", err
    log = json.loads(out)["log"]
    assert [line["step"] for line in log] == [2, 4] and all(line["loss"] > 0 for line in log)
    assert log[0]["acceptance"].keys() == {"0/48", "0/full", "1/48", "1/full"}
    drafter = files["out"] / "drafter.safetensors"
    header = read_header(drafter)
    assert header.layers == [0, 1, 2] and header.spec.num_layers == 3
    assert header.card["run"]["settings"]["budgets"] == [[48, 0.7], [64, 0.3]] and header.card["log"] == log

    content = drafter.read_bytes()
    drafter.unlink()
    code, out, _ = run(f"train multi-view {{texts}} --model {{model}} -o {{out}} {TRAIN} --device cpu")  # there is nothing left to train
    assert code == 0 and "T=1/48" in out and drafter.read_bytes() == content
    code, _, err = run(f"train multi-view {{texts}} --model {{model}} -o {{out}} {TRAIN.replace('--steps 4', '--steps 5')}")
    assert code == 2 and "other settings" in err

    again = TRAIN.replace("--steps 4", "--steps 1") + " --learning-rate 1e-9 --begin {out}/drafter.safetensors"
    code, _, err = run(f"train multi-view {{texts}} --model {{model}} -o {{folder}}/more {again} --device cpu --quiet")
    assert code == 0, err
    more = files["folder"] / "more" / "drafter.safetensors"
    assert read_header(more).layers == header.layers and read_header(more).card["run"]["begin"]
    for (name, weight), other in zip(load_file(drafter).items(), load_file(more).values(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)  # a rate of nothing leaves it as it began

    code, out, err = run("train materialize {out}/drafter.safetensors -o {folder}/checkpoint --model {model} --json")
    assert code == 0, err
    assert {name.rpartition("/")[2] for name in json.loads(out)["written"]} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    written = {}
    generate = "generate --model {model} --prompt abcabcabc --max-new-tokens 24 --dtype float32 --device cpu --json"
    for path in ("", "{out}/drafter.safetensors", "{folder}/checkpoint"):
        drafting = f"--drafter draft_model --draft-model {path} --kv-budget 48 --draft-len 3" if path else "--drafter none"
        code, out, err = run(f"{generate} {drafting}")
        assert code == 0, err
        written[path] = json.loads(out)["text"]
    assert len(set(written.values())) == 1


def test_bits_concern_the_file_alone(files, texts, run, monkeypatch):
    line = f"train multi-view {{texts}} --model {{model}} -o {{folder}}/bits {TRAIN.replace('--steps 4', '--steps 1')} --device cpu --quiet"
    assert run(line)[0] == 0
    drafter = files["folder"] / "bits" / "drafter.safetensors"
    before, size = read_header(drafter), drafter.stat().st_size
    code, _, err = run(f"{line} --bits 4")  # the training is done, and is not another one
    assert code == 0, err
    after = read_header(drafter)
    assert (before.bits, after.bits) == (8, 4) and after.card == before.card and drafter.stat().st_size < size
    monkeypatch.setattr("planner.runtime.linear.GROUP", 48)
    code, _, err = run(f"{line.replace('/bits', '/none')} --bits 4")
    assert code == 2 and "multiples of 48, got 32; take 8 bits" in err and not (files["folder"] / "none").exists()  # before anything is trained


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 100", "--length"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 513", "--length"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written -1", "--written"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written 99 --prompt-len 99 --output-len 9", "--written"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written 1", "fit the model's 512"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written 0 --top 0", "--top"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written 0 --taps 3", "--taps"),
        ("train texts --model {model} --dataset {text} -o {folder}/t --length 160 --written 0 --temperatures hot", "--temperatures"),
        ("train texts --model {model} --dataset {text} -o {junk} --length 160 --written 0", "--out"),
        ("train multi-view {folder} --model {model} -o {folder}/r", "texts"),
        ("train multi-view {texts} --model {other} -o {folder}/r", "another target"),
        ("train multi-view {texts} --model {model} -o {folder}/no/r", "--out"),
        ("train multi-view {texts} --model {model} -o {junk}", "--out"),
        ("train multi-view {texts} --model {model} -o {folder}/r --layers 0,3", "0 to 2"),
        ("train multi-view {texts} --model {model} -o {folder}/r --layers one", "--layers"),
        ("train multi-view {texts} --model {model} -o {folder}/r --begin {folder}/none.safetensors", "check the path"),
        ("train multi-view {texts} --model {model} -o {folder}/r --begin {out}/drafter.safetensors --layers 0,1", "--layers"),
        ("train multi-view {texts} --model {model} -o {folder}/r --budgets 48:much", "--budgets"),
        ("train multi-view {texts} --model {model} -o {folder}/r --budgets 8", "--budgets"),
        ("train multi-view {texts} --model {model} -o {folder}/r --selection best", "--selection"),
        ("train multi-view {texts} --model {model} -o {folder}/r --variant best", "--variant"),
        ("train multi-view {texts} --model {model} -o {folder}/r --temperature 0", "greedy"),
        ("train multi-view {texts} --model {model} -o {folder}/r --steps 0", "steps"),
        ("train multi-view {texts} --model {model} -o {folder}/r --bits 5", "8 or 4 bits, got 5; change --bits"),
        ("train block-diffusion {texts} --model {model} -o {folder}/r --head-dtype int8", "--head-dtype"),
        ("train multi-view {texts} --model {model} -o {folder}/r --look-every 0", "--look-every"),
        ("train multi-view {texts} --model {model} -o {folder}/r --held-out {text} --held-out-isl 100", "text.txt is among the texts"),
        ("train multi-view {texts} --model {model} -o {folder}/r --held-out {held} --held-out-isl 999", "--held-out-isl"),
        ("train multi-view {texts} --model {model} -o {folder}/r --held-out {held} --held-out-isl 300", "--held-out-isl"),
        ("train multi-view {texts} --model {model} -o {folder}/r --held-out {held} --held-out-budgets 4", "got 4"),
        ("train materialize {folder}/none.safetensors -o {folder}/m --model {model}", NAMES[0]),
        ("train materialize {model}/model.safetensors -o {folder}/m --model {model}", "holds no drafter's own layers"),
        ("train materialize {text} -o {folder}/m --model {model}", "holds no drafter's own layers"),
        ("train materialize {text} -o {folder}/m --model {model} --dtype int8", "dtype"),
        ("generate --model {model} --prompt a --drafter draft_model --draft-model {model}/model.safetensors --draft-len 2", "own layers"),
        (f"generate --model {{wide}} --prompt a --drafter draft_model --draft-model {NAMES[0]} --draft-len 2", NAMES[0]),
    ],
)
def test_bad_input_is_one_line(line, words, texts, run):
    code, out, err = run(f"{line} --device cpu" if "materialize" not in line else line)
    assert code == 2 and out == ""
    assert words in err and err.count("\n") == 1, err
