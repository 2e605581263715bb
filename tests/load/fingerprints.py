"""LoRA adapters that say one word over and over, each its own, whatever they are asked.

Owns the choice of words and the weights. An answer of such an adapter tells which weights made each of its tokens, so that a stream that
two versions had a hand in shows. The adapter works on the last layer's MLP of a Llama-like model alone, trained or random:

- `gate_proj` and `up_proj` send the projections a_k·x to neurons in pairs, as +s a_k·x and -s a_k·x. silu(z) z = z² σ(z), and a pair adds
  up to z²: positive for every input, though nothing is known of it.
- `down_proj` sums these neurons and writes the sum along one direction, so large that the rest of the residual stream is nothing beside it.
- The final norm takes the size away and leaves the direction, whose logits have the word's token in front by a margin known beforehand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# A plain word with the space before it, as byte-level vocabularies write it: its text joins to the next without change.
_WORD = re.compile(r"Ġ[a-z]{4,8}")
_MAX_CANDIDATES = 512
_GATE_SCALE = 300.0
_DOWN_SCALE = 1000.0
_FILL_STD = 1e-3


@dataclass(frozen=True)
class Fingerprint:
    """A word and the direction of the residual stream, of length 1, that has its token in front."""

    text: str
    token_id: int
    margin: float
    """Of its logit over the next, by the base model's weights."""
    direction_D: torch.Tensor


class BaseFolder:
    """A base model's folder, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer that adapters reach, by module."""
        found = {}
        for name, file in self._files.items():
            if name.removesuffix(".weight").rpartition(".")[2] in TARGETS:
                with safe_open(file, "pt") as opened:
                    found[name.removesuffix(".weight")] = tuple(opened.get_slice(name).get_shape())
        return found

    def tensor(self, *names: str) -> torch.Tensor:
        """The first of `names` that is there, in float32."""
        name = next(name for name in names if name in self._files)
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name).float()


def fingerprints(base: BaseFolder, count: int) -> Sequence[Fingerprint]:
    """The `count` words of the base model's vocabulary with the widest margins."""
    head_VD, norm_D = base.tensor("lm_head.weight", "model.embed_tokens.weight"), base.tensor("model.norm.weight")
    vocabulary = json.loads((base.folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted((number, word) for word, number in vocabulary.items() if _WORD.fullmatch(word) and number < len(head_VD))
    ids = torch.tensor([number for number, _ in words[:_MAX_CANDIDATES]])
    apart_ND = head_VD[ids] - head_VD.mean(0)
    # Of the logit's gradient and the token's own direction, trained weights have it now one way and now the other.
    tried = [_margins(head_VD, norm_D, ids, torch.nn.functional.normalize(way, dim=1)) for way in (apart_ND * norm_D, apart_ND / norm_D)]
    found = [
        Fingerprint(" " + word[1:], number, float(margins[index]), directions_ND[index])
        for margins, directions_ND in tried
        for index, (number, word) in enumerate(words[:_MAX_CANDIDATES])
    ]
    best: dict[int, Fingerprint] = {}
    for item in sorted(found, key=lambda item: -item.margin):
        best.setdefault(item.token_id, item)
    chosen = list(best.values())[:count]
    assert len(chosen) == count, f"the vocabulary has {len(chosen)} plain words"
    assert chosen[-1].margin > 0, "no direction has this word in front"
    return chosen


def _margins(
    head_VD: torch.Tensor, norm_D: torch.Tensor, ids: torch.Tensor, directions_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = (directions_ND * len(norm_D) ** 0.5 * norm_D) @ head_VD.T
    own_N = logits_NV.gather(1, ids[:, None])[:, 0]
    others_N = logits_NV.scatter(1, ids[:, None], -torch.inf).amax(1)
    return own_N - others_N, directions_ND


def write_adapter(base: BaseFolder, folder: Path, fingerprint: Fingerprint, *, seed: int = 0, everywhere: bool = False) -> Path:
    """PEFT's two files in `folder`. `everywhere` adds small random weights for all other linear layers, for an adapter of common size
    and, as is common, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    if everywhere:
        for module, (outputs, inputs) in base.shapes.items():
            tensors |= _pair(
                module,
                _FILL_STD * torch.randn(RANK, inputs, generator=generator),
                _FILL_STD * torch.randn(outputs, RANK, generator=generator),
            )
    mlp = f"model.layers.{base.config['num_hidden_layers'] - 1}.mlp"
    shapes, num_hidden = base.shapes, len(fingerprint.direction_D)
    num_neurons = shapes[f"{mlp}.down_proj"][1]
    reads_RD = torch.nn.functional.normalize(torch.randn(RANK, num_hidden, generator=generator), dim=1)
    # Neuron 2k gets +z of direction k, neuron 2k+1 gets -z.
    spread_NR = torch.zeros(num_neurons, RANK)
    for k in range(RANK):
        spread_NR[2 * k, k], spread_NR[2 * k + 1, k] = _GATE_SCALE, -_GATE_SCALE
    for name in ("gate_proj", "up_proj"):
        tensors |= _pair(f"{mlp}.{name}", reads_RD, spread_NR)
    sums_RN, writes_DR = torch.zeros(RANK, num_neurons), torch.zeros(num_hidden, RANK)
    sums_RN[0, : 2 * RANK] = 1.0
    writes_DR[:, 0] = _DOWN_SCALE * fingerprint.direction_D
    tensors |= _pair(f"{mlp}.down_proj", sums_RN, writes_DR)
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if everywhere:
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _pair(module: str, a_RI: torch.Tensor, b_OR: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}"
    # Copies: safetensors refuses tensors that share memory.
    return {f"{prefix}.lora_A.weight": a_RI.clone().contiguous(), f"{prefix}.lora_B.weight": b_OR.clone().contiguous()}
