"""LayerNorm with the residual add before it, forward and backward: `api` is public, `reference` plain torch, `triton` the kernel."""

from finery_kernels.layer_norm.api import add_layer_norm, layer_norm, layer_norm_backward, layer_norm_forward

__all__ = ["add_layer_norm", "layer_norm", "layer_norm_backward", "layer_norm_forward"]
