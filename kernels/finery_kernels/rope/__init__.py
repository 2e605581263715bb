"""Rotary position embedding of queries and keys, with the RMSNorm over each head that some families put before it."""

from finery_kernels.rope.api import qk_norm_rope, rope, rope_qkv_backward, rope_qkv_forward_

__all__ = ["qk_norm_rope", "rope", "rope_qkv_backward", "rope_qkv_forward_"]
