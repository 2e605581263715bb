"""AdamW over one flat buffer, with fp32, bf16 or 8-bit states, and the gradients' norm."""

from finery_kernels.adamw.api import adamw_, adamw_8bit_, clip_coefficient, grad_norm
from finery_kernels.adamw.state import GROUP_BLOCK, QUANTIZATION_BLOCK, Groups, State8bit

__all__ = [
    "GROUP_BLOCK",
    "QUANTIZATION_BLOCK",
    "Groups",
    "State8bit",
    "adamw_",
    "adamw_8bit_",
    "clip_coefficient",
    "grad_norm",
]
