"""FLOPs done and bytes moved by one forward pass: the floor that no implementation beats. Read is not resident."""

from typing import NamedTuple

from planner.specs import BYTES_PER_ELEMENT, DType, ModelSpec


class Work(NamedTuple):
    flops: int
    bytes_read: int  # weights once, keys and values once per stream


def forward_work(model: ModelSpec, dtype: DType, *, new_tokens: int, kv_read: int, batch: int = 1) -> Work:
    """One pass over `new_tokens` per stream that attend to `kv_read` cached tokens each. Embedding rows are not counted."""
    embedding = model.vocab_size * model.hidden_size
    matrices = model.num_parameters - (0 if model.tie_embeddings else embedding)  # a tied head is read as the head
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * new_tokens * (kv_read + (new_tokens + 1) / 2)
    flops = batch * (2 * matrices * new_tokens + attention)
    moved = matrices * BYTES_PER_ELEMENT[dtype] + batch * kv_read * model.kv_bytes_per_token(dtype)
    return Work(int(flops), int(moved))
