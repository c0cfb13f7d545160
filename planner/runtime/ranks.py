"""The processes that torchrun starts, one for each device, and how rank 0 decides for all of them.

Whatever depends on a clock, a file or this process alone is decided by rank 0: ranks that go different ways wait for
each other forever.
"""

import atexit
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
import torch
import torch.distributed as dist

from planner.errors import BadInput
from planner.files import process_rank

T = TypeVar("T")


class Ranks(NamedTuple):
    rank: int = 0
    size: int = 1

    def first(self, work: Callable[[], T], kind: type[T]) -> T:
        """What rank 0 makes of `work`, on every rank; its BadInput is everybody's too."""
        if self.size == 1:
            return work()
        value, message = None, b""
        if self.rank == 0:
            try:
                value = work()
                message = b"+" + msgspec.msgpack.encode(value)
            except BadInput as error:
                message = b"-" + str(error).encode()
        message = _broadcast(message)
        if message.startswith(b"-"):
            raise BadInput(message[1:].decode())
        return value if self.rank == 0 else msgspec.msgpack.decode(message[1:], type=kind)


def join_ranks(device: torch.device) -> tuple[Ranks, torch.device]:
    """This process among those of torchrun, and its own device; alone without torchrun."""
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        return Ranks(), device
    if device.type == "cuda":
        if device.index is not None:
            raise BadInput(f"under torchrun every rank has a GPU of its own, got {device}; use --device cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"every rank needs a GPU of its own, got {torch.cuda.device_count()} for rank {device.index}; lower --nproc-per-node")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Tensors on the CPU carry what rank 0 decides, and the checkpoint on its way to the devices.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks(process_rank(), size), device


def _broadcast(message: bytes) -> bytes:
    length = torch.tensor([len(message)])
    dist.broadcast(length, 0)
    content = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return content.numpy().tobytes()
