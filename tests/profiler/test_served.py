"""A log of served traffic: ids, chats and text become token ids, samplers are what the line says, and what is malformed is named with its line."""

import json
import random
import re

import pytest
from letters import ANSWER, USER, LetterTokenizer

from planner.errors import BadInput
from planner.profiler import served
from planner.profiler.served import draw_lines, read_log
from planner.specs import Sampler

GOOD = {"prompt": "abc", "output": "defg", "temperature": 0.5}


def written(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def read(path, count=100, seed=0, default=None, vocab_size=2000, max_context_len=50, tokenizer=None):
    log = read_log(path, default)
    return draw_lines(log, tokenizer or LetterTokenizer(), count=count, seed=seed, vocab_size=vocab_size, max_context_len=max_context_len)


def only(path, *records, **options):
    (line,) = read(written(path, *records), **options).lines
    return line


@pytest.fixture
def log(tmp_path):
    return tmp_path / "served.jsonl"


def test_text_is_tokenised_behind_the_token_that_begins_it(log):
    line = only(log, GOOD, tokenizer=LetterTokenizer(bos_token=7))
    assert line == (1, [7, 97, 98, 99], [100, 101, 102, 103], Sampler(temperature=0.5))


def test_ids_win_over_text_and_chats_go_through_the_template(log):
    line = only(log, GOOD | {"prompt_tokens": [1, 2], "output_tokens": [3, 4]})
    assert (line.prompt, line.output) == ([1, 2], [3, 4])
    line = only(log, {"messages": [{"role": "user", "content": "a", "name": "x"}], "output": "bc", "temperature": 0})
    assert line.prompt == [USER, 97, ANSWER]


@pytest.mark.parametrize(
    ("fields", "sampler"),
    [
        ({"temperature": 1}, Sampler(temperature=1.0)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 40}, Sampler(temperature=0.7, top_p=0.9, top_k=40)),
        ({"sampler": {"temperature": 0.7, "top_k": -1}}, Sampler(temperature=0.7)),
        ({"temperature": 0.7, "sampler": {"temperature": 0.7, "top_p": 1}}, Sampler(temperature=0.7)),
        ({"temperature": 0, "top_p": 0.9, "top_k": 40}, Sampler()),
        ({"temperature": 1, "min_p": 0, "repetition_penalty": 1.0, "user": "somebody"}, Sampler(temperature=1.0)),
    ],
)
def test_a_sampler_is_what_the_line_says(log, fields, sampler):
    assert only(log, {"prompt": "abc", "output": "defg", **fields}).sampler == sampler


def test_a_default_fills_what_a_line_does_not_say(log):
    default = Sampler(temperature=0.7, top_k=5)
    lines = read(written(log, {"prompt": "a", "output": "bc"}, {"prompt": "a", "output": "bc", "temperature": 1.0}), default=default).lines
    assert [line.sampler for line in lines] == [default, Sampler(temperature=1.0, top_k=5)]


def test_lines_that_cannot_be_replayed_are_counted_by_reason(log):
    records = [
        GOOD,
        GOOD | {"prompt": "x" * 47},
        GOOD | {"output": "x"},
        GOOD | {"min_p": 0.1},
        GOOD | {"logit_bias": {"5": 1}},
        GOOD | {"prompt": "x" * 46},
    ]
    found = read(written(log, *records))
    assert [line.number for line in found.lines] == [1, 6]
    assert {re.sub(r",.*|:.*", "", reason): count for reason, count in found.skipped.items()} == {
        "prompt + output beyond the model's 50 tokens": 1, "output of fewer than 2 tokens": 1, "sampled with min_p": 1, "sampled with logit_bias": 1,
    }  # fmt: skip


def test_lines_are_drawn_with_the_seed_and_kept_in_order(log):
    written(log, *[GOOD | {"prompt": "a" * (1 + i)} for i in range(30)])
    numbers = [[line.number for line in read(log, count=10, seed=seed).lines] for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2] and all(len(drawn) == 10 and drawn == sorted(drawn) for drawn in numbers)
    assert [line.number for line in read(log).lines] == list(range(1, 31))


BAD = {
    "[]": "object",
    "{": "JSON",
    '"text"': "object",
    '{"prompt": NaN}': "JSON|valid",
    "\x00": "JSON",
    "[" * 5000: "recursion|depth|object",
    '{"output": "ab", "temperature": 1}': "needs a prompt",
    '{"prompt": "ab", "temperature": 1}': "needs an output",
    '{"prompt": "ab", "output": "ab"}': "temperature must be given.*--temperature",
    '{"prompt": "", "output": "ab", "temperature": 1}': "at least one token",
    '{"prompt": 5, "output": "ab", "temperature": 1}': r"prompt",
    '{"prompt_tokens": [1, true], "output": "ab", "temperature": 1}': r"prompt_tokens\[1\]",
    '{"prompt_tokens": [1, -1], "output": "ab", "temperature": 1}': r"prompt_tokens\[1\]",
    '{"prompt_tokens": [1, 2000], "output": "ab", "temperature": 1}': "below 2000.*got 2000",
    '{"prompt": "ab", "output_tokens": [1, 1e99], "temperature": 1}': r"output_tokens\[1\]",
    '{"messages": [{"role": "user", "content": [1]}], "output": "ab", "temperature": 1}': "content",
    '{"messages": [{"role": "user"}], "output": "ab", "temperature": 1}': "content",
    '{"prompt": "ab", "output": "ab", "temperature": -1}': "temperature must be 0 .greedy. or lie in 0.01..100, got '-1'",
    '{"prompt": "ab", "output": "ab", "temperature": 0.001}': "temperature must be",
    '{"prompt": "ab", "output": "ab", "temperature": "hot"}': "temperature must be",
    '{"prompt": "ab", "output": "ab", "temperature": true}': "temperature must be",
    '{"prompt": "ab", "output": "ab", "temperature": 1e999}': "temperature|range",
    '{"prompt": "ab", "output": "ab", "temperature": 1, "top_p": 0}': "top_p must",
    '{"prompt": "ab", "output": "ab", "temperature": 1, "top_k": 2.5}': "top_k must",
    '{"prompt": "ab", "output": "ab", "temperature": 1, "top_k": 99999999999999999999999}': "top_k must",
    '{"prompt": "ab", "output": "ab", "temperature": 1, "sampler": {"temperature": 0.5}}': "different values",
    '{"prompt": "ab", "output": "ab", "temperature": 1, "sampler": "greedy"}': "sampler",
    '{"prompt": "\\ud800", "output": "ab", "temperature": 1}': "",
}


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_line_is_named(log, line):
    written(log, GOOD, "", line, GOOD)
    with pytest.raises(BadInput, match=rf"served\.jsonl:3: .*({BAD[line]})") as refused:
        read(log)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_malformed_line_is_named_though_it_was_not_drawn(log):
    written(log, *[GOOD] * 50, '{"prompt": "ab"}')
    with pytest.raises(BadInput, match=r"served\.jsonl:51"):
        read(log, count=1)


def test_a_line_of_absurd_length_is_refused_before_it_is_parsed(log, monkeypatch):
    monkeypatch.setattr(served, "MAX_LINE_BYTES", 1000)
    with pytest.raises(BadInput, match=r"served\.jsonl:2: a line holds at most 1000 bytes, got 10"):
        read(written(log, GOOD, GOOD | {"note": "x" * 10_000}))


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_an_empty_log_is_refused(log, content):
    log.write_bytes(content)
    with pytest.raises(BadInput, match="holds none"):
        read(log)


def test_whatever_bytes_a_log_holds_it_is_read_or_refused_in_one_line(log):
    rng = random.Random(0)
    good = json.dumps(GOOD | {"sampler": {"top_k": 5}, "output_tokens": [1, 2, 3]}).encode()
    refused = 0
    for _ in range(500):
        broken = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        log.write_bytes(bytes(broken))
        try:
            read(log)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error).strip()
    assert 100 < refused < 500
