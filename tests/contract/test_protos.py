"""The wire contract as it is committed: stubs that match their protos, and rules that every service's proto keeps."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

ROOT = Path(__file__).resolve().parents[2]
PROTOS_DIR = ROOT / "protos"
PROTO_PATHS = sorted(path.relative_to(PROTOS_DIR) for path in PROTOS_DIR.glob("finery/**/*.proto"))

# Short by nature: what the configuration names, and one entry per GPU group.
UNPAGED = {"finery.training.v1.TrainingService.ListBaseModels", "finery.serving.v1.ServingService.ListDeployments"}
# Tells the present state and its changes, not events.
WITHOUT_SEQUENCE = {"finery.serving.v1.ServingService.WatchAliases"}


def _services() -> list[ServiceDescriptor]:
    modules = [importlib.import_module(f"{'.'.join(path.parent.parts)}.{path.stem}_pb2") for path in PROTO_PATHS]
    return [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]


def _methods(prefix: str, *, but: set[str] | None = None) -> list[MethodDescriptor]:
    methods = [method for service in _services() for method in service.methods if method.name.startswith(prefix)]
    return [method for method in methods if method.full_name not in (but or set())]


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_stubs_regenerate_identically_to_what_is_committed(tmp_path: Path):
    subprocess.run([sys.executable, ROOT / "tools" / "protos.py", "--out", tmp_path], check=True, stdout=subprocess.PIPE)
    generated, committed = _contents(tmp_path / "finery"), _contents(PROTOS_DIR / "gen" / "finery")
    changed = [name for name in generated.keys() | committed.keys() if generated.get(name) != committed.get(name)]
    assert not changed, f"protos/gen is out of date, run `make protos`: {sorted(changed)}"


@pytest.mark.parametrize("path", PROTO_PATHS, ids=str)
def test_a_proto_package_is_the_folder_it_lies_in(path: Path):
    module = importlib.import_module(f"{'.'.join(path.parent.parts)}.{path.stem}_pb2")
    assert module.DESCRIPTOR.package == ".".join(path.parent.parts)


@pytest.mark.parametrize("method", _methods("Create"), ids=lambda method: method.full_name)
def test_every_create_takes_a_request_id(method: MethodDescriptor):
    assert "request_id" in method.input_type.fields_by_name


@pytest.mark.parametrize("method", _methods("List", but=UNPAGED), ids=lambda method: method.full_name)
def test_every_list_pages(method: MethodDescriptor):
    assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
    assert "next_page_token" in method.output_type.fields_by_name


@pytest.mark.parametrize("method", _methods("Watch", but=WITHOUT_SEQUENCE), ids=lambda method: method.full_name)
def test_every_watch_streams_from_any_sequence(method: MethodDescriptor):
    assert method.server_streaming
    assert "after_sequence" in method.input_type.fields_by_name


def test_no_message_carries_an_artifact_as_bytes():
    modules = [importlib.import_module(f"{'.'.join(path.parent.parts)}.{path.stem}_pb2") for path in PROTO_PATHS]
    fields = [field for module in modules for message in module.DESCRIPTOR.message_types_by_name.values() for field in message.fields]
    assert fields
    assert not [field.full_name for field in fields if field.type == field.TYPE_BYTES]
