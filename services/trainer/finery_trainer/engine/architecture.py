"""What the engine's own decoder layers need to know of a family: sizes, norms, rotation, attention, and where its modules stand.

Owns the reading of transformers' configurations and layers into one frozen description a layer. A family that is not here, or a layer
that has something the description cannot say, is not replaced: `describe` answers why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3")
"""`model_type`s whose decoder layers are replaced; phi4 is phi3's."""

Activation = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA = ("gemma2", "gemma3_text")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One decoder layer. Sizes are in elements; `window` is the number of tokens a token sees, itself included."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    norm_offset: float
    """Added to the norms' weights: 1 for Gemma, whose weights are kept around zero."""
    activation: Activation
    attention_scale: float
    window: int | None
    softcap: float | None
    rope: str | None
    """Key of the rotary table; none for a layer without positions."""
    has_qk_norm: bool
    has_post_norms: bool
    """Gemma's norms of what attention and MLP add to the stream."""
    residual_scale: float
    """Granite's factor of what attention and MLP add to the stream."""

    @property
    def num_qkv(self) -> int:
        """Outputs of q, k and v together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_attention(self) -> int:
        """Inputs of the output projection."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model around its layers."""

    layers: tuple[LayerShape, ...]
    vocab_size: int
    eps: float
    norm_offset: float
    embedding_scale: float
    logits_scale: float
    logits_softcap: float | None
    is_tied: bool
    """Embedding and head are one matrix."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.layers[0].hidden


def describe(config: PretrainedConfig) -> ModelShape | str:
    """The shape of a model with this configuration, or the reason why its layers are not replaced."""
    family = config.model_type
    if family not in FAMILIES:
        return f"model_type {family} is not among the engine's own families: {', '.join(FAMILIES)}"
    if (name := _activation_name(config)) not in _ACTIVATIONS:
        return f"activation {name} is none of {', '.join(_ACTIVATIONS)}"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, key, 0.0):
            return f"{key} is {getattr(config, key)}; the engine's own layers have no dropout"
    if by_length := _rope_types(config) & {"dynamic", "longrope"}:
        return f"rope_type is {by_length.pop()}: its frequencies follow each sequence's length, which packed sequences do not share"
    layers = tuple(_layer(config, index) for index in range(config.num_hidden_layers))
    embedding_scale = float(getattr(config, "embedding_multiplier", 1.0))
    return ModelShape(
        layers=layers,
        vocab_size=config.vocab_size,
        eps=config.rms_norm_eps,
        norm_offset=1.0 if family in _GEMMA else 0.0,
        embedding_scale=config.hidden_size**0.5 if family in _GEMMA else embedding_scale,
        logits_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        is_tied=bool(config.tie_word_embeddings),
    )


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The transformers model, below PEFT where that is around it."""
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module with `embed_tokens`, `layers`, `norm` and `rotary_emb`."""
    return model.get_decoder()


def norms_of(layer: nn.Module, shape: LayerShape) -> dict[str, torch.Tensor]:
    """The weights of a layer's norms, by transformers' module names."""
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if shape.has_post_norms else []
    norms = {name: cast("torch.Tensor", getattr(layer, name).weight) for name in names}
    if shape.has_qk_norm:
        attention = cast("nn.Module", layer.self_attn)
        norms |= {name: cast("torch.Tensor", getattr(attention, name).weight) for name in ("q_norm", "k_norm")}
    return norms


def rotary_tables(rotary: nn.Module, key: str, *, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary size] in float32, from transformers' own rotary module.

    Every `rope_type` is honoured whose frequencies are the same for all lengths.
    """
    like = torch.empty(1, dtype=torch.float32, device=device)
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(like, positions) if key == "all" else rotary(like, positions, key)
    return cos[0].contiguous(), sin[0].contiguous()


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Of all layers: the parameters are one dictionary, or one for each type of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(each.get("rope_type", "default")) for each in nested}


def _activation_name(config: PretrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _layer(config: PretrainedConfig, index: int) -> LayerShape:
    family = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    has_rope = family != "smollm3" or bool(config.no_rope_layers[index])
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        norm_offset=1.0 if family in _GEMMA else 0.0,
        activation=_ACTIVATIONS[_activation_name(config)],
        attention_scale=_attention_scale(config, head_dim),
        window=_window(config, index),
        softcap=getattr(config, "attn_logit_softcapping", None) if family == "gemma2" else None,
        rope=None if not has_rope else config.layer_types[index] if family == "gemma3_text" else "all",
        has_qk_norm=family in ("qwen3", "gemma3_text"),
        has_post_norms=family in _GEMMA,
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
    )


def _attention_scale(config: PretrainedConfig, head_dim: int) -> float:
    if config.model_type in _GEMMA:
        return float(config.query_pre_attn_scalar) ** -0.5
    if config.model_type == "granite":
        return float(config.attention_multiplier)
    return float(head_dim) ** -0.5


def _window(config: PretrainedConfig, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("llama", "granite") or window is None:
        return None
    if config.model_type in ("mistral", "phi3"):
        return int(window)
    layer_types = getattr(config, "layer_types", None)
    return int(window) if layer_types is not None and layer_types[index] == "sliding_attention" else None
