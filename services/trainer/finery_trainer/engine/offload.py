"""Activations that wait in pinned host memory between forward and backward pass.

Copies run on streams of their own beside the computation: out while the following layers compute, back while the preceding layer's backward
pass runs. Owns the pinned memory and the order of events; what goes there is the plan's.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from finery_trainer.engine.block import Tape

_IN_FLIGHT = 1
"""Layers whose copies may still run while the next layer computes."""


class Offloader:
    """Moves the tensors that `host` names, a set for each layer, off their tapes and back.

    Call `stored` after a layer's forward pass, `fetched` before its backward pass (`skipped` where it has none), layers in order and back
    again.
    """

    def __init__(self, host: tuple[frozenset[str], ...], *, device: torch.device) -> None:
        self._host, self._device = host, device
        self._is_active = any(host) and device.type == "cuda"
        self._slots: dict[tuple[int, str], torch.Tensor] = {}
        self._pinned: dict[tuple[int, str], torch.Tensor] = {}
        self._leaving: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
        self._arriving: dict[int, tuple[torch.cuda.Event, dict[str, torch.Tensor]]] = {}
        if self._is_active:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def stored(self, index: int, tape: Tape) -> None:
        """Starts copying out what the plan sends to the host; the tape lets go of it."""
        if not self._is_active:
            return
        compute = torch.cuda.current_stream(self._device)
        while len(self._leaving) >= _IN_FLIGHT:
            compute.wait_event(self._leaving.popleft()[0])
        names = [name for name in sorted(_with_lse(self._host[index])) if name in tape]
        tensors = [tape.pop(name) for name in names]
        self._out.wait_stream(compute)
        with torch.cuda.stream(self._out):
            for name, tensor in zip(names, tensors, strict=True):
                slot = self._slot(index, name, tensor)
                slot.copy_(tensor, non_blocking=True)
                self._pinned[index, name] = slot
            event = torch.cuda.Event()
            event.record()
        self._leaving.append((event, tensors))

    def fetched(self, index: int, tape: Tape) -> None:
        """Puts the layer's tensors back on its tape, and starts those of the layer below."""
        if not self._is_active:
            return
        if self._leaving:
            compute = torch.cuda.current_stream(self._device)
            for event, _ in self._leaving:
                compute.wait_event(event)
            self._leaving.clear()
        self._start(index)
        if index > 0:
            self._start(index - 1)
        event, tensors = self._arriving.pop(index)
        torch.cuda.current_stream(self._device).wait_event(event)
        tape.update(tensors)

    def skipped(self, index: int) -> None:
        """Lets go of what was stored of a layer whose backward pass does not come."""
        for name in _with_lse(self._host[index]):
            self._pinned.pop((index, name), None)
        if index in self._arriving:
            event, _ = self._arriving.pop(index)
            torch.cuda.current_stream(self._device).wait_event(event)

    def _start(self, index: int) -> None:
        if index in self._arriving:
            return
        slots = {name: self._pinned.pop((index, name)) for name in _with_lse(self._host[index]) if (index, name) in self._pinned}
        tensors = {name: torch.empty_strided(s.size(), s.stride(), dtype=s.dtype, device=self._device) for name, s in slots.items()}
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._in):
            for name, slot in slots.items():
                tensors[name].copy_(slot, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arriving[index] = event, tensors

    def _slot(self, index: int, name: str, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory of this shape, reused from step to step; it grows where a pack is larger than any before."""
        span = sum((size - 1) * stride for size, stride in zip(like.size(), like.stride(), strict=True)) + 1
        size_bytes = span * like.element_size()
        memory = self._slots.get((index, name))
        if memory is None or memory.numel() < size_bytes:
            memory = self._slots[index, name] = pinned_bytes(size_bytes)
        return torch.as_strided(memory[:size_bytes].view(like.dtype), like.size(), like.stride())


def pinned_bytes(size_bytes: int) -> torch.Tensor:
    """Page-locked memory of exactly this size (torch's own rounds up to a power of two); unlocked when the tensor dies."""
    memory = mmap.mmap(-1, size_bytes)
    pinned = torch.frombuffer(memory, dtype=torch.uint8)
    address = pinned.data_ptr()
    error = int(_runtime().cudaHostRegister(address, size_bytes, 0))
    if error != 0:
        raise MemoryError(
            f"{size_bytes / 2**30:.2f} GiB of host memory could not be pinned (CUDA error {error}); lower memory.host_budget_bytes."
        )
    weakref.finalize(pinned, _unpin, address, memory)
    return pinned


def _unpin(address: int, _memory: mmap.mmap) -> None:
    torch.cuda.synchronize()
    _runtime().cudaHostUnregister(address)


def _runtime() -> ModuleType:
    runtime = torch.cuda.cudart()
    assert runtime is not None
    return runtime


def _with_lse(names: frozenset[str]) -> frozenset[str]:
    return names | {"lse"} if "o" in names else names
