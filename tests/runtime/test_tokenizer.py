"""Tokenizers give back the text they were given, agree with transformers, and refuse files and templates that misbehave."""

import functools
import inspect
import json
import time
import unicodedata
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from planner.errors import BadInput, MissingExtra
from planner.runtime.tokenizer import load_tokenizer
from planner.runtime.weights import default_model_path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# as published templates look: blocks on lines of their own, which trim_blocks and lstrip_blocks remove
TEMPLATE = """
    {%- for message in messages %}
    {% if true %}
{{ bos_token + message['role'] + '\n' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ bos_token + 'assistant\n' }}
{%- endif %}
"""
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  2 < 3 & 'so'?\n"}]
TEXTS = [
    "",
    " ",
    "Hello, world",
    "def f(x):\n\treturn x ** 2  # 12345\r\n\n\n    pass",
    "naïve café — 日本語 العربية ½ ٣",
    "😀 👩‍👩‍👧 🇩🇪 e\u0301",
    "1234567890 3.14 0x1F",
]


def make_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE as SmolLM has it, on a few words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["hello world, the world returns hello 12 12 12", "日本語 日本語 😀 😀"], trainer)
    return backend


def write_folder(folder: Path, **config) -> Path:
    backend = make_backend()
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    values = {name: value for name, value in (named | config).items() if value != "absent"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def write_gguf(path: Path, backend: tokenizers.Tokenizer | None = None, **changes) -> Path:
    """The metadata of a GGUF file alone: the tokenizer needs no tensors."""
    stored = json.loads((backend or make_backend()).to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in stored["merges"]],
        "bos": 1,
        "eos": 2,
        "template": TEMPLATE,
        "add_bos": False,
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values["model"])
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(values["tokens"])
    writer.add_token_types(values["token_type"])
    writer.add_token_merges(values["merges"])
    writer.add_bos_token_id(values["bos"])
    writer.add_eos_token_id(values["eos"])
    if values["add_bos"] is not None:
        writer.add_add_bos_token(values["add_bos"])
    if values["template"] is not None:
        writer.add_chat_template(values["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_folder(tmp_path):
    return load_tokenizer(write_folder(tmp_path))


def from_gguf(tmp_path):
    return load_tokenizer(write_gguf(tmp_path / "tiny.gguf"))


_load_default = functools.cache(lambda: load_tokenizer(default_model_path()))  # 0.4 s


def from_default_model(tmp_path):
    try:
        return _load_default()
    except MissingExtra as error:
        pytest.skip(str(error))


PROSE = ["don't I'LL we've HELLO naïve café, 1 12 123 1234 12345, x_1+=2;  //\n\n  #!\t(ok)\r\n" * 3, "日本語 العربية ½ ٣ 3.14 e\u0301"]


def trained(*words, nfc: bool = False, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE on PROSE, whose words are split as told."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(words))
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(PROSE, trainer)
    return backend


def split_by(regex: str) -> tuple:
    return pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def qwen_backend() -> tokenizers.Tokenizer:
    return trained(*split_by(PRETOKENIZE_REGEX), nfc=True)


def llama3_backend() -> tokenizers.Tokenizer:
    """Its published regular expression is the default of transformers' converter of tiktoken files."""
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    backend = trained(*split_by(pattern), ignore_merges=True)
    template = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(trim_offsets=False), template])
    return backend


def gpt2_backend() -> tokenizers.Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama2_backend(legacy: bool = True) -> tokenizers.Tokenizer:
    """SentencePiece's BPE as tokenizer.json has it: spaces are ▁, unknown characters become bytes."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilnortuwxHW,.0123456789", "▁w", "▁h", "lo", "▁he"]
    vocab = {text: token for token, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "w"), ("▁", "h"), ("l", "o"), ("▁h", "e")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


BACKENDS = {
    "qwen": qwen_backend, "llama 3": llama3_backend, "gpt-2": gpt2_backend, "llama 2": llama2_backend,
    "llama 2, metaspace": lambda: llama2_backend(legacy=False),
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def styled(request, tmp_path):
    """A folder with nothing but a tokenizer.json of a style."""
    BACKENDS[request.param]().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


FAMILY = [from_folder, from_gguf, pytest.param(from_default_model, marks=pytest.mark.model)]


@pytest.fixture(params=FAMILY)
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


# ---- every tokenizer


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_streamed_pieces_join_to_the_text_and_none_is_broken(tokenizer, text):
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_ends_inside_a_character_is_finished_not_lost(tokenizer):
    tokens = tokenizer.encode("ok \U0001fa75")[:-1]  # a character too rare to be one token
    decoder = tokenizer.stream_decoder()
    pieces = "".join(decoder.push(token) for token in tokens)
    assert pieces.startswith("ok") and "\ufffd" not in pieces
    assert pieces + decoder.finish() == tokenizer.decode(tokens)
    assert decoder.finish() == ""


def test_chat_tokens_are_one_id_each(tokenizer):
    for text in SPECIAL:
        assert len(tokenizer.encode(text)) == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop_tokens == tuple(tokenizer.encode("<|im_end|>"))


def test_every_digit_is_a_token(tokenizer):
    assert len(tokenizer.encode("20251212")) == 8


def test_a_chat_ends_where_the_answer_begins(tokenizer):
    text = tokenizer.decode(tokenizer.encode_chat(CHAT))
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in CHAT)
    assert text == turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "messages", [[], "hi", None, ["hi"], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}]], ids=repr
)
def test_messages_without_role_or_content_are_refused(tokenizer, messages):
    with pytest.raises(BadInput, match="message"):
        tokenizer.encode_chat(messages)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(BadInput, match="unicode"):
        tokenizer.encode("\ud800")


# ---- folders


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_style_of_tokenizer_json_gives_text_back_whole_and_in_pieces(styled, text):
    tokenizer = load_tokenizer(styled)
    tokens = tokenizer.encode(text)
    stored = json.loads((styled / "tokenizer.json").read_text())
    expected = unicodedata.normalize("NFC", text) if stored["normalizer"] == {"type": "NFC"} else text
    if (stored["pre_tokenizer"] or {}).get("type") == "Metaspace":
        expected = expected.removeprefix(" ")  # which it takes for the one that it would put there itself
    assert tokenizer.decode(tokens) == expected
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) + decoder.finish() == expected
    assert tokens == PreTrainedTokenizerFast(tokenizer_file=str(styled / "tokenizer.json")).encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("style", "config", "generation", "bos", "stops"),
    [  # as Qwen2.5-Instruct, Llama-3.1-Instruct and Llama-2 publish them, with the names of our small vocabularies
        ("qwen", {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>"}, {"eos_token_id": [2, 0]}, None, (0, 2)),
        ("llama 3", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {"eos_token_id": [0, 2, 5]}, 1, (0, 2, 5)),
        ("llama 2", {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}, {"eos_token_id": 2}, 1, (2,)),
    ],
)  # fmt: skip
def test_each_style_begins_and_ends_as_its_makers_say(tmp_path, style, config, generation, bos, stops):
    BACKENDS[style]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.stop_tokens) == (bos, stops)
    assert set(tokenizer.special_tokens) == {0, 1, 2, *stops}
    assert tokenizer.bos_token not in tokenizer.encode("hello")


def test_folder_and_gguf_agree(tmp_path):
    folder, file = from_folder(tmp_path), from_gguf(tmp_path)
    for text in [*TEXTS, "".join(SPECIAL)]:
        assert folder.encode(text) == file.encode(text)
    assert folder.encode_chat(CHAT) == file.encode_chat(CHAT)


def test_transformers_gives_the_same_ids(tmp_path):
    ours = from_folder(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_chat(CHAT) == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def test_the_template_may_lie_in_a_file_of_its_own(tmp_path):
    write_folder(tmp_path, chat_template="from the config")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] | tojson }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "<é>"}])) == '"<é>"'


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template=named))
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "yes"


def test_stop_tokens_come_from_all_three_files(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(tmp_path).stop_tokens == (0, 2, 7)


@pytest.mark.parametrize("value", [-1, 1.5, "2", [2, None], True, {}], ids=repr)
def test_stop_tokens_that_are_no_ids_are_refused(tmp_path, value):
    write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BadInput, match="generation_config.json: eos_token_id"):
        load_tokenizer(tmp_path)


def test_bos_goes_in_front_only_where_the_model_says_so(tmp_path):
    assert load_tokenizer(write_folder(tmp_path)).bos_token is None
    assert load_tokenizer(write_folder(tmp_path, add_bos_token=True)).bos_token == 1
    assert load_tokenizer(write_folder(tmp_path, add_bos_token=True, bos_token={"content": "<|im_start|>"})).bos_token == 1
    with pytest.raises(BadInput, match="bos_token"):
        load_tokenizer(write_folder(tmp_path, add_bos_token=True, bos_token="absent"))

    write_folder(tmp_path)  # as Llama 3: the config is silent, tokenizer.json adds it
    backend = make_backend()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).bos_token == 1
    assert 1 not in load_tokenizer(tmp_path).encode("hello")


def test_truncation_and_padding_stored_in_the_file_are_off(tmp_path):
    write_folder(tmp_path)
    backend = make_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "hello world, the world returns"
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(text)) == text


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"model": 3}', "[" * 10**5, "\0"])
def test_a_broken_tokenizer_file_is_refused(tmp_path, text):
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BadInput, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_express_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"hello": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="cannot encode"):
        load_tokenizer(tmp_path).encode("goodbye")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bos_token", 3),
        ("eos_token", "<|nowhere|>"),
        ("add_bos_token", "yes"),
        ("chat_template", 3),
        ("chat_template", [{"name": "x", "template": "y"}]),
    ],
)
def test_a_wrong_field_of_the_tokenizer_config_is_named(tmp_path, field, value):
    with pytest.raises(BadInput, match=f"tokenizer_config.json: {field}"):
        load_tokenizer(write_folder(tmp_path, **{field: value}))


def test_a_folder_without_tokenizer_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(BadInput, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


# ---- chat templates


HOSTILE_TEMPLATES = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "long string": "{{ 'a' * 10**12 }}",
    "long string, plainly": "{{ 'a' * 1000000000000 }}",
    "power tower": "{{ 9 ** 9 ** 9 }}",
    "long range": "{{ range(1000000000) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{" + "(" * 50_000 + "}}",
    "syntax": "{% for",
    "undefined": "{{ x.y }}",
    "clock": "{{ strftime_now('%Y') }}",
    "file": "{% include '/etc/passwd' %}",
    "its own refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES.keys())
def test_a_hostile_or_broken_template_is_refused_at_once(tmp_path, template):
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template=template))
    start = time.perf_counter()
    with pytest.raises(BadInput, match="chat template") as caught:
        tokenizer.encode_chat(CHAT)
    assert time.perf_counter() - start < 1
    assert "\n" not in str(caught.value)


def test_a_format_string_shows_nothing_of_python(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template="[{{ '{0.__class__}'.format(messages) }}]"))
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "[]"


def test_the_words_of_a_template_that_refuses_are_passed_on(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, chat_template=HOSTILE_TEMPLATES["its own refusal"]))
    with pytest.raises(BadInput, match="roles must alternate"):
        tokenizer.encode_chat(CHAT)


def test_a_model_without_template_says_so(tmp_path):
    for tokenizer in (load_tokenizer(write_folder(tmp_path, chat_template="absent")), load_tokenizer(write_gguf(tmp_path / "x.gguf", template=None))):
        assert tokenizer.encode("hello")
        with pytest.raises(BadInput, match="no chat template"):
            tokenizer.encode_chat(CHAT)


# ---- GGUF


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model"),
        ({"pre": "default"}, "tokenizer.ggml.pre"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"merges": ["nowhere tobefound"]}, "tokenizer.ggml.merges"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges"),
        ({"eos": 10**6}, "tokenizer.ggml.eos_token_id"),
    ],
    ids=str,
)
def test_a_gguf_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path, changes, field):
    with pytest.raises(BadInput, match=field) as caught:
        load_tokenizer(write_gguf(tmp_path / "x.gguf", **changes))
    if field != "tokenizer.ggml.eos_token_id":
        assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    ("pre", "backend", "add_bos", "bos"),
    [
        ("qwen2", qwen_backend, False, None), ("llama-bpe", llama3_backend, None, 1), ("llama3", llama3_backend, False, None),
        ("gpt-2", gpt2_backend, None, None),
    ],
)  # fmt: skip
def test_each_pre_tokenizer_splits_as_the_models_own_tokenizer_does(tmp_path, pre, backend, add_bos, bos):
    theirs = backend()
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", theirs, pre=pre, add_bos=add_bos))
    for text in [*TEXTS, *PROSE]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.bos_token == bos


def test_pre_tokenizers_are_told_apart_by_the_texts_above(tmp_path):
    found = set()
    for pre in ("qwen2", "llama-bpe", "gpt-2", "smollm"):
        tokenizer = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", llama3_backend(), pre=pre))
        found.add(str([tokenizer.encode(text) for text in PROSE]))
    assert len(found) == 4


def test_a_tokenizer_json_beside_a_gguf_file_stands_in_where_it_cannot_be_rebuilt(tmp_path):
    """As for Llama 2 and Mistral, whose GGUF files carry SentencePiece's pieces."""
    backend = llama2_backend()
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    stored = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": [1] * len(tokens),
        "merges": [],
        "bos": 1,
        "eos": 2,
        "add_bos": None,
    }
    file = write_gguf(tmp_path / "x.gguf", **stored)
    with pytest.raises(BadInput, match="tokenizer.json beside"):
        load_tokenizer(file)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("hello, wórld") == backend.encode("hello, wórld", add_special_tokens=False).ids
    assert (tokenizer.bos_token, tokenizer.stop_tokens) == (1, (2,))  # llama.cpp begins these with bos where the file is silent
    make_backend().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="must have the tokens of x.gguf"):
        load_tokenizer(file)


def test_user_defined_tokens_are_one_id(tmp_path):
    backend = make_backend()
    kinds = [3] * len(SPECIAL) + [1] * (backend.get_vocab_size() - len(SPECIAL))
    kinds[0] = 4
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", token_type=kinds))
    assert tokenizer.encode("<|endoftext|>") == [0]


def test_gguf_says_whether_bos_goes_in_front(tmp_path):
    assert load_tokenizer(write_gguf(tmp_path / "x.gguf", add_bos=True)).bos_token == 1
    assert load_tokenizer(write_gguf(tmp_path / "y.gguf")).bos_token is None


@pytest.mark.model
def test_the_default_chat_prompt_is_the_one_its_makers_published(tmp_path):
    tokenizer = from_default_model(tmp_path)
    text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.stop_tokens, tokenizer.bos_token) == ((2,), None)
