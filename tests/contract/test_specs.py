"""Specs and protos say the same: every field, its type, its presence, and every word of an enum."""

from __future__ import annotations

from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from finery.conversion.v1 import conversion_pb2
from finery.dataset.v1 import dataset_pb2
from finery.training.v1 import spec_pb2
from finery_common.conversion_spec import ConversionSpec, HubSpec, WeightedAdapter
from finery_common.spec import BatchSpec, CheckpointSpec, DatasetSpec, DpoSpec, LoraSpec, MemorySpec, OptimizerSpec, Spec, TrainingSpec

PAIRS: list[tuple[type[Spec], Any]] = [
    (TrainingSpec, spec_pb2.TrainingSpec),
    (LoraSpec, spec_pb2.LoraSpec),
    (OptimizerSpec, spec_pb2.OptimizerSpec),
    (BatchSpec, spec_pb2.BatchSpec),
    (CheckpointSpec, spec_pb2.CheckpointSpec),
    (MemorySpec, spec_pb2.MemorySpec),
    (DpoSpec, spec_pb2.DpoSpec),
    (DatasetSpec, dataset_pb2.DatasetSpec),
    (ConversionSpec, conversion_pb2.ConversionSpec),
    (WeightedAdapter, conversion_pb2.WeightedAdapter),
    (HubSpec, conversion_pb2.HubSpec),
]
SCALARS = {
    str: FieldDescriptor.TYPE_STRING,
    int: FieldDescriptor.TYPE_INT64,
    float: FieldDescriptor.TYPE_DOUBLE,
    bool: FieldDescriptor.TYPE_BOOL,
}

by_name = pytest.mark.parametrize(("spec", "message"), PAIRS, ids=[spec.__name__ for spec, _ in PAIRS])


@by_name
def test_fields_are_the_same(spec: type[Spec], message: Any):
    assert spec.__name__ == message.DESCRIPTOR.name
    assert list(spec.model_fields) == [field.name for field in message.DESCRIPTOR.fields], "in the same order, too"


@by_name
def test_a_field_that_is_not_set_can_be_told(spec: type[Spec], message: Any):
    assert all(field.has_presence or field.is_repeated for field in message.DESCRIPTOR.fields)


@by_name
def test_types_are_the_same(spec: type[Spec], message: Any):
    for name, field in spec.model_fields.items():
        wire = message.DESCRIPTOR.fields_by_name[name]
        kind = _kind(field.annotation)
        if issubclass(kind, Spec):
            assert _described(wire).name == kind.__name__
        elif issubclass(kind, StrEnum):
            words = [value.name.removeprefix(_prefix(wire)).lower() for value in wire.enum_type.values if value.number != 0]
            assert words == [word.value for word in kind], name
        else:
            assert wire.type == SCALARS[kind], name


@by_name
def test_every_field_says_what_it_means(spec: type[Spec], message: Any):
    assert [name for name, field in spec.model_fields.items() if not field.description] == []


def test_every_spec_is_compared():
    compared = {spec for spec, _ in PAIRS}
    assert set(Spec.__subclasses__()) == compared


def _kind(annotation: Any) -> type:
    """The type inside `X | None` and `tuple[X, ...]`."""
    if isinstance(annotation, UnionType):
        [annotation] = [item for item in get_args(annotation) if item is not NoneType]
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
        annotation = get_args(annotation)[0] if get_args(annotation) else annotation
    return annotation


def _described(field: FieldDescriptor) -> Descriptor:
    assert field.message_type is not None
    return field.message_type


def _prefix(field: FieldDescriptor) -> str:
    assert field.enum_type is not None
    return field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
