"""Rotary embedding and per-head RMSNorm in plain torch, on any device; what the kernels must agree with. Shapes are checked by `api`.

Legend: T tokens, H query or key heads, G query and key heads together, d head dimension, R <= d rotary dimension, r = R/2, P positions of
the tables. A table is (cos_PR, sin_PR, positions_T), or None where nothing is rotated; a position outside it gives NaN. Sources and targets
are (q_THd, k_THd) or (q_THd, k_THd, v_THd), whose third member is only copied, and may be the same tensors. Arithmetic in fp32 (fp64 stays
fp64), one rounding at the end.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Table = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def rotate(sources: Tensors, targets: Tensors, table: Table | None, *, inverse: bool) -> None:
    """Rotates every query and key head by its position's angle, or by minus that."""
    for source_THd, target_THd in zip(sources[:2], targets[:2], strict=True):
        target_THd.copy_(_rotated(_widened(source_THd), table, inverse=inverse))
    _copy_values(sources, targets)


@torch.no_grad()
def norm_rotate(
    sources: Tensors,
    targets: Tensors,
    weights: Tensors,
    table: Table | None,
    *,
    eps: float,
    norm_offset: float,
    rstd_TG: Tensor,
    pre: Tensors | None = None,
) -> None:
    """RMSNorm over each head, then the rotation; keeps the reciprocal deviations and, in `pre`, the sources."""
    for index, (x_THd, rstd_TH) in enumerate(zip(sources, _by_tensor(rstd_TG, sources), strict=True)):
        if pre is not None:
            pre[index].copy_(x_THd)
        wide_THd = _widened(x_THd)
        rstd_TH.copy_(torch.rsqrt(wide_THd.square().mean(dim=-1) + eps))
        normed_THd = wide_THd * rstd_TH[..., None] * (_widened(weights[index]) + norm_offset)
        targets[index].copy_(_rotated(normed_THd, table, inverse=False))


@torch.no_grad()
def norm_rotate_backward(
    gradients: Tensors,
    pre: Tensors,
    targets: Tensors,
    weights: Tensors,
    table: Table | None,
    *,
    norm_offset: float,
    rstd_TG: Tensor,
    dweights: Tensors | None = None,
) -> None:
    """The gradient of `norm_rotate` by its sources into `targets`; that of the weights is added to `dweights`."""
    for index, rstd_TH in enumerate(_by_tensor(rstd_TG, pre)):
        dnormed_THd = _rotated(_widened(gradients[index]), table, inverse=True)
        xhat_THd = _widened(pre[index]) * rstd_TH[..., None]
        if dweights is not None:
            dweights[index].add_((dnormed_THd * xhat_THd).sum(dim=(0, 1)))
        dxhat_THd = dnormed_THd * (_widened(weights[index]) + norm_offset)
        mean_TH1 = (dxhat_THd * xhat_THd).mean(dim=-1, keepdim=True)
        targets[index].copy_(rstd_TH[..., None] * (dxhat_THd - xhat_THd * mean_TH1))
    _copy_values(gradients, targets)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_tensor(rstd_TG: Tensor, heads: Tensors) -> Tensors:
    return rstd_TG.split([x_THd.shape[1] for x_THd in heads[:2]], dim=1)


def _copy_values(sources: Tensors, targets: Tensors) -> None:
    for source_THd, target_THd in zip(sources[2:], targets[2:], strict=True):
        target_THd.copy_(source_THd)


def _angles(table_PR: Tensor, positions_T: Tensor) -> Tensor:
    """[T, 1, r]: the halves of a table's row are equal."""
    limit, rotary_dim = table_PR.shape
    rows_Tr = table_PR[positions_T.clamp(0, limit - 1), : rotary_dim // 2]
    known_T = (positions_T >= 0) & (positions_T < limit)
    return rows_Tr.masked_fill(~known_T[:, None], float("nan"))[:, None]


def _rotated(x_THd: Tensor, table: Table | None, *, inverse: bool) -> Tensor:
    if table is None:
        return x_THd
    cos_PR, sin_PR, positions_T = table
    cos_T1r, sin_T1r = _angles(cos_PR, positions_T), _angles(sin_PR, positions_T)
    if inverse:
        sin_T1r = -sin_T1r
    half = cos_T1r.shape[-1]
    first_THr, second_THr, rest_THp = x_THd.split((half, half, x_THd.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first_THr * cos_T1r - second_THr * sin_T1r, second_THr * cos_T1r + first_THr * sin_T1r, rest_THp), dim=-1)
