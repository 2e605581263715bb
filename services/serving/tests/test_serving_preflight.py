"""What is refused before vLLM sees it, and why."""

import json
import struct
from datetime import UTC, datetime

import numpy as np
import pytest
from safetensors.numpy import save_file

from finery_common.artifacts import Manifest, ObjectEntry
from finery_common.errors import FailedPreconditionError
from finery_serving.preflight import BaseModel, base_shapes, check_adapter, check_manifest, check_sizes, read_header

Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
BASE = BaseModel("SmolLM2", "b" * 64, {f"{Q}.weight": (12, 8), f"{EMBED}.weight": (100, 8), "model.norm.weight": (8,)})
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "use_dora": False,
}


def tensors(module=Q, *, rank=4, dims=(8, 12), dtype=np.float32):
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": np.ones((rank, dims[0]), dtype), f"{prefix}.lora_B.weight": np.ones((dims[1], rank), dtype)}


@pytest.fixture
def write(tmp_path):
    def write(*, config=CONFIG, weights=None):
        (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        save_file(tensors() if weights is None else weights, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_plain_adapter_passes(write, dtype):
    check_adapter(write(weights=tensors(dtype=dtype)), base=BASE, max_lora_rank=8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_finite_numbers_are_refused(write, dtype, value):
    weights = tensors(dtype=dtype)
    weights[f"base_model.model.{Q}.lora_B.weight"][-1, -1] = value
    with pytest.raises(FailedPreconditionError, match="lora_B.weight has weights that are no finite") as caught:
        check_adapter(write(weights=weights), base=BASE, max_lora_rank=8)
    assert caught.value.code == "adapter_not_finite"


@pytest.mark.parametrize(("bits", "is_finite"), [(0x7F7F, True), (0x8001, True), (0x7F80, False), (0xFF80, False), (0x7FC1, False)])
def test_bfloat16_is_looked_at_too(write, bits, is_finite):
    folder = write(weights=tensors(dtype=np.float16))
    file = folder / "adapter_model.safetensors"
    # Both have two bytes a number: only the names of the types differ.
    content = file.read_bytes().replace(b'"F16",', b'"BF16",').replace(b" ", b"")
    length = content.index(b"}}", 8) + 2 - 8
    body = file.read_bytes()[-2 * 4 * (8 + 12) :]
    file.write_bytes(struct.pack("<Q", length) + content[8 : 8 + length] + body[:-2] + struct.pack("<H", bits))
    if is_finite:
        check_adapter(folder, base=BASE, max_lora_rank=8)
        return
    with pytest.raises(FailedPreconditionError, match="no finite"):
        check_adapter(folder, base=BASE, max_lora_rank=8)


def test_every_init_that_leaves_the_base_alone_passes(write):
    for init in (True, False, "gaussian", "orthogonal", "eva"):
        check_adapter(write(config={**CONFIG, "init_lora_weights": init, "use_rslora": True}), base=BASE, max_lora_rank=8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias in B"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "trained in full"),
        ({"layer_replication": [[0, 1]]}, "replicated"),
        ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha that differs"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"target_parameters": ["x"]}, "bare parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"init_lora_weights": "OLoRA"}, "changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 16}, "at most 8"),
        ({"r": 0}, "r: got 0"),
        ({"r": "4"}, "r: got '4'"),
        ({"r": True}, "r: got True"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"peft_type": "x" * 100_000}, "peft_type"),
    ],
)
def test_a_configuration_that_vllm_cannot_serve_is_refused(write, change, reason):
    with pytest.raises(FailedPreconditionError, match=reason) as caught:
        check_adapter(write(config={**CONFIG, **change}), base=BASE, max_lora_rank=8)
    assert len(caught.value.message) < 1100


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"x": "' + "y" * (1 << 20) + '"}'])
def test_a_configuration_that_is_none_is_refused(write, text):
    with pytest.raises(FailedPreconditionError, match="adapter_config"):
        check_adapter(write(config=text), base=BASE, max_lora_rank=8)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (tensors(rank=2), "shape"),
        (tensors(dims=(9, 12)), "shape"),
        (tensors(dims=(8, 13)), "shape"),
        (tensors("model.layers.1.self_attn.q_proj"), "no linear layer"),
        (tensors(EMBED, dims=(8, 100)), "no linear layer"),
        (tensors("model.norm"), "no linear layer"),
        (tensors(dtype=np.int8), "I8"),
        ({"x": np.ones(1, np.float32)}, "not the A or B"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(12, np.float32)}, "not the A or B"),
        ({name: value for name, value in tensors().items() if "lora_A" in name}, "wanted A and B"),
        ({}, "no tensors"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(write, weights, reason):
    with pytest.raises(FailedPreconditionError, match=reason):
        check_adapter(write(weights=weights), base=BASE, max_lora_rank=8)


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234567"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"123456789012"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [None], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": 1}, b""),
        (b"[]", b""),
        (b"{{", b""),
        (b'{"a":' + b"[" * 100_000, b""),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, header, data):
    with pytest.raises(FailedPreconditionError):
        read_header(header_file(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"1234", b"\x80\x04\x95pickle-pickle", struct.pack("<Q", 1 << 60) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FailedPreconditionError, match="no safetensors"):
        read_header(tmp_path / "x")


def test_shapes_of_a_base_model_come_from_all_its_files(tmp_path):
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.ones((4,), np.float32)}, tmp_path / "model-2.safetensors")
    assert base_shapes(tmp_path) == {"a": (2, 3), "b": (4,)}


def manifest(*, kind="adapter", names=("adapter_config.json", "adapter_model.safetensors"), **metadata):
    return Manifest(
        kind=kind,
        folder=f"objects/{'0' * 32}/",
        objects=tuple(ObjectEntry(name=name, size_bytes=1, sha256="c" * 64) for name in names),
        made_from={},
        spec={},
        attempt="1",
        metadata={"base_model": BASE.name, "base_model_sha256": BASE.sha256, **metadata},
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_a_manifest_of_an_adapter_of_the_base_passes():
    check_manifest(manifest(), base=BASE)


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (manifest(kind="model"), "adapter_not_servable"),
        (manifest(names=("adapter_config.json", "adapter_model.bin")), "adapter_not_servable"),
        (manifest(names=("adapter_config.json", "adapter_model.safetensors", "more/extra.PT")), "adapter_not_servable"),
        (manifest(base_model="other"), "wrong_base_model"),
        (manifest(base_model_sha256="d" * 64), "wrong_base_model"),
        (manifest(base_model_sha256=None), "wrong_base_model"),
    ],
)
def test_a_manifest_of_something_else_is_refused(made, code):
    with pytest.raises(FailedPreconditionError) as caught:
        check_manifest(made, base=BASE)
    assert caught.value.code == code


def test_a_configuration_too_large_to_read_is_refused_by_its_manifest():
    made = manifest()
    check_sizes(made)
    config = made.objects[0].model_copy(update={"size_bytes": 2 << 20})
    with pytest.raises(FailedPreconditionError, match="2097152 bytes"):
        check_sizes(made.model_copy(update={"objects": (config, made.objects[1])}))
