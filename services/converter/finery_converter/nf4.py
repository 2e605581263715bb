"""bitsandbytes' NF4 in plain torch: 4-bit codes in blocks of 64, their scales again in 8 bits in blocks of 256.

Owns the arithmetic of quantizing and the reading and writing of a weight's state, without bitsandbytes (hundreds of megabytes of GPU
libraries that a converter has no use for). As `bitsandbytes.functional.quantize_4bit(…, compress_statistics=True)` on whole
tensors, though only ever given parts: a block's codes depend on the block alone, and scales are kept until all are there, for their mean
and their own blocks run over the whole tensor.

bitsandbytes does not quantize alike everywhere. Its GPU kernels take the nearest 8-bit code; its CPU code (0.50) looks codes up in a table
of 65,536 steps, which takes a neighbour for 3 scales in 1,000. `Arithmetic` says whose result is wanted. "cpu" is bit-equal, as tests show,
with as many threads, since torch's mean sums in an order of their number. "gpu" follows the kernels' source; what it cannot follow is the
order in which a GPU sums for the mean and its approximate reciprocal, which may move an offset or a code that lies on a border: of random
weights in 16 bits every 4-bit code is that of an H100, the offset within 1.3 units in the last place, and at most 7 of 100,000 scales are
the next one; of float32 weights up to one code in 8 million differs.

Letters: N rows, K columns, B blocks of 64 values, C blocks of 256 scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from finery_common.errors import InvalidArgumentError, UnimplementedError
from finery_converter.tensorfiles import StoredTensor
from finery_kernels.nf4.api import NF4_CODE

Arithmetic = Literal["gpu", "cpu"]
BLOCK = 64
NESTED_BLOCK = 256
STATE_BYTES = 256
"""Of the JSON text beside a weight, filled up with spaces, so that files can be laid out before its numbers are known."""
STATE_KEY = "quant_state.bitsandbytes__nf4"
_TABLE_STEPS = 65_536
_LEAST_ABSMAX = 1e-38
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scales:
    """One weight's scales after double quantization: fp32(code_256[codes_B] * nested_absmax_C) + offset."""

    codes_B: torch.Tensor
    nested_absmax_C: torch.Tensor
    offset: torch.Tensor
    """0-d, fp32."""

    def scales(self) -> torch.Tensor:
        """What dequantizing multiplies by, fp32 [B]."""
        values_B = code_256()[self.codes_B.to(torch.int32)]
        return _by_block(values_B, self.nested_absmax_C, NESTED_BLOCK) + self.offset


@cache
def code_16() -> torch.Tensor:
    """The sixteen values of NF4, ascending, fp32."""
    return torch.tensor(NF4_CODE, dtype=torch.float32)


@cache
def code_256() -> torch.Tensor:
    """bitsandbytes' signed dynamic 8-bit type, ascending, fp32: seven decades of magnitudes, each with twice the steps of the one below.

    Dettmers, arXiv:1511.04561; as `bitsandbytes.functional.create_dynamic_map` rounds it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        power = 10 ** (decade - 6)
        values += (power * middles).tolist() + (-power * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def block_absmax(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each 64 values (fp32, in the weight's order), fp32 [B]; the last block may be short."""
    flat = values.reshape(-1)
    full = flat.numel() // BLOCK * BLOCK
    absmax = flat[:full].view(-1, BLOCK).abs().amax(1) if full else flat[:0]
    return absmax if full == flat.numel() else torch.cat((absmax, flat[full:].abs().amax().view(1)))


def codes(values: torch.Tensor, absmax_B: torch.Tensor, *, arithmetic: Arithmetic) -> torch.Tensor:
    """4-bit codes of fp32 `values` by their own blocks' `absmax_B` (not yet quantized itself), uint8, flat."""
    flat = values.reshape(-1)
    if arithmetic == "cpu":
        inverse_B = 1.0 / absmax_B.clamp(min=_LEAST_ABSMAX)
    else:
        inverse_B = torch.where(absmax_B < torch.finfo(torch.float32).tiny, 0.0, 1.0 / absmax_B)
    normed = _by_block(flat, inverse_B, BLOCK)
    full = flat.numel() // BLOCK * BLOCK
    if arithmetic == "cpu" and full < flat.numel():
        normed[full:] = flat[full:] / absmax_B[-1].clamp(min=_LEAST_ABSMAX)
    found = _nearest_16(normed.clamp_(-1, 1))
    if arithmetic == "gpu" and not absmax_B.all():
        # 0 times infinity compares as less than everything there.
        found.masked_fill_((absmax_B == 0).repeat_interleave(BLOCK)[: found.numel()], 0)
    return found


def _nearest_16(normed: torch.Tensor) -> torch.Tensor:
    """How many middles between codes are less than each value in [-1, 1], uint8. Many times faster than a search for each.

    No sixteenth holds two middles, and none lies where rounding could put a value into the neighbouring sixteenth.
    """
    below, middle = _sixteenths()
    sixteenth = (normed * 16 + 16).to(torch.int32)
    found = below.index_select(0, sixteenth)
    return found.add_((normed > middle.index_select(0, sixteenth)).view(torch.uint8))


@cache
def _sixteenths() -> tuple[torch.Tensor, torch.Tensor]:
    """For each sixteenth of [-1, 1], and 1 itself: how many middles lie below it (uint8), and the next one (fp32)."""
    edges = torch.arange(33, dtype=torch.float32) / 16 - 1
    below = torch.bucketize(edges, _middles_16())
    return below.to(torch.uint8), torch.cat((_middles_16(), torch.tensor([torch.inf])))[below]


def pack(codes_: torch.Tensor) -> torch.Tensor:
    """Two uint8 codes a byte, uint8 [(number + 1) // 2]: the even one in the high bits. A missing last one is that of 0."""
    if codes_.numel() % 2:
        codes_ = torch.cat((codes_, torch.tensor([NF4_CODE.index(0.0)], dtype=torch.uint8)))
    pairs = codes_.contiguous().view(torch.int16)
    return (pairs << 4 | pairs >> 8).to(torch.uint8)


def nest(absmax_B: torch.Tensor, *, arithmetic: Arithmetic) -> Scales:
    """Double quantization of all scales of one weight."""
    offset = absmax_B.mean()
    centred_B = absmax_B - offset
    full = centred_B.numel() // NESTED_BLOCK * NESTED_BLOCK
    nested_absmax = centred_B[:full].view(-1, NESTED_BLOCK).abs().amax(1) if full else centred_B[:0]
    if full < centred_B.numel():
        nested_absmax = torch.cat((nested_absmax, centred_B[full:].abs().amax().view(1)))
    normed_B = _by_block(centred_B, 1.0 / nested_absmax, NESTED_BLOCK)
    nearest = _from_table if arithmetic == "cpu" else _nearest_256
    return Scales(nearest(normed_B).masked_fill_(normed_B.isnan(), 0).to(torch.uint8), nested_absmax, offset)


def dequantized(
    packed: torch.Tensor, absmax_B: torch.Tensor, *, num_elements: int, dtype: torch.dtype, blocksize: int = BLOCK
) -> torch.Tensor:
    """fp32(code * absmax) of the first `num_elements` values of `packed` bytes in `dtype`, flat; bit-equal to `finery_kernels.nf4`'s."""
    values = _pairs_256().index_select(0, packed.reshape(-1).to(torch.int32)).view(torch.float32)
    return _by_block(values[:num_elements], absmax_B, blocksize).to(dtype)


@cache
def _pairs_256() -> torch.Tensor:
    """The two values of each byte, one int64 for both."""
    byte = torch.arange(256)
    return torch.stack((code_16()[byte >> 4], code_16()[byte & 15]), dim=1).view(torch.int64).view(-1)


def state_text(shape: tuple[int, ...], *, dtype: torch.dtype, offset: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes keeps beside a weight's tensors, as UTF-8 bytes, uint8 [STATE_BYTES]."""
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset.item(),
    }
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES
    return torch.tensor(list(text), dtype=torch.uint8)


@dataclass(frozen=True)
class StoredNf4:
    """A weight of a checkpoint that bitsandbytes quantized: where its tensors lie, and what its state says."""

    packed: StoredTensor
    absmax: StoredTensor
    nested_absmax: StoredTensor | None
    nested_code: StoredTensor | None
    offset: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Values are rounded to it when they are dequantized."""
    blocksize: int
    nested_blocksize: int

    def scales(self) -> torch.Tensor:
        """What dequantizing multiplies by, fp32 [B]; read from the file."""
        absmax_B = self.absmax.read().reshape(-1)
        if self.nested_absmax is None or self.nested_code is None:
            return absmax_B.to(torch.float32)
        values_B = self.nested_code.read().reshape(-1)[absmax_B.to(torch.int32)]
        nested_absmax_C = self.nested_absmax.read().reshape(-1)
        return _by_block(values_B, nested_absmax_C, self.nested_blocksize) + torch.tensor(self.offset, dtype=torch.float32)


def stored_weights(base: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredNf4, set[str]]]:
    """By name, every NF4 weight among a checkpoint's tensors, with the names of all tensors that it is made of.

    Raises UnimplementedError for another 4-bit type, InvalidArgumentError where parts are missing or do not fit each other.
    """
    found: dict[str, tuple[StoredNf4, set[str]]] = {}
    for key in base:
        name, _, kind = key.partition(".quant_state.bitsandbytes__")
        if not kind:
            continue
        if kind != "nf4":
            raise UnimplementedError(f"The base model's {name} is quantized as {kind}; of 4-bit types only nf4 can be read.")
        parts = {part: base.get(f"{name}.{part}") for part in ("absmax", "nested_absmax", "nested_quant_map")}
        packed = base.get(name)
        if packed is None or parts["absmax"] is None:
            raise InvalidArgumentError(f"The base model's {name} is quantized and lacks its weights or its absmax; fetch it again.")
        weight = _stored(name, packed, base[key], parts["absmax"], parts["nested_absmax"], parts["nested_quant_map"])
        mine = {key, name, f"{name}.quant_map"} | {f"{name}.{part}" for part in parts}
        found[name] = weight, mine & set(base)
    return found


def _stored(
    name: str,
    packed: StoredTensor,
    text: StoredTensor,
    absmax: StoredTensor,
    nested_absmax: StoredTensor | None,
    nested_code: StoredTensor | None,
) -> StoredNf4:
    try:
        state = json.loads(bytes(text.read().tolist()))
        dtype = getattr(torch, str(state["dtype"]))
        shape = tuple(int(size) for size in state["shape"])
        blocksize, nested_blocksize = int(state["blocksize"]), int(state.get("nested_blocksize", NESTED_BLOCK))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"The base model's {name} has a quantization state that cannot be read; fetch it again.") from error
    weight = StoredNf4(packed, absmax, nested_absmax, nested_code, offset, shape, dtype, blocksize, nested_blocksize)
    num_elements = torch.Size(shape).numel()
    num_blocks = -(-num_elements // blocksize) if blocksize in _BLOCKSIZES else -1
    nested = [part for part in (nested_absmax, nested_code) if part is not None]
    fits = len(shape) == 2 and packed.size_bytes == (num_elements + 1) // 2 and absmax.num_elements == num_blocks
    if len(nested) == 2:
        fits = fits and [part.num_elements for part in nested] == [-(-num_blocks // nested_blocksize), 256]
    if not fits or len(nested) == 1 or (absmax.dtype == torch.uint8) != bool(nested):
        raise InvalidArgumentError(
            f"The base model's {name} says it is {list(shape)} in blocks of {blocksize}, which its {packed.size_bytes} bytes and "
            f"{absmax.num_elements} scales do not fit; fetch it again."
        )
    return weight


@cache
def _middles_16() -> torch.Tensor:
    return (code_16()[:-1] + code_16()[1:]) / 2


@cache
def _middles_256() -> torch.Tensor:
    return (code_256()[:-1] + code_256()[1:]) * 0.5


@cache
def _table() -> torch.Tensor:
    """The code nearest to each of 65,536 even steps from -1 to 1, int32; steps as fp32 rounds them."""
    steps = torch.arange(_TABLE_STEPS, dtype=torch.float32) * 2.0 / (_TABLE_STEPS - 1) - 1.0
    return torch.bucketize(steps, _middles_256(), out_int32=True)


def _from_table(normed: torch.Tensor) -> torch.Tensor:
    indices = (normed.clamp(-1, 1) + 1.0) * 0.5 * (_TABLE_STEPS - 1) + 0.5
    return _table()[indices.nan_to_num().to(torch.int32)]


def _nearest_256(normed: torch.Tensor) -> torch.Tensor:
    """The nearest code; in the very middle of two the one of even index, where the GPU's binary search ends."""
    below = torch.bucketize(normed, _middles_256(), out_int32=True)
    tied = normed == _middles_256()[below.clamp(max=254)]
    return torch.where(tied & (below % 2 == 1), below + 1, below)


def _by_block(values: torch.Tensor, scale_B: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Flat values * the scale of their block, rounded once; the last block may be short."""
    full = values.numel() // blocksize * blocksize
    num_full = full // blocksize
    if full == values.numel():
        return (values.view(-1, blocksize) * scale_B.view(-1, 1)).view(-1)
    head = values[:full].view(num_full, blocksize) * scale_B[:num_full].view(-1, 1)
    return torch.cat((head.view(-1), values[full:] * scale_B[num_full]))
