"""Neighborhood attention as layers, with their projections. Parameters are named as in the public NATTEN package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from natten._attention import attend_packed
from natten._problem import check_window_arguments
from natten.functional import neighborhood_attention_generic, traced
from natten.types import CausalFlag, Dimension

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    """Linear projections around neighborhood attention.

    Args:
        embed_dim: channels of input and output; a multiple of `num_heads`.
        num_heads: attention heads, each of `embed_dim // num_heads` channels.
        kernel_size, stride, dilation, is_causal: the window, as in `natten.na2d`.
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: factor of the logits; `head_dim ** -0.5` by default.
        proj_drop: dropout probability after the output projection.
        mesh, sharding, extent: given together, for input that is sharded over devices; see `natten.distributed`.
            `sharding` names, for each dimension of the mesh, the axis (0, 1, 2) that it divides, or "batch", or None;
            `extent` holds the lengths of the whole grid. Input and output are this rank's shard, and parameters'
            gradients those of the shard: sum them over the mesh. Ranks compare their arguments in the first call.

    Input and output are `[batch, X, Y, Z, embed_dim]` (fewer axes for lower ranks).

    Raises:
        ValueError, TypeError: an argument or the input breaks one of the rules; see `natten.na2d`.
    """

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Dimension,
        stride: Dimension = 1,
        dilation: Dimension = 1,
        is_causal: CausalFlag = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        mesh: DeviceMesh | None = None,
        sharding: Sequence[int | str | None] | None = None,
        extent: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim and both be at least 1; got {num_heads} and {embed_dim}")
        window = check_window_arguments(self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation = (tuple(values) for values in window[:3])
        self.is_causal = tuple(window[3])
        if not (mesh is None) == (sharding is None) == (extent is None):
            raise ValueError("mesh, sharding and extent must be given together")
        if sharding is not None and "heads" in sharding:
            raise ValueError("sharding must not hold heads: a layer projects to all of them")
        self.mesh = mesh
        self.sharding = None if sharding is None else tuple(sharding)
        self.extent = None if extent is None else tuple(extent)
        self._ranks_agree = False
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, X, Y, Z, embed_dim]` to the same shape."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"input must have {self.rank + 2} dimensions, the last of size embed_dim = {self.embed_dim}; got shape "
                f"{tuple(x.shape)}"
            )
        # Query, key and value are views of the packed projection; kernels read them in place.
        packed = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        window = (self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        if self.mesh is None and not traced():
            out = attend_packed(self.rank, packed, *window)
        else:
            query, key, value = packed.unbind(-3)
            if self.mesh is not None:
                out = self._attend_shard(query, key, value)
            else:
                result = neighborhood_attention_generic(query, key, value, *window)
                assert isinstance(result, Tensor)
                out = result
        projected: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return projected

    def _attend_shard(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from natten import distributed  # not all builds of torch have it

        out = distributed.neighborhood_attention(
            query,
            key,
            value,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.scale,
            mesh=self.mesh,
            sharding=self.sharding,
            extent=self.extent,
            validate=not self._ranks_agree,
        )
        self._ranks_agree = True  # compared once: the arguments are the layer's, and comparing makes the host wait
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """The arguments that submodules do not show."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        ) + ("" if self.mesh is None else f", sharding={self.sharding}, extent={self.extent}")


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__
    rank = 3
