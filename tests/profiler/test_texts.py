"""Prompts of an exact length, never overlapping, of every kind alike; what is wrong with a file is said with its line."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import ANSWER, SYSTEM, USER, LetterTokenizer

from planner.datasets import expand
from planner.errors import BadInput
from planner.profiler.texts import distinct_4grams, draw_prompts

TOKENIZER = LetterTokenizer()


def raw(path, length, letter="a"):
    """A file whose every character says its offset."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(chr(0x4E00 + i) for i in range(length)) if letter is None else letter * length, encoding="utf-8")
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def chats(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def draw(files, length=10, count=1, seed=0, seen=(), tokenizer=TOKENIZER):
    return draw_prompts(tokenizer, files, length=length, count=count, seed=seed, seen=list(seen))


# ---- raw text


@pytest.mark.parametrize("bos_token", [None, 7])
@pytest.mark.parametrize("length", [2, 9, 10, 99])
def test_raw_prompts_have_the_length_asked_for_and_say_where_they_are_from(tmp_path, length, bos_token):
    file = raw(tmp_path / "a.txt", 100, letter=None)
    step = length - (bos_token is not None)
    prompts = draw([file], length, 100 // step, tokenizer=LetterTokenizer(bos_token))
    assert {len(prompt.tokens) for prompt in prompts} == {length}
    for prompt in prompts:
        begin = [] if bos_token is None else [bos_token]
        assert prompt.tokens == begin + [0x4E00 + prompt.offset + i for i in range(prompt.extent)]
        assert prompt.key == f"a.txt#{digest(file)}@{prompt.offset}+{prompt.extent}"
    covered = Counter(i for prompt in prompts for i in range(prompt.offset, prompt.offset + prompt.extent))
    assert set(covered.values()) == {1}


def test_a_prompt_of_one_token_is_made_or_refused(tmp_path):
    try:
        assert draw([raw(tmp_path / "a.txt", 100)], length=1, tokenizer=LetterTokenizer(7))[0].tokens == [7]
    except BadInput:
        pass


def test_the_seed_decides(tmp_path):
    file = raw(tmp_path / "a.txt", 1000)
    assert draw([file], count=5, seed=1) == draw([file], count=5, seed=1)
    assert draw([file], count=5, seed=1) != draw([file], count=5, seed=2)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(0, 9))
def test_prompts_keep_off_what_was_seen(tmp_path_factory, first_length, second_length, count, seed):
    file = raw(tmp_path_factory.mktemp("texts") / "a.txt", 400)
    seen = draw([file], first_length, count, seed)
    try:
        others = draw([file], second_length, 3, seed + 1, [prompt.key for prompt in seen])
    except BadInput as error:
        assert "that the profile did not see" in str(error)
        return
    for prompt in others:
        for old in seen:
            assert prompt.offset + prompt.extent <= old.offset or old.offset + old.extent <= prompt.offset


def test_too_little_text_is_refused_with_what_there_is(tmp_path):
    file = raw(tmp_path / "a.txt", 35)
    with pytest.raises(BadInput, match="4 prompts of 10 tokens are needed, the dataset holds 3; add files or lower --texts"):
        draw([file], count=4)
    with pytest.raises(BadInput, match="2 prompts of 10 tokens that the profile did not see are needed, the dataset holds 1"):
        draw([file], count=2, seen=[f"a.txt#{digest(file)}@5+10"])
    with pytest.raises(BadInput, match="--dataset FILE"):
        draw([])


@pytest.mark.parametrize("key", ["a.txt", "a.txt@1", "a.txt@1+", "a.txt@-1+3", "a.txt@x+3", "a.txt@\u00b2+3"])
def test_a_seen_text_that_is_no_key_is_refused(tmp_path, key):
    with pytest.raises(BadInput, match="named source@offset[+]length"):
        draw([raw(tmp_path / "a.txt", 100)], seen=[key])


def test_a_source_may_hold_the_separators_of_keys(tmp_path):
    file = raw(tmp_path / "a@3+b.txt", 20)
    (seen,) = draw([file])
    (other,) = draw([file], seen=[seen.key])
    assert {seen.offset, other.offset} == {0, 10}


def test_bytes_that_are_not_utf8_are_read_as_latin1_and_a_mark_is_dropped(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"caf\xe9 caf\xe9 ")
    (tmp_path / "new.txt").write_bytes(b"\xef\xbb\xbf" + "caf\u00e9 caf\u00e9 ".encode())
    assert draw([tmp_path / "old.txt"])[0].tokens == draw([tmp_path / "new.txt"])[0].tokens == TOKENIZER.encode("caf\u00e9 caf\u00e9 ")


# ---- kinds


def test_every_kind_weighs_the_same_however_many_files_it_has(tmp_path):
    files = [raw(tmp_path / "prose" / f"{i}.txt", 1000) for i in range(3)] + [raw(tmp_path / "code" / "x.txt", 100)]
    prompts = draw(files, count=12)
    assert Counter(prompt.kind for prompt in prompts) == {"prose": 6, "code": 6}
    assert Counter(prompt.source[:5] for prompt in prompts if prompt.kind == "prose") == {"0.txt": 2, "1.txt": 2, "2.txt": 2}


def test_a_kind_that_runs_out_leaves_the_rest_to_the_others(tmp_path):
    files = [raw(tmp_path / "prose" / "a.txt", 1000), raw(tmp_path / "code" / "b.txt", 20)]
    assert Counter(prompt.kind for prompt in draw(files, count=10)) == {"prose": 8, "code": 2}


def test_files_of_one_folder_are_kinds_of_their_own(tmp_path):
    files = [raw(tmp_path / "texts" / "a.txt", 1000), raw(tmp_path / "texts" / "b.txt", 1000)]
    assert Counter(prompt.kind for prompt in draw(files, count=4)) == {"a": 2, "b": 2}


def test_prompts_of_different_files_have_different_keys(tmp_path):
    files = [raw(tmp_path / "prose" / "a.txt", 100), raw(tmp_path / "code" / "a.txt", 100, "b")]
    prompts = draw(files, count=20)
    assert len({tuple(prompt.tokens) for prompt in prompts}) == 2
    assert len({prompt.key for prompt in prompts}) == 20


# ---- chats

HELLO = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]}
SHARE_GPT = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "well"}]}
PROMPT = {"prompt": "hello"}


@pytest.mark.parametrize("record, length", [(HELLO, 10), (SHARE_GPT, 7), (PROMPT, 5)])
def test_a_chat_ends_where_the_last_user_waits_for_an_answer(tmp_path, record, length):
    file = chats(tmp_path / "c.jsonl", record)
    (prompt,) = draw([file], length=min(length, 7))
    whole = ([SYSTEM, *TOKENIZER.encode("be")] if record is HELLO else []) + [USER, *TOKENIZER.encode("hello"), ANSWER]
    assert prompt.tokens == whole[-min(length, 7) :]
    assert prompt.key == f"c.jsonl#{digest(file)}@0+1"


def test_chats_are_joined_until_they_fill_the_length_and_the_oldest_tokens_are_cut(tmp_path):
    file = chats(tmp_path / "c.jsonl", *({"prompt": chr(97 + i) * 6} for i in range(9)))
    prompts = sorted(draw([file], length=15, count=3), key=lambda prompt: prompt.offset)
    assert [(prompt.offset, prompt.extent) for prompt in prompts] == [(0, 3), (3, 3), (6, 3)]
    for i, prompt in enumerate(prompts):
        turns = [token for letter in range(3 * i, 3 * i + 3) for token in [USER, *[97 + letter] * 6]]
        assert prompt.tokens == (turns + [ANSWER])[-15:]


def test_chats_that_were_seen_are_not_drawn_again(tmp_path):
    file = chats(tmp_path / "c.jsonl", *({"prompt": "x" * 6} for _ in range(8)))
    seen = draw([file], length=10, count=2, seed=1)
    others = draw([file], length=10, count=2, seed=2, seen=[prompt.key for prompt in seen])
    assert sorted(i for prompt in seen + others for i in range(prompt.offset, prompt.offset + prompt.extent)) == list(range(8))


def test_a_long_last_answer_does_not_fill_a_prompt(tmp_path):
    records = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 50}]}, {"prompt": "next"}]
    (prompt,) = draw([chats(tmp_path / "c.jsonl", *records)], length=20)
    assert prompt.tokens == ([ord("x")] * 50 + [USER, *TOKENIZER.encode("next"), ANSWER])[-20:]
    assert prompt.extent == 2


def test_empty_lines_and_dos_line_ends_are_skipped(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "hello"}\r\n\r\n   \n{"prompt": "hello"}')
    assert len(draw([tmp_path / "c.jsonl"], length=5, count=2)) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_inside_a_string_ends_no_line(tmp_path, separator):
    content = f"hello{separator}world"
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": content}, ensure_ascii=False) + "\n", encoding="utf-8")
    (prompt,) = draw([tmp_path / "c.jsonl"], length=11)
    assert prompt.tokens == [*TOKENIZER.encode(content), ANSWER][-11:]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ("[]", "line 3 must be an object with `messages`"),
        ('"text"', "line 3 must be an object"),
        ("{}", "line 3 must be an object with `messages` .role, content., `conversations` or `prompt`"),
        ('{"messages": []}', "line 3 must be an object"),
        ('{"prompt": 7}', "line 3 must be an object"),
        ('{"messages": ["hello"]}', "line 3: each message needs a role and a content"),
        ('{"messages": [{"role": "user"}]}', "line 3: each message needs"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 3: each message needs"),
        ('{"conversations": [{"from": 1, "value": "x"}]}', "line 3: each message needs"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "c.jsonl").write_text('{"prompt": "one"}\n\n' + line + '\n{"prompt": "two"}\n')
    with pytest.raises(BadInput, match=f"c.jsonl {words}"):
        draw([tmp_path / "c.jsonl"], length=3)


def test_a_chat_without_a_user_is_refused(tmp_path):
    record = {"messages": [{"role": "assistant", "content": "hello there"}]}
    with pytest.raises(BadInput, match="needs a message with role user, chats 1 to 1 have none"):
        draw([chats(tmp_path / "c.jsonl", record)])


# ---- files


def test_a_folder_stands_for_the_texts_in_and_below_it(tmp_path):
    wanted = [raw(tmp_path / "a.txt", 1), raw(tmp_path / "below" / "b.txt", 1), chats(tmp_path / "c.jsonl", PROMPT)]
    (tmp_path / "notes.md").write_text("not a dataset")
    assert expand([str(tmp_path)]) == wanted
    assert expand([str(wanted[2]), str(wanted[0])]) == [wanted[2], wanted[0]]


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(BadInput, match="must exist, .*missing.txt does not; check --dataset"):
        expand([str(tmp_path / "missing.txt")])
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(BadInput, match="notes.md"):
        expand([str(tmp_path / "notes.md")])


def test_distinct_4grams_is_the_share_that_is_new():
    assert distinct_4grams([1, 2, 3]) == distinct_4grams([]) == 1.0
    assert distinct_4grams([1, 2, 3, 4, 5]) == 1.0
    assert distinct_4grams([7] * 13) == 1 / 10
    assert distinct_4grams([1, 2, 3, 4] * 3) == 4 / 9
