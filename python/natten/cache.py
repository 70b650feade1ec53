"""Keys and values kept along a causal axis, so that a step of new queries gives the rows of the whole problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from natten._pieces import Box, attend_piece, needed_keys, window_axes
from natten.dispatch import Kernel
from natten.types import CausalFlag, Dimension

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """The keys and values that later steps along a causal axis still need, and nothing older.

    A grid is generated along its causal axis, some positions at a time: video frame by frame, audio in chunks, text
    token by token. `step` takes the new positions' query, key and value and returns the output for them, equal to those
    rows of attention over the whole grid. Memory is bounded by the window: positions that no later window reaches are
    dropped.

    Args:
        extent: the whole grid, one length per axis; along the causal axis the most positions that will ever come.
        axis: the causal axis that grows, 0 by default.
        kernel_size, stride, dilation, is_causal: the window, as in `natten.na2d`; `is_causal` must hold for `axis`.

    Raises:
        ValueError, TypeError: as `natten.na2d` for the window's arguments, or `axis` is not causal.
    """

    def __init__(
        self,
        extent: Sequence[int],
        kernel_size: Dimension,
        stride: Dimension = 1,
        dilation: Dimension = 1,
        is_causal: CausalFlag = True,
        *,
        axis: int = 0,
    ) -> None:
        self.axes = window_axes(tuple(extent), kernel_size, stride, dilation, is_causal)
        if not 0 <= axis < len(self.axes):
            raise ValueError(f"axis must be one of the {len(self.axes)} axes of extent; got {axis}")
        if not self.axes[axis].causal:
            raise ValueError(f"is_causal must hold along axis {axis}, along which the cache grows")
        self.axis = axis
        #: Positions passed so far along the causal axis.
        self.length = 0
        self._begin = 0  # first position kept
        self._keys: Tensor | None = None  # buffers; positions [_begin, length) start at _offset
        self._values: Tensor | None = None
        self._offset = 0

    @property
    def kept(self) -> int:
        """Positions kept now along the causal axis."""
        return self.length - self._begin

    def reset(self) -> None:
        """Forgets everything: the next step begins at position 0."""
        self.length = self._begin = self._offset = 0
        self._keys = self._values = None

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        *,
        kernel: str | Kernel | None = None,
    ) -> Tensor:
        """Attention of the next positions.

        Args:
            query: `[batch, axes..., heads, head_dim]` with any number of new positions along the causal axis and the
                whole extent along the others.
            key, value: of the same positions, `[batch, axes..., heads_kv, head_dim]`.

        Returns:
            `[batch, axes..., heads, head_dim_v]` for the new positions.

        Raises:
            ValueError: a shape does not fit the extent, or more positions come than the extent holds.
        """
        self._check(query, key, value)
        growing = self.axes[self.axis]
        begin, end = self.length, self.length + query.shape[1 + self.axis]
        # Starts of windows are monotone inside a dilation group: the next query of each group decides what is kept.
        first_needed, _ = needed_keys(growing, (begin, min(max(end, begin + growing.dilation), growing.extent)))
        self._append(key.detach(), value.detach(), max(first_needed, self._begin))
        keys, values = (t.narrow(1 + self.axis, self._offset, self.kept) for t in self._buffers())
        out, _ = attend_piece(
            self.axes,
            query,
            keys,
            values,
            self._box(begin, end),
            self._box(self._begin, end),
            scale=scale,
            kernel=kernel,
        )
        return out

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def _box(self, begin: int, end: int) -> Box:
        return tuple((begin, end) if a == self.axis else (0, axis.extent) for a, axis in enumerate(self.axes))

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        rank = len(self.axes)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != rank + 3:
                raise ValueError(f"{name} must have {rank + 3} dimensions; got shape {tuple(tensor.shape)}")
            for a, axis in enumerate(self.axes):
                length = tensor.shape[1 + a]
                if a != self.axis and length != axis.extent:
                    raise ValueError(f"{name} must have the extent {axis.extent} along axis {a}; got {length}")
            if tensor.shape[1 + self.axis] != query.shape[1 + self.axis]:
                raise ValueError(f"{name} must have query's new positions along axis {self.axis}")
        new, most = query.shape[1 + self.axis], self.axes[self.axis].extent
        if new < 1 or self.length + new > most:
            raise ValueError(
                f"query must bring at least 1 new position, and no more than the extent {most} holds, along axis "
                f"{self.axis}; got {new} after {self.length}"
            )
        if self._keys is not None and key.shape[0] != self._keys.shape[0]:
            raise ValueError(f"key must keep the batch size {self._keys.shape[0]}; got {key.shape[0]}")

    def _append(self, key: Tensor, value: Tensor, begin: int) -> None:
        """Drops positions before `begin` and adds the new ones.

        Buffers hold twice what is kept when they are made, so that the kept positions are moved rarely: the copying per
        new position stays constant.
        """
        dimension, new = 1 + self.axis, key.shape[1 + self.axis]
        self._offset += begin - self._begin
        self._begin = begin
        kept = self.kept
        if self._keys is None or self._values is None or self._offset + kept + new > self._keys.shape[dimension]:
            room = 2 * (kept + new)
            self._keys, self._values = (
                self._moved(old, tensor, kept, room) for old, tensor in ((self._keys, key), (self._values, value))
            )
            self._offset = 0
        at = self._offset + kept
        self._keys.narrow(dimension, at, new).copy_(key)
        self._values.narrow(dimension, at, new).copy_(value)
        self.length += new

    def _moved(self, old: Tensor | None, like: Tensor, kept: int, room: int) -> Tensor:
        dimension = 1 + self.axis
        shape = list(like.shape)
        shape[dimension] = room
        buffer = like.new_empty(shape)
        if old is not None:
            buffer.narrow(dimension, 0, kept).copy_(old.narrow(dimension, self._offset, kept))
        return buffer
