"""Peak memory of a piece of code, counted from its tensors: exact, repeatable, and the same on every machine."""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that tensor operations make inside the `with` block, each until it is freed.

    `peak_bytes` is the most that was alive at once on top of what existed before the block, backward passes included.
    A storage counts once, however many views it has; tensors from before the block, and views of them, count nothing.
    Not seen: what a kernel allocates and frees within itself, and storages that grow after they were made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        # by address, which is unique as long as the storage lives; the reference calls back when it is freed
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, num_bytes=0)  # not made by an operation in the block, so it was there before
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._watch(storage, num_bytes=storage.nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        address = storage._cdata
        if address in self._watched:
            return
        self._watched[address] = weakref.ref(storage, partial(self._forget, address, num_bytes))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int, num_bytes: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        del self._watched[address]
        self.live_bytes -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
