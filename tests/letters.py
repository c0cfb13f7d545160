"""A tokenizer that tests can read: a token per character."""

USER, ASSISTANT, SYSTEM, ANSWER = 1001, 1002, 1003, 1004
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


class LetterTokenizer:
    """A token per character; a chat is a role token and the content per message, and a token where the answer begins."""

    def __init__(self, bos_token=None):
        self.bos_token = bos_token

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def encode_chat(self, messages):
        return [token for message in messages for token in [ROLES[message["role"]], *self.encode(message["content"])]] + [ANSWER]
