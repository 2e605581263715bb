"""Gated linear units: SwiGLU and GEGLU over one buffer that holds gate and up side by side."""

from finery_kernels.glu.api import ACTIVATIONS, Activation, glu, glu_backward, glu_forward

__all__ = ["ACTIVATIONS", "Activation", "glu", "glu_backward", "glu_forward"]
