"""Text <-> token ids, from the tokenizer.json of a Hugging Face folder or the metadata of a GGUF file.

Both are untrusted. Chat templates run in jinja2's immutable sandbox: no attribute leads to Python, but a template can still
waste time, as in any chat server that renders it.

Sources: transformers utils/chat_template_utils.py (how a template is rendered); llama.cpp src/llama-vocab.cpp (pre-tokenizers, token types,
who begins with which token); transformers convert_slow_tokenizer.py and models/qwen2/tokenization_qwen2.py (their regular expressions).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from planner.errors import BadInput
from planner.runtime.fields import MAX_JSON_BYTES, MAX_VOCAB, MIB, Fields, one_line, read_json, where_from
from planner.runtime.gguf_file import read_gguf

MAX_TEMPLATE_CHARS = 2**20  # published templates are under 20K
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF
FOLDER_REMEDY = "give the model's Hugging Face folder with its tokenizer.json instead"


class Tokenizer:
    """One model's vocabulary, special tokens and chat template."""

    stop_tokens: tuple[int, ...]  # generation ends after any of these
    special_tokens: tuple[int, ...]  # end of text, chat markup and the like, stop tokens included
    bos_token: int | None  # goes in front of raw text; None where the model was trained without
    chat_template: str | None
    named_tokens: dict[str, str]  # what templates may name: bos_token, eos_token, ... -> text

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        source: Path,
        stop_tokens: Sequence[int] = (),
        bos_token: int | None = None,
        chat_template: str | None = None,
        named_tokens: dict[str, str] | None = None,
    ):
        backend.no_truncation()  # a tokenizer.json may ask for either
        backend.no_padding()
        self._backend, self._source = backend, source
        self.chat_template, self.named_tokens = chat_template, named_tokens or {}
        self.stop_tokens, self.bos_token = tuple(sorted(set(stop_tokens))), bos_token
        special = [token for token, added in backend.get_added_tokens_decoder().items() if added.special]
        self.special_tokens = tuple(sorted({*special, *self.stop_tokens}))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, special ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. Special tokens written out in it count as such; none are added."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise BadInput(f"text must be valid unicode, got {one_line(text)}; save it as UTF-8") from error
        except Exception as error:  # what tokenizers raises itself: a text without tokens in a vocabulary without an unknown token
            raise BadInput(f"{self._source} cannot encode {one_line(text)}: {one_line(error)}; check tokenizer.json") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the ids, special tokens written out. Ids beyond the vocabulary, which padded models have, give nothing."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the messages in the model's chat template, up to where the assistant's answer begins."""
        if self.chat_template is None:
            raise BadInput(f"{self._source} has no chat template; give raw text, or an instruction-tuned model")
        if not isinstance(messages, list) or not messages:
            raise BadInput(f"messages must be a list of at least one message, got {one_line(messages)}")
        for i, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message, dict) or not isinstance(message.get(key), str):
                    raise BadInput(f"message {i} must be an object with the strings role and content, got {one_line(message)}")
        return self.encode(_render(self._source, self.chat_template, messages, self.named_tokens))

    def to_json(self) -> str:
        """As tokenizer.json has it; a text that is encoded with special tokens then begins as raw text does here."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        if self.bos_token is not None and backend.post_processor is None:
            bos = backend.id_to_token(self.bos_token)
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, self.bos_token)]
            )
        return backend.to_str()

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Text of a growing sequence of ids; what it returns, joined, is `decode` of the whole.

    Text is held back while it ends in the middle of a character. Two offsets as in text-generation-inference: ids from
    `_context` on are decoded again, because some decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._tokens = tokenizer, []
        self._context = self._done = 0  # tokens[:done] are out as text; tokens[context:done] are decoded along

    def push(self, token: int) -> str:
        """The text that this token completes, often a word, sometimes nothing."""
        self._tokens.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):  # how an unfinished character decodes
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return text

    def finish(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        text = self._pending()
        self._context = self._done = len(self._tokens)
        return text

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._tokens[self._context : self._done])
        return self._tokenizer.decode(self._tokens[self._context :])[len(shown) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Of a folder with tokenizer.json, or of a GGUF file."""
    path = Path(path)
    if os.path.isdir(path):
        return _from_folder(path)
    if os.path.isfile(path):
        return _from_gguf(path)
    raise BadInput(f"a model must be an existing folder or GGUF file, got {path}; check the path{where_from(str(path))}")


# ---- chat templates


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})  # the two that make gigabytes out of one short line

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        size = len(left) if isinstance(left, str | list | tuple) else 1
        if operator == "**" or not isinstance(right, int | float) or size * right > MAX_TEMPLATE_CHARS:
            raise jinja2.sandbox.SecurityError(f"'{operator}' may only multiply by numbers, to at most {MAX_TEMPLATE_CHARS} characters")
        return left * right


def _render(source: Path, template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Whitespace, loop controls, tojson and names as transformers has them; strftime_now is left out: a prompt should not depend on the day."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own escapes HTML

    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    try:
        return env.from_string(template).render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens)
    except (Exception, RecursionError, MemoryError) as error:  # a template can raise whatever Python can
        raise BadInput(f"{source}: the chat template cannot be rendered: {one_line(error)}; check the messages' roles, or give raw text") from error


def _checked_template(source: Path, template: object) -> str | None:
    if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS):
        raise BadInput(f"{source}: chat_template must be a string of at most {MAX_TEMPLATE_CHARS} characters, got {one_line(template)}")
    return template


# ---- Hugging Face folder


def _from_folder(folder: Path) -> Tokenizer:
    backend = _read_backend(folder / "tokenizer.json")
    config, model, generation = (_optional(folder / name) for name in ("tokenizer_config.json", "config.json", "generation_config.json"))

    special_tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        if isinstance(token, dict):  # transformers 4 may write an AddedToken out
            token = token.get("content")
        if token is not None and not isinstance(token, str):
            raise config.refusal(name, "must be a string or an object with content")
        if token is not None:
            special_tokens[name] = token

    stop_tokens = [token for fields in (model, generation) for token in _token_ids(fields, "eos_token_id")]
    if (eos := _id_of(backend, config, special_tokens, "eos_token")) is not None:
        stop_tokens.append(eos)
    bos = _id_of(backend, config, special_tokens, "bos_token")
    # where the config does not say, Llama 3 for one, the post-processor of tokenizer.json does
    adds_bos = config.flag("add_bos_token", bos is not None and backend.encode("").ids[:1] == [bos])
    if adds_bos and bos is None:
        raise config.refusal("bos_token", "must be given where add_bos_token is true")
    return Tokenizer(
        backend,
        source=folder,
        stop_tokens=stop_tokens,
        bos_token=bos if adds_bos else None,
        chat_template=_folder_template(folder, config),
        named_tokens=special_tokens,
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not os.path.isfile(path):
        raise BadInput(f"{path} is missing; write it with AutoTokenizer.from_pretrained(...).save_pretrained of transformers")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise BadInput(f"{path} must be at most {MAX_JSON_BYTES // MIB} MiB, got {size / MIB:.0f} MiB")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # a Rust panic is a BaseException, what else goes wrong a bare Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadInput(f"{path} is not a readable tokenizer: {one_line(error)}; download it again") from error


def _optional(path: Path) -> Fields:
    return Fields(path, read_json(path) if os.path.isfile(path) else {})


def _token_ids(fields: Fields, name: str) -> list[int]:
    """One id, a list of ids, or nothing."""
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < MAX_VOCAB for token in ids):
        raise fields.refusal(name, "must be a token id or a list of them")
    return ids


def _id_of(backend: tokenizers.Tokenizer, config: Fields, special_tokens: dict[str, str], name: str) -> int | None:
    if name not in special_tokens:
        return None
    token = backend.token_to_id(special_tokens[name])
    if token is None:
        raise config.refusal(name, "must be a token of tokenizer.json")
    return token


def _folder_template(folder: Path, config: Fields) -> str | None:
    """chat_template.jinja, else chat_template of tokenizer_config.json: a string, or a list of named ones with a default."""
    file = folder / "chat_template.jinja"
    if os.path.isfile(file):
        try:
            with file.open(encoding="utf-8") as opened:
                return _checked_template(file, opened.read(MAX_TEMPLATE_CHARS + 1))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{file} cannot be read: {one_line(error)}; save it as UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
        if "default" not in named:
            raise config.refusal("chat_template", "must have an entry named default where it is a list")
        template = named["default"]
    return _checked_template(config.source, template)


# ---- GGUF


class _PreTokenizer(NamedTuple):
    """How byte-level BPE splits a text into words before it merges."""

    regex: str | None = None  # None: GPT-2's
    single_digits: bool = False
    nfc: bool = False  # Unicode composed first
    ignore_merges: bool = False  # a word that is a token is that token, however its merges would end
    adds_bos: bool = False  # where the file does not say


_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA_3 = _PreTokenizer(regex=_LETTERS + r"\p{N}{1,3}" + _AFTER_DIGITS, ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS = {  # as the models' own tokenizer.json have them, by tokenizer.ggml.pre
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "qwen2": _PreTokenizer(regex=_LETTERS + r"\p{N}" + _AFTER_DIGITS, nfc=True),  # Qwen3 too
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
}


def _from_gguf(path: Path) -> Tokenizer:
    """Rebuilt from the metadata; where these do not say enough, from a tokenizer.json that lies beside the file."""
    metadata = Fields(path, read_gguf(path).metadata)
    texts = _list_of(metadata, "tokenizer.ggml.tokens", str)
    model, pre = metadata.text("tokenizer.ggml.model"), PRE_TOKENIZERS.get(metadata.text("tokenizer.ggml.pre", "default"))
    beside = path.parent / "tokenizer.json"
    if model == "gpt2" and pre is not None:
        backend = _rebuilt(path, metadata, texts, pre)
    elif os.path.isfile(beside):
        backend = _checked_backend(beside, path, texts)
    elif model != "gpt2":
        raise metadata.refusal(
            "tokenizer.ggml.model", "must be 'gpt2', the only one that can be rebuilt (put the model's tokenizer.json beside the file)"
        )
    else:
        raise metadata.refusal(
            "tokenizer.ggml.pre", f"must be one of {', '.join(PRE_TOKENIZERS)} (or put the model's tokenizer.json beside the file)"
        )

    ids = {name: _gguf_id(metadata, f"tokenizer.ggml.{name}_token_id", len(texts)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", model == "llama" or (pre is not None and pre.adds_bos))  # as llama.cpp
    if adds_bos and ids["bos"] is None:
        raise metadata.refusal("tokenizer.ggml.bos_token_id", "must be given where a text begins with it (add_bos_token)")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend,
        source=path,
        stop_tokens=[ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None],
        bos_token=ids["bos"] if adds_bos else None,
        chat_template=_checked_template(path, metadata.get("tokenizer.chat_template")),
        named_tokens={names[name]: texts[token] for name, token in ids.items() if name in names and token is not None},
    )


def _rebuilt(path: Path, metadata: Fields, texts: list[str], pre: _PreTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE."""
    kinds = _list_of(metadata, "tokenizer.ggml.token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list_of(metadata, "tokenizer.ggml.merges", str)]
    vocab = {text: token for token, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise BadInput(f"{path}: tokenizer.ggml.tokens must differ from each other, got {len(texts) - len(vocab)} repeated; {FOLDER_REMEDY}")
    if len(kinds) != len(texts) or not set(kinds) <= {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise BadInput(f"{path}: tokenizer.ggml.token_type must hold {len(texts)} of 1, 3, 4, 5, got {len(kinds)}; {FOLDER_REMEDY}")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise BadInput(f"{path}: tokenizer.ggml.merges must join two tokens into a third, got {one_line(' '.join(merge))}; {FOLDER_REMEDY}")

    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    words = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    words += [] if pre.regex is None else [pre_tokenizers.Split(Regex(pre.regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.regex is None)])
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds) if kind in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _checked_backend(file: Path, path: Path, texts: list[str]) -> tokenizers.Tokenizer:
    """The tokenizer.json beside a GGUF file, which must have the same tokens."""
    backend = _read_backend(file)
    for text, token in backend.get_vocab(with_added_tokens=True).items():
        if token >= len(texts) or texts[token] != text:
            there = one_line(texts[token]) if token < len(texts) else "nothing"
            raise BadInput(
                f"{file} must have the tokens of {path.name}, but token {token} is {one_line(text)} here and {there} there; take the model's own"
            )
    return backend


def _list_of(metadata: Fields, name: str, kind: type) -> list:
    values = metadata.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise metadata.refusal(name, f"must be an array of {kind.__name__}")
    return values


def _gguf_id(metadata: Fields, name: str, vocab_size: int) -> int | None:
    return None if metadata.get(name) is None else metadata.integer(name, vocab_size - 1, least=0)
