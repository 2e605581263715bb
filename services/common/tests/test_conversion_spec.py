"""What a conversion may be asked for: which fields go together, what an omitted type is, and the way over the wire and back."""

from __future__ import annotations

import pytest

from finery.conversion.v1 import conversion_pb2
from finery_common.conversion_spec import OUTPUT_TYPES, ConversionSpec, OutputFormat, OutputType
from finery_common.errors import InvalidArgumentError

ADAPTER = "adapters/ftjob-" + "0" * 24 + "-1"
OTHER = "adapters/ftjob-" + "1" * 24 + "-1"
MODEL = "models/ftjob-" + "0" * 24
DATASET = "datasets/ds-" + "0" * 24
TWO = [{"adapter": ADAPTER}, {"adapter": OTHER, "weight": 0.5}]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({}, "adapter", "got none of adapter, adapters and model"),
        ({"adapter": ADAPTER, "model": MODEL}, "adapter", "got adapter and model"),
        (
            {"adapter": ADAPTER, "type": "q4_k_m"},
            "type",
            "got q4_k_m with format safetensors, wanted one of bf16",
        ),
        ({"adapter": ADAPTER, "format": "gguf", "type": "nf4"}, "type", "got nf4 with format gguf"),
        ({"adapters": TWO[:1]}, "adapters", "a single one goes into adapter"),
        ({"adapters": [TWO[0], TWO[0]]}, "adapters", "got an adapter twice"),
        ({"adapters": [item | {"weight": 0.0} for item in TWO]}, "adapters", "got a weight of 0 for each"),
        ({"adapters": TWO, "combination": "ties"}, "density", "wanted 0 to 1"),
        ({"adapters": TWO, "density": 0.5}, "density", "cat, which keeps all"),
        ({"adapter": ADAPTER, "combination": "ties", "density": 0.5}, "combination", "without adapters"),
        ({"model": MODEL, "format": "adapter"}, "format", "wanted safetensors or gguf"),
        ({"model": MODEL, "scale": 2.0}, "scale", "has no adapter to scale"),
        ({"model": MODEL, "base_weights": "original"}, "base_weights", "where nothing is merged"),
        ({"adapter": ADAPTER, "importance_matrix": True}, "importance_matrix", "without format gguf"),
        ({"adapter": ADAPTER, "format": "gguf", "type": "iq1_s", "importance_matrix": False}, "importance_matrix", "which needs it"),
        (
            {"adapter": ADAPTER, "format": "adapter", "calibration_dataset": "datasets/ds-" + "0" * 24},
            "calibration_dataset",
            "measures nothing",
        ),
        ({"adapter": ADAPTER, "format": "adapter", "max_file_size_bytes": 10**9}, "max_file_size_bytes", "are one file"),
        ({"adapter": "adapters/../../files/x"}, "adapter", "got 'adapters/../../files/x', wanted adapters/ with job and step, such as"),
        ({"adapter": ADAPTER, "hub": {"repository": "no-owner"}}, "hub.repository", "got 'no-owner', wanted owner/name, each of letters"),
        ({"adapter": ADAPTER, "scale": 0.0}, "scale", ""),
        ({"adapter": ADAPTER, "format": "gguf", "importance_matrix": True}, "importance_matrix", "got true with type f16"),
        ({"adapter": ADAPTER, "hub": {"repository": "a/b", "token": "hf_secret"}}, "hub.token", "wanted the name of the secret"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_field_to_change(fields, field, said):
    with pytest.raises(InvalidArgumentError) as caught:
        ConversionSpec.parse(fields)
    assert caught.value.param == field
    assert said in caught.value.message


@pytest.mark.parametrize("format_", OutputFormat)
def test_every_format_has_a_type_of_its_own_where_none_is_said(format_):
    assert ConversionSpec.parse({"adapter": ADAPTER, "format": format_.value}).element_type is OUTPUT_TYPES[format_][0]


def test_every_type_belongs_to_a_format():
    assert {item for types in OUTPUT_TYPES.values() for item in types} == set(OutputType)


def test_iq_types_weigh_inputs_unless_told_not_to():
    def weighs(**fields) -> bool:
        return ConversionSpec.parse({"adapter": ADAPTER, "format": "gguf", **fields}).weighs_inputs

    assert [weighs(type="iq4_xs"), weighs(type="q4_k_m"), weighs(type="q4_k_m", importance_matrix=True)] == [True, False, True]
    assert not weighs(type="iq4_xs", importance_matrix=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": ADAPTER},
        {"adapters": TWO, "combination": "dare_ties", "density": 0.3, "scale": 2.0, "format": "gguf", "type": "iq2_m"},
        {"model": MODEL, "type": "fp8_block", "max_file_size_bytes": 10**9, "hub": {"repository": "a/b", "private": False}},
    ],
)
def test_a_spec_comes_back_from_the_wire_as_it_was(fields):
    spec = ConversionSpec.parse(fields)
    assert ConversionSpec.from_proto(spec.to_proto(conversion_pb2.ConversionSpec)) == spec


def test_a_token_given_for_its_name_is_not_repeated():
    with pytest.raises(InvalidArgumentError) as caught:
        ConversionSpec.parse({"adapter": ADAPTER, "hub": {"repository": "a/b", "token": "hf_secret"}})
    assert "hf_secret" not in str(caught.value)


def test_types_are_known_as_llama_cpp_writes_them():
    assert ConversionSpec.parse({"adapter": ADAPTER, "format": "gguf", "type": "Q4_K_M"}).type is OutputType.Q4_K_M
    with pytest.raises(InvalidArgumentError, match="type: got 'Q4_K_X'"):
        ConversionSpec.parse({"adapter": ADAPTER, "format": "gguf", "type": "Q4_K_X"})
