"""LoRA projections with the adapter inside the base weight's GEMM."""

from finery_kernels.lora.api import (
    Adapter,
    StackedLayout,
    lora_backward_adapters,
    lora_backward_input,
    lora_down,
    lora_forward,
    lora_projection,
    pack_adapters_,
)

__all__ = [
    "Adapter",
    "StackedLayout",
    "lora_backward_adapters",
    "lora_backward_input",
    "lora_down",
    "lora_forward",
    "lora_projection",
    "pack_adapters_",
]
