"""NF4 dequantization, bit by bit against bitsandbytes: reference and kernel, plain and nested absmax, odd shapes, strided rows."""

from __future__ import annotations

import pytest
import torch

from finery_kernels.errors import UnsupportedError
from finery_kernels.nf4 import Nf4State, dequantize
from finery_kernels.nf4.api import NF4_CODE
from finery_kernels.testing import (
    ARCHITECTURES,
    assert_padding_untouched,
    compilation,
    compile_all,
    interpreting,
    kernel_device,
    poisoned,
    random_normal,
)

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Large weights and tiny ones. In fp16 none overflows, which leaves a NaN that a CPU and a GPU write differently, and none is below its
# least number, which some CPUs' bitsandbytes takes for zero.
SCALES = {torch.bfloat16: (1.0, 3e4, 1e-7), torch.float16: (1.0, 1e4, 3e-4), torch.float32: (1.0, 3e4, 1e-7)}
# Whole words and blocks; blocks across rows; rows from the middle of a byte; several tiles a row; an odd number of elements; a single one.
SHAPES = [(6, 128), (5, 40), (4, 33), (2, 2056), (3, 33), (1, 1)]


def bits(weight):
    """The same tensor as integers, so that -0.0 differs from 0.0."""
    return weight.contiguous().view(INTEGERS[weight.dtype])


def quantized(shape, dtype, *, nested, blocksize=64, scale=1.0, device="cpu"):
    """Packed bytes and state by bitsandbytes, and what bitsandbytes makes of them again."""
    weight = random_normal(*shape, seed=sum(shape) + nested, dtype=dtype, device=device, scale=scale)
    packed, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=blocksize)
    return packed, Nf4State.from_bitsandbytes(state), dequantized_by_bitsandbytes(packed, state)


def dequantized_by_bitsandbytes(packed, state):
    """bitsandbytes' own kernel wants an even last dimension; the layout is flat, so pairs will do."""
    shape, num_elements = state.shape, state.shape.numel()
    state.shape = torch.Size(((num_elements + 1) // 2, 2))
    flat = bitsandbytes.dequantize_4bit(packed, state).reshape(-1)[:num_elements]
    state.shape = shape
    return flat.view(shape)


def by_kernel(packed, state, *, out):
    from finery_kernels.nf4 import triton

    return triton.dequantize(
        packed,
        code_16=state.code_16,
        absmax_B=state.absmax_B,
        blocksize=state.blocksize,
        nested_absmax_C=state.nested_absmax_C,
        nested_code_256=state.nested_code_256,
        nested_blocksize=state.nested_blocksize,
        offset=state.offset,
        out=out,
    )


def test_code_is_that_of_bitsandbytes():
    assert torch.equal(torch.tensor(NF4_CODE), bitsandbytes.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_has_the_bits_of_bitsandbytes(dtype, nested):
    for shape in SHAPES:
        for scale in (*SCALES[dtype], 1e-38):
            packed, state, want = quantized(shape, dtype, nested=nested, scale=scale)
            out = poisoned(*shape, dtype=dtype, row_stride=shape[1] + 3)
            assert dequantize(packed, state, out=out) is out
            assert torch.equal(bits(out), bits(want)), (shape, scale)
            assert_padding_untouched(out)
            assert torch.equal(bits(dequantize(packed, state)), bits(want)), (shape, scale)


@pytest.mark.parametrize("blocksize", [32, 128, 1024])
def test_reference_takes_other_blocksizes(blocksize):
    packed, state, want = quantized((12, 200), torch.bfloat16, nested=True, blocksize=blocksize)
    assert torch.equal(bits(dequantize(packed, state)), bits(want))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_has_the_bits_of_the_reference(dtype, nested):
    device = kernel_device()
    for shape in SHAPES:
        packed, state, _ = quantized(shape, dtype, nested=nested, device=device)
        want = dequantize(packed.cpu(), state.to("cpu"))
        if interpreting() and dtype == torch.bfloat16:
            want = truncated(dequantize(packed.cpu(), state.to("cpu"), dtype=torch.float32))
        for row_stride in (shape[1], shape[1] + 8):
            out = poisoned(*shape, dtype=dtype, device=device, row_stride=row_stride)
            by_kernel(packed, state, out=out)
            assert torch.equal(bits(out.cpu()), bits(want)), (shape, row_stride)
            assert_padding_untouched(out)


def truncated(weight_fp32):
    """bf16 as the interpreter makes it, without rounding."""
    return (weight_fp32.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("blocksize", [32, 1024])
def test_kernel_takes_other_blocksizes(blocksize):
    packed, state, want = quantized((2, 1032), torch.float32, nested=True, blocksize=blocksize, device=kernel_device())
    out = poisoned(2, 1032, dtype=torch.float32, device=kernel_device(), row_stride=1040)
    assert torch.equal(bits(by_kernel(packed, state, out=out)), bits(want))


def test_tiles_fit_rows():
    from finery_kernels.nf4.triton import choose_num_warps

    assert [choose_num_warps(width) for width in (4096, 14336, 1024, 2**26, 40)] == [4, 2, 1, 8, 1]


def test_packed_bytes_need_no_alignment():
    packed, state, want = quantized((8, 64), torch.float32, nested=False, device=kernel_device())
    odd = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=packed.device)[1:].copy_(packed.view(-1))
    out = poisoned(8, 64, dtype=torch.float32, device=packed.device)
    assert torch.equal(bits(by_kernel(odd, state, out=out)), bits(want))


def test_another_dtype_than_the_quantized_one_is_rounded_once():
    packed, state, _ = quantized((4, 64), torch.bfloat16, nested=True)
    wide = dequantize(packed, state, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(bits(dequantize(packed, state)), bits(wide.to(torch.bfloat16)))
    assert dequantize(packed, state, out=torch.empty(4, 64, dtype=torch.float16)).dtype == torch.float16


def test_an_empty_weight_is_empty():
    state = Nf4State(shape=(0, 64), dtype=torch.float32, code_16=torch.tensor(NF4_CODE), absmax_B=torch.empty(0))
    assert dequantize(torch.empty(0, 1, dtype=torch.uint8), state).shape == (0, 64)


def test_what_is_not_nf4_of_a_matrix_is_refused():
    weight = random_normal(8, 64, seed=0)
    with pytest.raises(UnsupportedError, match="'fp4'; wanted 'nf4'"):
        Nf4State.from_bitsandbytes(bitsandbytes.quantize_4bit(weight, quant_type="fp4")[1])
    with pytest.raises(UnsupportedError, match=r"wanted \[N, K\]"):
        Nf4State.from_bitsandbytes(bitsandbytes.quantize_4bit(weight.view(2, 4, 64), quant_type="nf4")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(255, 1, dtype=torch.uint8)}, "packed is torch.uint8 with 255 elements; wanted torch.uint8 with 256"),
        ({"packed": torch.zeros(256, 1, dtype=torch.int8)}, "packed is torch.int8"),
        ({"packed": torch.zeros(256, 2, dtype=torch.uint8)[:, 0]}, "packed has strides"),
        ({"out": torch.zeros(64, 8)}, r"out is torch.float32 \(64, 8\) on cpu"),
        ({"out": torch.zeros(64, 8).T}, "out has strides"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"dtype": torch.float16, "out": torch.zeros(8, 64)}, "out is torch.float32"),
    ],
)
def test_unsupported_tensors_are_named(change, message):
    packed, state, _ = quantized((8, 64), torch.float32, nested=True)
    arguments = {"packed": packed, "state": state, **change}
    with pytest.raises(UnsupportedError, match=message):
        dequantize(arguments.pop("packed"), arguments.pop("state"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 48}, "blocksize is 48"),
        ({"shape": (8, 128)}, "absmax_B is torch.float32 with 8 elements; wanted torch.float32 with 16"),
        ({"offset": torch.zeros(())}, "nested_absmax_C is None"),
        ({"code_16": torch.zeros(256)}, "code_16 is"),
    ],
)
def test_an_inconsistent_state_is_refused(change, message):
    fields = {"shape": (8, 64), "dtype": torch.float32, "code_16": torch.tensor(NF4_CODE), "absmax_B": torch.ones(8), **change}
    with pytest.raises(UnsupportedError, match=message):
        dequantize(torch.zeros(256, 1, dtype=torch.uint8), Nf4State(**fields))


def test_kernels_compile_for_ampere_and_hopper():
    from finery_kernels.nf4 import triton

    floats = ("code_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr")
    sizes = {"width": "i32", "out_stride": "i32"}
    orders = []
    for arch in ARCHITECTURES:
        for element in ("bf16", "fp32"):
            tensors = {**dict.fromkeys(floats, "*fp32"), "absmax_ptr": "*u8", "out_ptr": f"*{element}", **sizes}
            plain = {**tensors, "absmax_ptr": "*fp32"}
            for name in floats[1:]:
                del plain[name]
            none = dict.fromkeys(floats[1:])
            for signature, constants in ((tensors, {}), (plain, none)):
                constants = {"BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "FLAT": element == "bf16", **constants}
                common = {"divisible": ("width",), "num_warps": 4, "enable_fp_fusion": False}
                words = {**signature, "words_ptr": "*i32"}
                orders.append(compilation(triton.words_kernel, words, {**constants, "THREADS": 128, "STRIDE_UNIT": 8}, arch, **common))
                elements = {**signature, "packed_ptr": "*u8"}
                orders.append(compilation(triton.elements_kernel, elements, {**constants, "ELEMENTS": 1024}, arch, **common))
    for order, compiled in zip(orders, compile_all(orders), strict=True):
        assert compiled.stack_bytes == 0, "nothing is spilled"
        assert "fma.rn.f32" not in compiled.ptx, "bitsandbytes rounds after every operation"
        if order.name == "words_kernel" and order.signature["out_ptr"] == "*bf16":
            assert "st.global.v4.b32" in compiled.ptx, "rows are written 16 bytes at a time"
            assert compiled.shared_bytes == 64, "only the table lies in shared memory: words stay with their threads"


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_has_the_bits_of_bitsandbytes_on_a_gpu(dtype, nested):
    for shape in [*SHAPES, (1024, 4096), (4096, 14336), (130, 2056)]:
        for scale in SCALES[dtype]:
            packed, state, want = quantized(shape, dtype, nested=nested, scale=scale, device="cuda")
            for row_stride in (shape[1], shape[1] + 64, shape[1] + 5):
                out = poisoned(*shape, dtype=dtype, device="cuda", row_stride=row_stride)
                dequantize(packed, state, out=out)
                assert torch.equal(bits(out), bits(want)), (shape, scale, row_stride)
                assert_padding_untouched(out)
            assert torch.equal(bits(dequantize(packed.cpu(), state.to("cpu"))), bits(want.cpu())), (shape, scale)


@pytest.mark.gpu
def test_kernel_runs_in_a_cuda_graph():
    packed, state, want = quantized((256, 4096), torch.bfloat16, nested=True, device="cuda")
    out = poisoned(256, 4096, dtype=torch.bfloat16, device="cuda", row_stride=6144)
    dequantize(packed, state, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize(packed, state, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(bits(out), bits(want))
