"""CUDA graphs: a narrow pass is recorded once per shape and then launched in one call, instead of one per operation.

Capture has never run on CUDA. What is to be captured has: as a function of static shapes, uncaptured, on the CPU and on
the stand-in device; and on the CPU under a recorder that repeats its operations with the arguments of the first time.

B  streams     n  new tokens of one pass     C  hidden_size     S  keys in sight, rounded up to a bucket
"""

from collections.abc import Callable, Collection, Sequence
from weakref import ref

import torch
from torch import Tensor

from planner.runtime.kernels import Kernels
from planner.runtime.kv_cache import Ancestors, KVCache, Mask, additive_mask
from planner.runtime.rope import Rotation

MAX_ROWS = 80  # B * n: wider passes compute for longer than their launches take (a guess, as nothing was measured)
BUCKET = 256  # keys: a graph reads up to so many in vain, and a text needs a new one as often
MAX_GRAPHS = 64  # four widths in each of the buckets of 4096 tokens; what one takes of memory was not measured


class GraphKernels(Kernels):
    """Narrow passes as CUDA graphs; wide ones, taps, and what is to be differentiated run eagerly.

    A graph belongs to one model, cache (which keeps its tensors for life), B, n and S. The first pass of such a shape
    runs op by op, which is its warm-up; the second is captured, so that a shape met once (a short prompt) costs no
    capture; from then on it is replayed.

    At most MAX_GRAPHS shapes are held (by these kernels; a session has one such object). Beyond, and where a captured
    cache is gone when a new shape arrives, all are dropped: graphs captured on one stream share cuBLAS's workspace, and
    dropping one takes it from the others (pytorch/pytorch#193402). Graphs do not keep models or caches alive. They
    share one pool of memory, in which nothing has to survive from one replay to another: inputs lie outside it, and
    the result is copied out at once.
    """

    execution = "cuda_graphs"

    def __init__(self, capture: bool = True):
        """Without capture the same function of static shapes runs op by op, on any device: for tests."""
        self._capture = capture
        self._shapes: dict[tuple, _Shape] = {}
        self._stream: torch.cuda.Stream | None = None  # where warm-up and capture take place

    @property
    def num_graphs(self) -> int:
        return sum(shape.graph is not None for shape in self._shapes.values())

    def run(
        self, layers: Sequence["Layer"], norm: Tensor, eps: float, x: Tensor, rotation: Rotation, cache: KVCache,  # noqa: F821  planner.runtime.model
        mask: Mask, taps: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
        B, n, _ = x.shape
        if isinstance(mask, Ancestors):
            mask = cache.tree_mask(mask)
        if taps or B * n > MAX_ROWS or torch.is_grad_enabled():
            return super().run(layers, norm, eps, x, rotation, cache, mask, taps)
        end = cache.check_room(n)
        visible = min(-(-end // BUCKET) * BUCKET, cache.capacity)
        key = ref(layers), ref(cache), B, n, visible, mask is None, x.dtype
        if key not in self._shapes:
            self._make_room()
            self._shapes[key] = _Shape(x, rotation, None if mask is None else visible)
        shape = self._shapes[key]
        shape.load(x, rotation, cache.lengths, mask, end)

        def work() -> Tensor:
            slots = shape.lengths[:, None] + torch.arange(n, device=x.device)  # [B, n]
            seen = shape.mask
            if seen is None:
                seen = additive_mask(torch.arange(visible, device=x.device) <= slots[..., None], x.dtype)[:, None]
            return Kernels.run(self, layers, norm, eps, shape.x, shape.rotation, _Slots(cache, slots, visible), seen, ())[0]

        if not self._capture:
            return work(), {}
        if not shape.warm:
            shape.warm = True
            return self.warm_up(work, x.device).clone(), {}
        if shape.graph is None:
            shape.graph, shape.hidden = self.captured(work)
        shape.graph.replay()
        return shape.hidden.clone(), {}

    def warm_up(self, work: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The result of work, run on the stream that is to capture it: libraries must have allocated what they need there."""
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                hidden = work()
            current.wait_stream(self._stream)
        return hidden

    def captured(self, work: Callable[[], Tensor]) -> tuple["torch.cuda.CUDAGraph", Tensor]:
        """Record work without running it: a graph, and the tensor that each replay writes its result to."""
        graph = torch.cuda.CUDAGraph()
        # The pool of a graph that lives: a handle of our own would be invalid once all its graphs were dropped.
        pool = next((shape.graph.pool() for shape in self._shapes.values() if shape.graph is not None), None)
        with torch.cuda.device(self._stream.device), torch.cuda.graph(graph, pool=pool, stream=self._stream):
            hidden = work()
        return graph, hidden

    def _make_room(self) -> None:
        """Forget shapes whose model or cache is gone; all of them, if one of these was captured or there are too many."""
        gone = [key for key in self._shapes if key[0]() is None or key[1]() is None]
        if len(self._shapes) - len(gone) >= MAX_GRAPHS or any(self._shapes[key].graph is not None for key in gone):
            self._shapes.clear()
        for key in gone:
            self._shapes.pop(key, None)


class _Shape:
    """The buffers of one shape: whatever differs between two of its passes is in one of them."""

    def __init__(self, x: Tensor, rotation: Rotation, mask_width: int | None):
        B, n, _ = x.shape
        with torch.inference_mode(False):  # ordinary tensors, which may be written to inside and outside of inference mode
            self.x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.rotation = Rotation(*(torch.empty(part.shape, dtype=part.dtype, device=x.device) for part in rotation))
            self.lengths = torch.zeros(B, dtype=torch.long, device=x.device)
            self.mask = None if mask_width is None else torch.empty(B, 1, n, mask_width, dtype=x.dtype, device=x.device)
        self.warm, self.graph, self.hidden = False, None, None

    def load(self, x: Tensor, rotation: Rotation, lengths: list[int], mask: Tensor | None, end: int) -> None:
        self.x.copy_(x)
        for own, new in zip(self.rotation, rotation, strict=True):
            own.copy_(new)
        if len(set(lengths)) == 1:
            self.lengths.fill_(lengths[0])  # travels with the launch: nothing to upload
        else:
            self.lengths.copy_(torch.tensor(lengths))
        if mask is not None:
            self.mask.fill_(-torch.inf)
            self.mask[..., :end] = mask


class _Slots:
    """What Kernels.attend needs of a cache, with the new tokens' slots in a tensor: no length is a Python number.

    Slots behind a stream's tokens hold zeros or what was rolled back, both finite, and the mask hides them.
    """

    def __init__(self, cache: KVCache, slots: Tensor, visible: int):
        self.keys, self.values, self._slots, self._visible = cache.keys, cache.values, slots, visible
        self._streams = torch.arange(len(slots), device=slots.device)[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache.append; all that is visible in this bucket."""
        for own, new in ((self.keys, keys), (self.values, values)):
            own[layer][self._streams, :, self._slots] = new.transpose(1, 2)
        return self.keys[layer, :, :, : self._visible], self.values[layer, :, :, : self._visible]
