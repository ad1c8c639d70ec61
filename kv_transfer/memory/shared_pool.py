"""Has vLLM's KV cache on a CPU lie in shared memory, so that an engine on the same host can read it with one copy."""

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kv_transfer.memory.regions import Memory
from kv_transfer.memory.shared_file import SharedFile, new_shared_file

logger = logging.getLogger(__name__)

_MIN_BYTES = 1 << 20  # smaller tensors are no KV cache


class SharedPool:
    """The shared files under one worker's KV cache; vLLM allocates the whole cache at once, and so there is one.

    The files have no name: whichever way the process ends, nothing is left behind. A tensor keeps its memory for as
    long as it lives; `close` ends only what others can open. Made in the process that owns the cache, after forks.
    """

    def __init__(self) -> None:
        self._files: list[SharedFile] = []

    def allocating(self) -> AbstractContextManager[Any]:
        """A context in which torch takes large byte tensors on the CPU from here. For one `with`, in one thread.

        Inside, torch.zeros and torch.empty raise MemoryError if there is too little memory.
        """
        if sys.platform != "linux":
            return nullcontext()
        context: AbstractContextManager[Any] = _Allocating(self.allocate)
        return context

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor of zeros. Raises MemoryError; OSError where the system has no unnamed files."""
        file, mapping = new_shared_file(num_bytes)
        self._files.append(file)
        return torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping for as long as it is used itself

    def file_of(self, memory: Memory) -> SharedFile | None:
        """The file that holds this memory, from the first to the last byte."""
        if len(memory.regions) != 1:
            return None
        (region,) = memory.regions
        for file in self._files:
            if (file.address, file.num_bytes) == (region.address, region.num_bytes):
                return file
        return None

    def close(self) -> None:
        while self._files:
            self._files.pop().close()


class _Allocating(TorchFunctionMode):  # type: ignore[misc]  # torch's types are not followed
    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._allocate = allocate

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.zeros, torch.empty) or not _is_plain(kwargs):
            return func(*args, **kwargs)
        like = func(*args, **{**kwargs, "device": "meta"})  # has the shape, whichever way it was given
        if like.dtype not in (torch.int8, torch.uint8) or like.nbytes < _MIN_BYTES:
            return func(*args, **kwargs)
        try:
            return self._allocate(math.prod(like.shape)).view(like.dtype).view(like.shape)
        except OSError as error:
            logger.warning("KV cache not in shared memory, reads on this host are slower: %s", error)
            return func(*args, **kwargs)


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether this is CPU memory without further wishes (pinned, preallocated, sparse)."""
    device = kwargs.get("device")
    device = torch.get_default_device() if device is None else torch.device(device)
    wishes = [wish for name, wish in kwargs.items() if name not in ("size", "dtype", "device")]
    return device.type == "cpu" and all(wish is None or wish is False for wish in wishes)
