"""One decoder layer, forward and backward, written out: no autograd graph, every buffer in view.

Owns the arithmetic of a layer and what of it is kept for the backward pass: a tape holds tensors by name, `backward` computes anew what
is not on it. Which names are kept, and where, is the planner's.

The layer's input and output are lists [residual, delta] whose sum is the stream: the addition happens inside the next RMSNorm. The
gradient of the stream is one buffer, updated in place from layer to layer, with spare columns for the adapters' part (see
`finery_kernels.lora`).

Shapes: T rows of a packed batch, D hidden, N outputs of q, k and v, F intermediate, H heads, d head size, R ranks of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch

from finery_kernels.attention import attention_backward, attention_forward
from finery_kernels.glu import glu_backward, glu_forward
from finery_kernels.lora import Adapter, lora_backward_adapters, lora_backward_input, lora_down, lora_forward
from finery_kernels.lora.api import accumulate_
from finery_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from finery_kernels.rope import rope_qkv_backward, rope_qkv_forward_

if TYPE_CHECKING:
    from finery_trainer.engine.architecture import LayerShape
    from finery_trainer.engine.packing import PackedBatch
    from finery_trainer.engine.weights import Projection

ALWAYS_KEPT = frozenset({"x", "rstd1", "rstd2", "oa", "qk_rstd", "a", "a_rstd", "d", "d_rstd"})
"""Small, or what everything else is computed from. `a` and `d`, what attention and MLP add, are there in families with post-norms."""
RECOMPUTABLE = ("h1", "qkv", "o", "x2", "h2", "gate_up", "act")
"""What a plan may leave out. `lse` goes with `o`."""

Rotary = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]


Tape = dict[str, torch.Tensor]
"""What one layer keeps from its forward pass, by name."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Where a layer's gradients are added, all float32 or the weight's dtype; a missing name is frozen.

    `adapters` has one entry a member for each projection, `weights` [N, K] and `biases` [N] one tensor a projection, `norms` one a norm.
    """

    adapters: Mapping[str, list[Adapter | None]]
    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor]
    norms: Mapping[str, torch.Tensor]


class Block:
    """A decoder layer bound to its weights. `norms` are the RMSNorm weights by transformers' module names, q_norm and k_norm included."""

    def __init__(
        self, shape: LayerShape, projections: Mapping[str, Projection], norms: Mapping[str, torch.Tensor], gradients: Gradients
    ) -> None:
        self.shape, self.projections, self.norms, self.gradients = shape, projections, norms, gradients
        self._after_attention = "pre_feedforward_layernorm" if shape.has_post_norms else "post_attention_layernorm"

    def forward(
        self,
        stream: list[torch.Tensor],
        batch: PackedBatch,
        rotary: Rotary,
        *,
        keep: frozenset[str],
        tape: Tape,
        mlp_rows: int,
        head_groups: int = 1,
    ) -> None:
        """`stream`, the addends [delta] or [residual, delta] before the layer, becomes those after it; what `keep` names goes on the tape.

        It is a list so that its tensors are let go of as soon as they are used; the delta is overwritten. `mlp_rows` rows go through the
        MLP at a time, and a `head_groups`-th of the key-value heads, with their queries, through attention.
        """
        kept = _Kept(tape, keep | ALWAYS_KEPT)
        run = _Pass(batch, rotary, kept, head_groups)
        x_TD, h1_ext = self._normed(stream, "input_layernorm", "qkv", kept, "rstd1")
        kept.put(x=x_TD, h1=h1_ext)
        qkv_ext = self._qkv(h1_ext)
        kept.drop("h1")
        del h1_ext
        out_TD = self._attend(qkv_ext, run)
        del qkv_ext
        attended_TD = self._add_attention(out_TD, kept)
        del out_TD
        x2_TD, h2_ext = self._normed([x_TD, attended_TD], self._after_attention, "gate_up", kept, "rstd2")
        kept.put(x2=x2_TD, h2=h2_ext)
        stream += x2_TD, self._post_normed(self._mlp(h2_ext, kept, rows=mlp_rows), "post_feedforward_layernorm", "d", kept)

    def backward(self, g_ext: torch.Tensor, batch: PackedBatch, rotary: Rotary, *, tape: Tape, mlp_rows: int, head_groups: int = 1) -> None:
        """Turns the gradient of the stream after the layer, in the first D columns of `g_ext`, into that before it; adds the weights'.

        `head_groups` must be the forward pass's, unless its attention is computed anew.
        """
        kept = _Kept(tape, frozenset(tape) | set(RECOMPUTABLE) | {"lse"} | ALWAYS_KEPT)
        run = _Pass(batch, rotary, kept, head_groups)
        self._restore_attention(run)
        self._mlp_backward(g_ext, kept, rows=mlp_rows)
        dout_THd = self._output_backward(g_ext, kept)
        dqkv_ext = self._attention_backward(dout_THd, run)
        del dout_THd
        self._input_backward(dqkv_ext, g_ext, kept)
        tape.clear()

    # Forward.

    def _normed(
        self, stream: list[torch.Tensor], norm: str, projection: str, kept: _Kept, rstd_name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum of `stream`, its norm with room for the projection's spare columns). The sum takes the place of the last addend."""
        delta_TD = stream.pop()
        residual_TD = stream.pop() if stream else None
        layout = self.projections[projection].layout
        h_ext = delta_TD.new_empty(delta_TD.shape[0], layout.shape[1])
        h_TD = h_ext[:, : self.shape.hidden]
        _, stream_TD, rstd_T = rms_norm_forward(
            delta_TD,
            self.norms[norm],
            eps=self.shape.eps,
            offset=self.shape.norm_offset,
            residual_TD=residual_TD,
            out=h_TD,
            residual_out=None if residual_TD is None else delta_TD,
        )
        kept.put(**{rstd_name: rstd_T})
        return stream_TD, h_ext

    def _qkv(self, h1_ext: torch.Tensor) -> torch.Tensor:
        """q, k and v side by side [T, N], before norm and rotation, in a buffer with spare columns for the backward pass."""
        return self._projected("qkv", h1_ext, spare=self.projections["qkv"].layout.num_ranks)

    def _projected(self, name: str, x_ext: torch.Tensor, *, spare: int = 0) -> torch.Tensor:
        """The projection of `x_ext`, whose spare columns are filled on the way."""
        projection = self.projections[name]
        layout = projection.layout
        weight_ext = projection.weight()
        if layout.num_ranks:
            lora_down(x_ext[:, : layout.in_features], weight_ext, layout, out=x_ext[:, layout.in_features :])
        y_ext = x_ext.new_empty(x_ext.shape[0], layout.num_outputs + spare)
        lora_forward(x_ext, weight_ext, layout, bias_N=projection.bias_N, scale=self._scale_of(name), out=y_ext[:, : layout.num_outputs])
        return y_ext

    def _scale_of(self, name: str) -> float:
        return self.shape.residual_scale if name in ("o", "down") else 1.0

    def _attend(self, qkv_ext: torch.Tensor, run: _Pass) -> torch.Tensor:
        """Attention's output [T, H·d]. Without q/k norm the tape keeps q, k and v rotated, with it as the norm saw them."""
        rotated_TN = qkv_ext.clone() if self.shape.has_qk_norm else qkv_ext
        run.kept.put(qkv=qkv_ext)
        rstd_TG = self._rotate_(rotated_TN, run)
        if rstd_TG is not None:
            run.kept.put(qk_rstd=rstd_TG)
        return self._attention(rotated_TN, run)

    def _attention(self, rotated_TN: torch.Tensor, run: _Pass) -> torch.Tensor:
        """Attention's output [T, H·d] from rotated q, k and v; goes on the tape with its logsumexp, one a group of heads."""
        options = self._attention_options(run.batch)
        if run.head_groups == 1:
            out_THd, lse = attention_forward(*self._heads(rotated_TN), **options)
            out_TD, lses = out_THd.flatten(1), lse[None]
        else:
            out_TD = rotated_TN.new_empty(len(rotated_TN), self.shape.num_attention)
            parts: list[torch.Tensor] = []
            for heads, target in zip(self._head_groups(rotated_TN, run), out_TD.chunk(run.head_groups, dim=1), strict=True):
                out_THd, lse = attention_forward(*heads, **options)
                target.copy_(out_THd.flatten(1))
                parts.append(lse)
            lses = torch.stack(parts)
        run.kept.put(o=out_TD, lse=lses)
        return out_TD

    def _head_groups(self, qkv_TN: torch.Tensor, run: _Pass) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q, k and v of every group of heads."""
        q_THd, k_TKd, v_TKd = self._heads(qkv_TN)
        parts = (x.chunk(run.head_groups, dim=1) for x in (q_THd, k_TKd, v_TKd))
        return list(zip(*parts, strict=True))

    def _rotate_(self, qkv_ext: torch.Tensor, run: _Pass) -> torch.Tensor | None:
        shape = self.shape
        return rope_qkv_forward_(
            qkv_ext[:, : shape.num_qkv],
            *run.rotary,
            run.batch.positions_T,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            q_norm=self.norms.get("q_norm"),
            k_norm=self.norms.get("k_norm"),
            eps=shape.eps,
            norm_offset=shape.norm_offset,
        )

    def _heads(self, qkv_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, H, d], k and v [T, kv heads, d]: views."""
        shape = self.shape
        heads = qkv_TN[:, : shape.num_qkv].unflatten(1, (-1, shape.head_dim))
        q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        return q, k, v

    def _attention_options(self, batch: PackedBatch) -> _AttentionOptions:
        return {
            "cu_seqlens": batch.cu_seqlens,
            "max_seqlen": batch.max_seqlen,
            "lengths_equal": batch.lengths_equal,
            "scale": self.shape.attention_scale,
            "window": self.shape.window,
            "softcap": self.shape.softcap,
            "deterministic": batch.is_deterministic,
        }

    def _add_attention(self, out_TD: torch.Tensor, kept: _Kept) -> torch.Tensor:
        """What attention adds to the stream [T, D]: the output projection, post-normed where the family does so."""
        projection = self.projections["o"]
        layout, scale, weight_ext = projection.layout, self._scale_of("o"), projection.weight()
        num_inputs, num_outputs = layout.in_features, layout.num_outputs
        y_TD = out_TD.new_empty(out_TD.shape[0], num_outputs)
        torch.addmm(y_TD, out_TD, weight_ext[:num_outputs, :num_inputs].T, beta=0, alpha=scale, out=y_TD)
        if layout.num_ranks:
            oa_TR = out_TD.new_empty(out_TD.shape[0], layout.num_ranks)
            lora_down(out_TD, weight_ext, layout, out=oa_TR)
            y_TD.addmm_(oa_TR, weight_ext[:num_outputs, num_inputs:].T, alpha=scale)
            kept.put(oa=oa_TR)
        if projection.bias_N is not None:
            y_TD.add_(projection.bias_N, alpha=scale)
        return self._post_normed(y_TD, "post_attention_layernorm", "a", kept)

    def _post_normed(self, y_TD: torch.Tensor, norm: str, name: str, kept: _Kept) -> torch.Tensor:
        if not self.shape.has_post_norms:
            return y_TD
        normed_TD, _, rstd_T = rms_norm_forward(y_TD, self.norms[norm], eps=self.shape.eps, offset=self.shape.norm_offset)
        kept.put(**{name: y_TD, f"{name}_rstd": rstd_T})
        return normed_TD

    def _mlp(self, h2_ext: torch.Tensor, kept: _Kept, *, rows: int) -> torch.Tensor:
        """What the MLP adds to the stream [T, D], `rows` rows at a time."""
        num_rows = h2_ext.shape[0]
        if rows >= num_rows:
            gate_up_ext, act_ext = self._mlp_inner(h2_ext)
            kept.put(gate_up=gate_up_ext)
            kept.drop("gate_up")
            del gate_up_ext
            delta_TD = self._projected("down", act_ext)
            kept.put(act=act_ext)
            return delta_TD
        delta_TD = h2_ext.new_empty(num_rows, self.shape.hidden)
        for start in range(0, num_rows, rows):
            part = slice(start, min(start + rows, num_rows))
            delta_TD[part] = self._projected("down", self._mlp_inner(h2_ext[part])[1])
        return delta_TD

    def _mlp_inner(self, h2_ext: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate and up with spare columns [T, 2F + R], the activated product with spare columns [T, F + R])."""
        gate_up_ext = self._projected("gate_up", h2_ext, spare=self.projections["gate_up"].layout.num_ranks)
        act_ext = h2_ext.new_empty(h2_ext.shape[0], self.projections["down"].layout.shape[1])
        num_gate_up, num_act = 2 * self.shape.intermediate, self.shape.intermediate
        glu_forward(gate_up_ext[:, :num_gate_up], activation=self.shape.activation, out=act_ext[:, :num_act])
        return gate_up_ext, act_ext

    # Backward.

    def _restore_attention(self, run: _Pass) -> None:
        """Computes what is missing up to the stream after attention. Long packs have no room for q, k and v until they are wanted again."""
        kept = run.kept
        if "o" not in kept and "qkv" not in kept:
            self._attend(self._restored_qkv(run), run)
            if run.is_long:
                kept.drop("qkv", force=True)
        elif "o" not in kept:
            self._attention(self._rotated(run), run)
        if "x2" not in kept:
            delta_TD = self._add_attention(kept["o"], kept)
            kept.put(x2=delta_TD.add_(kept["x"]))

    def _restored_qkv(self, run: _Pass) -> torch.Tensor:
        """q, k and v before norm and rotation, computed anew. In long packs what they are computed from is not kept beside them."""
        was_kept = "h1" in run.kept
        qkv_ext = self._qkv(self._restored_h("h1", run.kept))
        if run.is_long and not was_kept:
            run.kept.drop("h1", force=True)
        return qkv_ext

    def _rotated(self, run: _Pass) -> torch.Tensor:
        """q, k and v on the tape, as attention takes them: a copy where the tape keeps them as the norm saw them."""
        qkv_TN = run.kept["qkv"]
        if self.shape.has_qk_norm:
            qkv_TN = qkv_TN.clone()
            self._rotate_(qkv_TN, run)
        return qkv_TN

    def _restored_h(self, name: str, kept: _Kept) -> torch.Tensor:
        """The normed stream before q/k/v (h1) or before the MLP (h2) with its spare columns filled, computed anew where it is missing."""
        norm, projection, source = ("input_layernorm", "qkv", "x") if name == "h1" else (self._after_attention, "gate_up", "x2")
        if name not in kept:
            layout = self.projections[projection].layout
            h_ext = kept[source].new_empty(kept[source].shape[0], layout.shape[1])
            rms_norm_forward(
                kept[source], self.norms[norm], eps=self.shape.eps, offset=self.shape.norm_offset, out=h_ext[:, : self.shape.hidden]
            )
            self._fill_spare(projection, h_ext)
            kept.put(**{name: h_ext})
        return kept[name]

    def _mlp_backward(self, g_ext: torch.Tensor, kept: _Kept, *, rows: int) -> None:
        """The gradient of the stream after the layer becomes that before the MLP."""
        g_TD = g_ext[:, : self.shape.hidden]
        dy_ext = self._post_norm_backward(g_ext, "post_feedforward_layernorm", "d", kept)
        h2_ext = self._restored_h("h2", kept)
        dh2_TD = torch.empty_like(g_TD, memory_format=torch.contiguous_format)
        for start in range(0, g_ext.shape[0], rows):
            part = slice(start, min(start + rows, g_ext.shape[0]))
            self._mlp_part_backward(part, dy_ext[part], h2_ext[part], dh2_TD[part], kept)
        kept.drop("h2", "gate_up", "act", force=True)
        self._norm_backward(dh2_TD, kept["x2"], self._after_attention, kept["rstd2"], g_TD)
        kept.drop("x2", force=True)

    def _mlp_part_backward(self, part: slice, dy_ext: torch.Tensor, h2_ext: torch.Tensor, dh2_TD: torch.Tensor, kept: _Kept) -> None:
        num_act, num_gate_up = self.shape.intermediate, 2 * self.shape.intermediate
        gate_up_ext = kept["gate_up"][part] if "gate_up" in kept else None
        if gate_up_ext is None:
            spare = self.projections["gate_up"].layout.num_ranks
            gate_up_ext = self._projected("gate_up", h2_ext, spare=spare)
        dact_ext = dy_ext.new_empty(dy_ext.shape[0], self.projections["down"].layout.shape[1])
        dact_TF = self._input_gradient("down", dy_ext, out=dact_ext[:, :num_act])
        gate_up_TN = gate_up_ext[:, :num_gate_up]
        is_kept = "act" in kept
        # The product computed anew takes the place of its gradient.
        glu_backward(dact_TF, gate_up_TN, activation=self.shape.activation, out=gate_up_TN, act_out=None if is_kept else dact_TF)
        act_ext = kept["act"][part] if is_kept else dact_ext
        del dact_TF, dact_ext
        if not is_kept:
            self._fill_spare("down", act_ext)
        self._weight_gradients("down", dy_ext, act_ext)
        del act_ext
        self._input_gradient("gate_up", gate_up_ext, out=dh2_TD)
        self._weight_gradients("gate_up", gate_up_ext, h2_ext)

    def _fill_spare(self, name: str, x_ext: torch.Tensor) -> None:
        """Where the weight is frozen and has an adapter, `x·Aᵀ` for the adapter's gradient."""
        layout = self.projections[name].layout
        if layout.num_ranks:
            torch.mm(x_ext[:, : layout.in_features], self.projections[name].adapter_rows().T, out=x_ext[:, layout.in_features :])

    def _input_gradient(self, name: str, dy_ext: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """dx of a projection; `dy_ext` may be wider than the projection's outputs and ranks."""
        projection = self.projections[name]
        width = projection.layout.shape[0]
        return lora_backward_input(dy_ext[:, :width], projection.weight(), projection.layout, scale=self._scale_of(name), out=out)

    def _weight_gradients(self, name: str, dy_ext: torch.Tensor, x_ext: torch.Tensor, xa_TR: torch.Tensor | None = None) -> None:
        """Adds the gradients of what is trained in a projection; `_input_gradient` has filled the spare columns of `dy_ext`."""
        layout, scale, gradients = self.projections[name].layout, self._scale_of(name), self.gradients
        x_TK = x_ext[:, : layout.in_features]
        dy_TN = dy_ext[:, : layout.num_outputs]
        if (adapters := gradients.adapters.get(name)) is not None:
            xa_TR = x_ext[:, layout.in_features :] if xa_TR is None else xa_TR
            lora_backward_adapters(dy_ext, x_TK, xa_TR, layout, adapters, scale=scale)
        if (weight := gradients.weights.get(name)) is not None:
            accumulate_(weight, dy_TN.T, x_TK, alpha=scale)
        if (bias := gradients.biases.get(name)) is not None:
            bias.add_(dy_TN.sum(dim=0, dtype=torch.float32), alpha=scale)

    def _norm_backward(self, dy_TD: torch.Tensor, x_TD: torch.Tensor, norm: str, rstd_T: torch.Tensor, g_TD: torch.Tensor) -> None:
        """Adds to the stream's gradient `g_TD` what comes back through a norm of the stream."""
        rms_norm_backward(
            dy_TD,
            x_TD,
            self.norms[norm],
            rstd_T,
            offset=self.shape.norm_offset,
            dresidual_TD=g_TD,
            out=g_TD,
            dweight_D=self.gradients.norms.get(norm),
        )

    def _post_norm_backward(self, g_ext: torch.Tensor, norm: str, name: str, kept: _Kept) -> torch.Tensor:
        """The gradient of what a block adds, before its post-norm; without post-norms that is the stream's own."""
        if not self.shape.has_post_norms:
            return g_ext
        dy_ext = torch.empty_like(g_ext)
        rms_norm_backward(
            g_ext[:, : self.shape.hidden],
            kept[name],
            self.norms[norm],
            kept[f"{name}_rstd"],
            offset=self.shape.norm_offset,
            out=dy_ext[:, : self.shape.hidden],
            dweight_D=self.gradients.norms.get(norm),
        )
        kept.drop(name, force=True)
        return dy_ext

    def _output_backward(self, g_ext: torch.Tensor, kept: _Kept) -> torch.Tensor:
        """The gradient of attention's output [T, H, d]."""
        dy_ext = self._post_norm_backward(g_ext, "post_attention_layernorm", "a", kept)
        dout_TD = self._input_gradient("o", dy_ext)
        self._weight_gradients("o", dy_ext, kept["o"], kept["oa"] if "oa" in kept else None)  # noqa: SIM401 - `kept` is no dict
        return dout_TD.unflatten(1, (self.shape.num_heads, self.shape.head_dim))

    def _attention_backward(self, dout_THd: torch.Tensor, run: _Pass) -> torch.Tensor:
        """The gradient of q, k and v before norm and rotation, with spare columns [T, N + R]."""
        kept, has_norm = run.kept, self.shape.has_qk_norm
        if "qkv" not in kept:
            qkv_TN = self._restored_qkv(run)
            if not has_norm:
                self._rotate_(qkv_TN, run)
            kept.put(qkv=qkv_TN)
            del qkv_TN
        rotated_TN = self._rotated(run)
        out_THd, lses = kept["o"].unflatten(1, (self.shape.num_heads, self.shape.head_dim)), kept["lse"]
        # A group's gradients take the place of what they are the gradients of.
        dqkv_ext = torch.empty_like(rotated_TN) if has_norm else rotated_TN
        douts, outs = dout_THd.chunk(run.head_groups, dim=1), out_THd.chunk(run.head_groups, dim=1)
        groups, targets = self._head_groups(rotated_TN, run), self._head_groups(dqkv_ext, run)
        for heads, target, dout, out, lse in zip(groups, targets, douts, outs, lses, strict=True):
            gradients = attention_backward(dout, *heads, out, lse, **self._attention_options(run.batch))
            if run.head_groups == 1:
                self._unrotate(*gradients, dqkv_ext, run)
            else:
                for part, gradient in zip(target, gradients, strict=True):
                    part.copy_(gradient)
            # Not to be there beside the next group's.
            del gradients
        del rotated_TN, out_THd, groups, outs
        kept.drop("o", "lse", force=True)
        if run.head_groups > 1:
            self._unrotate(*self._heads(dqkv_ext), dqkv_ext, run)
        kept.drop("qkv", force=True)
        return dqkv_ext

    def _unrotate(self, dq_THd: torch.Tensor, dk_TKd: torch.Tensor, dv_TKd: torch.Tensor, out_ext: torch.Tensor, run: _Pass) -> None:
        has_norm = self.shape.has_qk_norm
        rope_qkv_backward(
            dq_THd,
            dk_TKd,
            dv_TKd,
            *run.rotary,
            run.batch.positions_T,
            out_TN=out_ext[:, : self.shape.num_qkv],
            pre_TN=run.kept["qkv"][:, : self.shape.num_qkv] if has_norm else None,
            rstd_TG=run.kept["qk_rstd"] if has_norm else None,
            q_norm=self.norms.get("q_norm"),
            k_norm=self.norms.get("k_norm"),
            norm_offset=self.shape.norm_offset,
            dq_norm=self.gradients.norms.get("q_norm"),
            dk_norm=self.gradients.norms.get("k_norm"),
        )

    def _input_backward(self, dqkv_ext: torch.Tensor, g_ext: torch.Tensor, kept: _Kept) -> None:
        """The gradient of the stream before attention."""
        h1_ext = self._restored_h("h1", kept)
        dh1_TD = self._input_gradient("qkv", dqkv_ext)
        self._weight_gradients("qkv", dqkv_ext, h1_ext)
        self._norm_backward(dh1_TD, kept["x"], "input_layernorm", kept["rstd1"], g_ext[:, : self.shape.hidden])


class _AttentionOptions(TypedDict):
    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths_equal: int | None
    scale: float
    window: int | None
    softcap: float | None
    deterministic: bool


@dataclass(frozen=True)
class _Pass:
    """One pass through a layer: what it works on, and what it keeps."""

    batch: PackedBatch
    rotary: Rotary
    kept: _Kept
    head_groups: int

    @property
    def is_long(self) -> bool:
        """Whether the pack is so long that attention is computed group by group: beside it, products and norms cost little."""
        return self.head_groups > 1


class _Kept:
    """The tape under the plan: `put` takes what is wanted, `drop` lets go of it."""

    def __init__(self, tensors: dict[str, torch.Tensor], wanted: frozenset[str]) -> None:
        self._tensors, self._wanted = tensors, wanted

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def put(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            if name in self._wanted or (name == "lse" and "o" in self._wanted):
                self._tensors[name] = tensor

    def drop(self, *names: str, force: bool = False) -> None:
        for name in names:
            if force or name not in self._wanted:
                self._tensors.pop(name, None)
