"""Attention over packs of sequences: cuDNN, Flash, FA3, FlexAttention or plain torch, chosen by what the case needs."""

from finery_kernels.attention.api import Backend, attention, attention_backward, attention_forward, choose_backend

__all__ = ["Backend", "attention", "attention_backward", "attention_forward", "choose_backend"]
