"""What a plan counts is what a pass allocates: every tensor of a pass followed on the meta device, at an 8B model's sizes, without a GPU.

The kernels are replaced by what they allocate; all else is the engine's own code. Whether an allocator and real kernels keep to that is for
a GPU to say: `kernels/benchmarks` has each row's estimate beside its peak.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finery_common.errors import ResourceExhaustedError
from finery_kernels.lora import api as lora_api
from finery_trainer.engine import block, stack
from finery_trainer.engine.packing import PackedBatch
from finery_trainer.engine.planner import _SMALL_BYTES, Plan, Ranks, Workload, plan_step
from finery_trainer.engine.stack import TrainingStack

GIB = 1 << 30
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
RANKS = Ranks(qkv=96, o=32, gate_up=64, down=32)
NUM_LAYERS = 6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and nobody has let go of yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not any(each.alias_info for each in func._schema.returns):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class HostDouble:
    """As the offloader: one layer's tensors still leave while the next layer computes; those of the layer below arrive beforehand."""

    def __init__(self, host: tuple[frozenset[str], ...]) -> None:
        self._host = host
        self._leaving: list[torch.Tensor] = []
        self._gone: dict[int, dict[str, tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}
        self._arriving: dict[int, dict[str, torch.Tensor]] = {}

    def stored(self, index: int, tape: dict[str, torch.Tensor]) -> None:
        self._leaving.clear()
        names = [name for name in self._host[index] | ({"lse"} if "o" in self._host[index] else set()) if name in tape]
        self._gone[index] = {name: (tape[name].size(), tape[name].stride(), tape[name].dtype) for name in names}
        self._leaving = [tape.pop(name) for name in names]

    def fetched(self, index: int, tape: dict[str, torch.Tensor]) -> None:
        self._leaving.clear()
        for each in (index, index - 1):
            if each >= 0 and each not in self._arriving:
                self._arriving[each] = {
                    name: torch.empty_strided(size, stride, dtype=dtype, device="meta")
                    for name, (size, stride, dtype) in self._gone[each].items()
                }
        tape.update(self._arriving.pop(index))

    def skipped(self, index: int) -> None:
        self._arriving.pop(index, None)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm_forward(x, weight, *, eps, offset=0.0, residual_TD=None, out=None, residual_out=None):
    stream = x if residual_TD is None else empty(*x.shape) if residual_out is None else residual_out
    return empty(*x.shape) if out is None else out, stream, empty(len(x), dtype=torch.float32)


def rms_norm_backward(dy, x, weight, rstd, *, offset=0.0, dresidual_TD=None, out=None, dweight_D=None):
    return empty(*x.shape) if out is None else out


def rope_qkv_forward_(qkv, *_, num_heads, num_kv_heads, q_norm, **__):
    return None if q_norm is None else empty(len(qkv), num_heads + num_kv_heads, dtype=torch.float32)


def attention_forward(q, k, v, **_):
    return empty(*q.shape), empty(q.shape[0], q.shape[1], dtype=torch.float32)


def attention_backward(dout, q, k, v, out, lse, **_):
    """dq in float32, dk and dv by query head, and copies of what is no block of its own."""
    beside = [dout.contiguous(), out.contiguous(), empty(*q.shape, dtype=torch.float32), empty(*q.shape), empty(*q.shape)]
    gradients = empty(*q.shape), empty(*k.shape), empty(*v.shape)
    assert len(beside) == 5
    return gradients


def linear_cross_entropy(h, weight, targets, *, rows_L, tile_rows, **_):
    dh, rows = empty(*h.shape), min(tile_rows, len(rows_L))
    tile = empty(rows, weight.shape[0], dtype=torch.float32), empty(2, rows, h.shape[1])
    assert len(tile) == 2
    return empty(1, dtype=torch.float32)[0], dh


DOUBLES: Mapping[object, Mapping[str, object]] = {
    block: {
        "rms_norm_forward": rms_norm_forward,
        "rms_norm_backward": rms_norm_backward,
        "rope_qkv_forward_": rope_qkv_forward_,
        "rope_qkv_backward": lambda *_, **__: None,
        "attention_forward": attention_forward,
        "attention_backward": attention_backward,
        "glu_forward": lambda *_, **__: None,
        "glu_backward": lambda *_, **__: None,
        "accumulate_": lambda *_, **__: None,
    },
    stack: {
        "rms_norm_forward": rms_norm_forward,
        "rms_norm_backward": rms_norm_backward,
        "linear_cross_entropy_forward_backward": linear_cross_entropy,
    },
    lora_api: {"accumulate_": lambda *_, **__: None},
}


@pytest.fixture
def kernels_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the kernels make nothing but their results and workspaces; these make them too, and compute nothing."""
    for module, doubles in DOUBLES.items():
        for name, double in doubles.items():
            monkeypatch.setattr(module, name, double)


def config_of(family: str, *, num_layers: int):
    import transformers

    classes = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "gemma2": "Gemma2Config"}
    return getattr(transformers, classes[family])(**SIZES, num_hidden_layers=num_layers, vocab_size=128256, tie_word_embeddings=False)


def bound_of(family: str, *, num_layers: int) -> TrainingStack:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config_of(family, num_layers=num_layers), dtype=torch.bfloat16)
        return TrainingStack(get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules=targets)))


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def bound(request: pytest.FixtureRequest) -> TrainingStack:
    return bound_of(request.param, num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def whole_8b() -> TrainingStack:
    return bound_of("llama", num_layers=32)


def planned(bound: TrainingStack, *, longest: int, fraction: float, host_bytes: int) -> Plan:
    """The plan for one row in `fraction` of what keeping everything takes, or in the least above that there is a plan for."""
    work = Workload(num_tokens=longest, longest_row=longest, mean_row=longest, ranks=RANKS)
    room = fraction * plan_step(bound.shape, work, card_bytes=1 << 50).card_bytes
    while True:
        try:
            return plan_step(bound.shape, work, card_bytes=int(room), host_bytes=host_bytes)
        except ResourceExhaustedError:
            room *= 1.05


def pass_peak(
    bound: TrainingStack,
    plan: Plan,
    *,
    num_tokens: int,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
    backward_layers: Collection[int] | None = None,
) -> int:
    """Bytes at the peak of one forward and backward pass by `plan`."""
    meta = {"device": "meta"}
    batch = PackedBatch(
        input_ids_T=torch.empty(num_tokens, dtype=torch.int64, **meta),
        positions_T=torch.empty(num_tokens, dtype=torch.int32, **meta),
        cu_seqlens=torch.empty(num_tokens // longest + 1, dtype=torch.int32, **meta),
        rows_L=torch.empty(num_tokens, dtype=torch.int64, **meta),
        targets_L=torch.empty(num_tokens, dtype=torch.int64, **meta),
        max_seqlen=longest,
        lengths_equal=longest,
        num_tokens=num_tokens,
        num_labels=num_tokens,
    )
    monkeypatch.setattr(bound, "plan", plan)
    monkeypatch.setattr(bound, "_offloader", HostDouble(plan.host))
    monkeypatch.setattr(bound, "_rotary_of", lambda *_: (None, None))
    with LiveBytes() as live:
        bound.forward_backward(batch, num_labels=num_tokens, backward_layers=backward_layers)
    return live.peak


@pytest.mark.usefixtures("kernels_allocate")
@pytest.mark.parametrize("host_gib", [0, 32])
@pytest.mark.parametrize("fraction", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("longest", [2048, 8192, 131072])
def test_a_pass_takes_what_its_plan_counts(bound, monkeypatch, longest, fraction, host_gib):
    plan = planned(bound, longest=longest, fraction=fraction, host_bytes=host_gib * GIB)
    peak = pass_peak(bound, plan, num_tokens=longest, longest=longest, monkeypatch=monkeypatch)
    rotary_bytes = 2 * longest * SIZES["head_dim"] * 4
    counted = plan.activation_bytes + plan.workspace_bytes - _SMALL_BYTES - rotary_bytes
    assert peak <= counted * 1.002
    assert counted <= peak * 1.04


@pytest.mark.usefixtures("kernels_allocate")
@pytest.mark.parametrize(("card_gib", "longest"), [(16, 81_920), (24, 100_000), (24, 131_072), (80, 342_733), (80, 500_000)])
def test_the_peak_is_in_the_backward_passes_of_the_layers_that_are_treated_differently(whole_8b, monkeypatch, card_gib, longest):
    """So that whoever looks for the longest context (`kernels/benchmarks`) need not wait for all of them."""
    from benchmarks.finery_engine import probed_layers

    work = Workload(num_tokens=longest, longest_row=longest, mean_row=longest, ranks=RANKS, is_quantized=True)
    card_bytes = (card_gib - 1.25 - 6.1) * GIB  # less the CUDA context, what a run leaves free, and weights, gradients and states
    plan = plan_step(whole_8b.shape, work, card_bytes=int(card_bytes), host_bytes=80 * GIB)
    lengths = {"num_tokens": longest, "longest": longest}
    whole = pass_peak(whole_8b, plan, **lengths, monkeypatch=monkeypatch)
    assert pass_peak(whole_8b, plan, **lengths, monkeypatch=monkeypatch, backward_layers=probed_layers(plan)) == whole
    assert len(probed_layers(plan)) <= 12
