"""A stand-in for a GPU on machines without one: a device that computes with real CPU values and refuses to mix with the CPU.

`install()` claims PyTorch's one private-use backend, so this belongs in a process of its own; `main()` is what
tests/runtime/test_standin_device.py starts. As on CUDA, an op takes tensors of one device, except single numbers
(dim 0) and explicit copies. CUDA also accepts a CPU index; here it is refused, for it is a copy that nobody asked for.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

STANDIN = "standin:0"
aten = torch.ops.aten
READS = {  # wait for the device and bring a value, or the shape of a result, to the host
    "_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
counts = Counter()  # host "reads" and "uploads" since somebody cleared it
on_cpu = Counter()  # ops that ran on the CPU alone, by name


class StandinTensor(torch.Tensor):
    """Says that it lies on the stand-in; its values are those of `value`."""

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        assert type(value) is torch.Tensor, "a stand-in of a stand-in"
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype, device=torch.device(STANDIN)
        )
        wrapper.value = value
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.cpu().tolist()  # as it is on CUDA; PyTorch refuses it to subclasses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Run one op on the real values, as the device would."""
    name = func.overloadpacket.__name__
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, StandinTensor)]
    asked = kwargs.get("device")
    target = ours[0].device if asked is None and ours else torch.device(asked or "cpu")
    on_standin = target.type == "standin"

    copies = name in ("_to_copy", "copy_")
    if ours and not copies and any(tensor.dim() > 0 for tensor in tensors if not isinstance(tensor, StandinTensor)):
        raise RuntimeError(f"{func} mixes {STANDIN} with cpu: {[(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]}")
    if name == "copy_":  # into whatever the first argument is
        on_standin = isinstance(args[0], StandinTensor)
    if copies:
        sources = [isinstance(tensor, StandinTensor) for tensor in tensors[-1:]]
        counts["uploads"] += on_standin and not all(sources)
        counts["reads"] += not on_standin and any(sources)
    mask_index = name in ("index", "index_put_", "index_put") and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    counts["reads"] += bool(ours) and (mask_index or name in READS and (name != "repeat_interleave" or kwargs.get("output_size") is None))
    if not ours and not on_standin:
        on_cpu[name] += 1

    reals = {id(tensor.value): tensor for tensor in ours}
    real_args, real_kwargs = tree_unflatten([leaf.value if isinstance(leaf, StandinTensor) else leaf for leaf in leaves], tree)
    if asked is not None and on_standin:
        real_kwargs["device"] = torch.device("cpu")
    out = func(*real_args, **real_kwargs)
    if name == "_to_copy" and len(ours) == 0 and not on_standin or not (on_standin or ours) or (copies and not on_standin):
        return out
    # An op in place returns the very tensor it was given.
    return tree_map_only(torch.Tensor, lambda tensor: reals[id(tensor)] if id(tensor) in reals else StandinTensor(tensor), out)


class Standin(TorchDispatchMode):
    """Sees what no tensor argument brings to us: torch.zeros(..., device=standin)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Generator(torch.Generator):
    """A CPU generator that names the device it was asked for: PyTorch has none for a private-use backend."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self._asked = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self._asked


def _tensor(data, *, dtype=None, device="cpu", plain=torch.tensor):
    """torch.tensor in two steps: its own copy to a device passes Python's dispatch by."""
    return plain(data, dtype=dtype).to(device)


@contextmanager
def installed():
    """Claim the private-use backend, for good, and compute on it inside the block."""
    _setup_privateuseone_for_python_backend("standin")
    plain = torch.Generator, torch.tensor
    torch.Generator, torch.tensor = Generator, _tensor
    try:
        with Standin():
            yield
    finally:
        torch.Generator, torch.tensor = plain
