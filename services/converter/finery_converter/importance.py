"""Importance matrices: how much each input of each matrix of a model matters on a calibration set.

The importance of a column is the mean square of what it is multiplied by, as llama.cpp's imatrix has it; quantization then keeps those
columns more exact that see large inputs. Owns collecting them, the names that GGUF has for a model's modules, and the file, which is
llama.cpp's imatrix format. Leaves calibration texts and the forward pass to its callers: `ImportanceCollector` is an observer of
`streamed.StreamedModel`, and hooks itself into models of transformers with `watch`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from finery_common.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from finery_common.leash import leashed
from finery_converter import ggufparts

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of the mean importance: an input that calibration never saw still has a value, without which some types fail on whole blocks of zeros.
_FLOOR = 1e-6
_SUMS, _COUNTS = ".in_sum2", ".counts"
# Runs with the converter's own `gguf`, so that both call a tensor the same.
_NAMES_SCRIPT = """
import json, sys
import gguf
request = json.load(sys.stdin)
arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == request["architecture"])
names = gguf.get_tensor_name_map(arch, request["num_blocks"])
json.dump({module: names.get_name(module) for module in request["modules"]}, sys.stdout)
"""


def tensor_names(model_file: Path, modules: Sequence[str], *, converter_dir: Path) -> dict[str, tuple[str, ...]]:
    """What the GGUF file `model_file` calls the weights of the transformers modules `modules`; modules that it lacks are left out.

    A module of fused experts has several tensors. Output and embeddings are left out, as llama.cpp's own matrices leave them: their types
    need none, and tied ones are looked up as well as multiplied by.
    """
    asked = {name: module for module in modules for name in (module, *(f"{module}.{part}" for part in _EXPERT_PARTS))}
    headers = [ggufparts.read_header(part) for part in ggufparts.parts_of(model_file)]
    architecture = headers[0].metadata["general.architecture"]
    request = {"architecture": architecture, "num_blocks": headers[0].metadata[f"{architecture}.block_count"], "modules": list(asked)}
    path = os.pathsep.join(filter(None, [str(converter_dir / "gguf-py"), str(converter_dir), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        leashed([sys.executable, "-c", _NAMES_SCRIPT]),
        input=json.dumps(request),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"The GGUF converter's names could not be read: {done.stderr.strip()[-300:]}")
    there = {name for header in headers for name, fact in header.tensors.items() if len(fact.shape) > 1}
    found: dict[str, tuple[str, ...]] = {}
    for name, tensor in cast("dict[str, str | None]", json.loads(done.stdout)).items():
        weight = f"{tensor}.weight"
        if weight in there and weight not in ("output.weight", "token_embd.weight"):
            found[asked[name]] = (*found.get(asked[name], ()), weight)
    return found


# Fused experts are one module with these weights; the first two see the same inputs.
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


class ImportanceCollector:
    """Sums of squares of inputs, module by module; holds one float for each input of each module, whatever the calibration's size."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        """`names` are those of `tensor_names`; inputs of other modules are let pass."""
        self._names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def __call__(self, module: str, x: torch.Tensor) -> None:
        """Adds `x` (..., inputs), which the linear layer `module` is about to be given."""
        for tensor in self._names.get(module, ()):
            rows = x.detach().reshape(-1, x.shape[-1])
            self._add(tensor, 0, 1, rows)

    def add_experts(self, module: str, experts: nn.Module, x_NH: torch.Tensor, chosen_NK: torch.Tensor) -> None:
        """Adds what each of the fused `experts` is given of `x_NH`, token by token, as `chosen_NK` says; works out what is inside anew."""
        import torch

        weights, act = cast("Any", experts), cast("Callable[[torch.Tensor], torch.Tensor]", experts.act_fn)
        num_experts = int(weights.down_proj.shape[0])
        for expert in range(num_experts):
            rows = x_NH[(chosen_NK == expert).any(dim=-1)]
            inner = None
            for tensor in self._names.get(module, ()):
                if "ffn_down" in tensor:
                    if inner is None:
                        gate, up = torch.nn.functional.linear(rows, weights.gate_up_proj[expert]).chunk(2, dim=-1)
                        inner = act(gate) * up
                    self._add(tensor, expert, num_experts, inner)
                else:
                    self._add(tensor, expert, num_experts, rows)

    def _add(self, tensor: str, expert: int, num_experts: int, rows: torch.Tensor) -> None:
        import torch

        if tensor not in self._sums:
            self._sums[tensor] = torch.zeros(num_experts, rows.shape[-1], dtype=torch.float32)
            self._counts[tensor] = torch.zeros(num_experts, dtype=torch.float32)
        self._sums[tensor][expert] += rows.float().square().sum(dim=0).cpu()
        self._counts[tensor][expert] += len(rows)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Hears every linear layer and all fused experts of a model of transformers while the context lasts."""
        from torch import nn

        hooks = []
        for name, module in model.named_modules():
            if name not in self._names:
                continue
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(partial(_hear_linear, self, name)))
            elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
                hooks.append(module.register_forward_pre_hook(partial(_hear_experts, self, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save(self, file: Path, *, dataset: str, chunk_size: int) -> None:
        """Writes llama.cpp's imatrix file; `dataset` names the calibration set, `chunk_size` is its sequences' length in tokens.

        Raises FailedPreconditionError where nothing was heard, InvalidArgumentError for inputs that are not finite.
        """
        from gguf import GGUFWriter

        if not self._sums:
            raise FailedPreconditionError("The importance matrix is empty: no calibration text went through the model.")
        writer = GGUFWriter(file, "imatrix")
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        most = max(float(counts.max()) for counts in self._counts.values())
        writer.add_uint32("imatrix.chunk_count", max(1, round(most / chunk_size)))
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for tensor, sums in self._sums.items():
            if not bool(sums.isfinite().all()):
                raise InvalidArgumentError(f"The model's inputs to {tensor} are not finite on the calibration set.", code="not_finite")
            writer.add_tensor(tensor + _SUMS, sums.numpy())
            writer.add_tensor(tensor + _COUNTS, self._counts[tensor].reshape(-1, 1).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _hear_linear(collector: ImportanceCollector, name: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    collector(name, args[0])


def _hear_experts(collector: ImportanceCollector, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    collector.add_experts(name, module, args[0], args[1])


def collect(
    model: nn.Module, sequences: Sequence[Sequence[int]], collector: ImportanceCollector, *, on_progress: Callable[[float], None]
) -> None:
    """Runs the transformers model `model`, which is in memory whole, over the token ids `sequences`."""
    import torch

    with collector.watch(model), torch.no_grad():
        for index, sequence in enumerate(sequences):
            model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
            on_progress((index + 1) / len(sequences))


def load(file: Path) -> dict[str, np.ndarray]:
    """Mean squares by GGUF tensor out of an imatrix file, float32, experts one after the other; ones where an expert was never asked.

    Raises InvalidArgumentError for a file of another kind.
    """
    from gguf import GGUFReader

    try:
        found = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in GGUFReader(file).tensors}
    except (ValueError, IndexError, FileNotFoundError) as error:
        raise InvalidArgumentError(f"{file.name} is no importance matrix: {error}", code="importance_unreadable") from error
    matrix: dict[str, np.ndarray] = {}
    for name in (name.removesuffix(_SUMS) for name in found if name.endswith(_SUMS)):
        sums, counts = found[name + _SUMS], found[name + _COUNTS].reshape(-1, 1)
        means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
        means = np.maximum(means, _FLOOR * means.mean(axis=1, keepdims=True))
        matrix[name] = np.ascontiguousarray(means, dtype=np.float32).reshape(-1)
    if not matrix:
        raise InvalidArgumentError(f"{file.name} is a GGUF file, but no importance matrix.", code="importance_unreadable")
    return matrix
