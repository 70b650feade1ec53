"""Neighborhood attention on tensors sharded over devices: only halos of keys and values travel.

Queries, keys and values are cut along spatial axes (and, at no cost, along batch or heads) over a device mesh. Each
rank needs the keys that its queries' windows reach beyond its own shard, per side and axis no more than that: they come
point to point from the ranks that own them, however many those are. Windows are computed in global coordinates, so the
result is exactly the rows of the whole problem for every window: causal, strided, dilated, even, on
uneven shards, with shards smaller than the window. Interior queries run while halos travel; the backward pass sends
halo gradients back and adds them in the order of ranks, so it is deterministic. See docs/distributed.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from natten._pieces import Box, attend_piece, intersection, needed_box, slices, split_queries, starts, window_axes
from natten._problem import Axis
from natten.dispatch import Kernel
from natten.types import CausalFlag, Dimension

__all__ = ["halo_bytes", "neighborhood_attention", "shard_bounds"]

#: What one dimension of the mesh divides: a spatial axis (0, 1, 2), "batch", "heads", or None (replicas).
Sharding = int | str | None


def shard_bounds(extent: int, shards: int, sizes: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Global ranges of an axis' shards: of the given sizes, or as `torch.chunk` (and DTensor) cuts them.

    Raises:
        ValueError: the sizes do not add up to the extent, or a shard would be empty.
    """
    if sizes is None:
        step = -(-extent // shards)
        sizes = [max(min(step, extent - i * step), 0) for i in range(shards)]
    if len(sizes) != shards or sum(sizes) != extent:
        raise ValueError(f"shard sizes must be {shards} numbers that add up to the extent {extent}; got {list(sizes)}")
    if min(sizes) < 1:
        raise ValueError(
            f"every shard must hold at least one position; {extent} over {shards} shards gives {list(sizes)}"
        )
    ends = list(itertools.accumulate(sizes))
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class _Layout:
    """Who owns which box of the grid, and what this rank sends and receives: the same reasoning on every rank."""

    axes: tuple[Axis, ...]
    ranks: tuple[int, ...]  # global ranks that share this rank's batch items and heads, in the order of the mesh
    owned: tuple[Box, ...]  # their boxes
    me: int  # this rank's index in `ranks`
    sends: tuple[tuple[int, Box], ...] = field(init=False)  # (index in ranks, box of this rank's keys)
    receives: tuple[tuple[int, Box], ...] = field(init=False)

    def __post_init__(self) -> None:
        needed = [needed_box(self.axes, box) for box in self.owned]
        sends, receives = [], []
        for other in range(len(self.ranks)):
            if other == self.me:
                continue
            wanted = intersection(needed[other], self.owned[self.me])
            offered = intersection(needed[self.me], self.owned[other])
            if wanted is not None:
                sends.append((other, wanted))
            if offered is not None:
                receives.append((other, offered))
        object.__setattr__(self, "sends", tuple(sends))
        object.__setattr__(self, "receives", tuple(receives))

    @property
    def own(self) -> Box:
        return self.owned[self.me]


_layouts: dict[tuple[Any, ...], _Layout] = {}


def _layout(
    mesh: DeviceMesh, sharding: tuple[Sharding, ...], axes: tuple[Axis, ...], sizes: tuple[tuple[int, ...] | None, ...]
) -> _Layout:
    signature = (mesh, sharding, axes, sizes)
    layout = _layouts.get(signature)
    if layout is None:
        spatial = [dimension for dimension, what in enumerate(sharding) if isinstance(what, int)]
        bounds = {d: shard_bounds(axes[sharding[d]].extent, mesh.size(d), sizes[d]) for d in spatial}  # type: ignore[index]
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError("this rank is not part of mesh")
        ranks, owned = [], []
        for index in itertools.product(*(range(mesh.size(d)) for d in spatial)):
            place = list(coordinate)
            box = [(0, axis.extent) for axis in axes]
            for d, i in zip(spatial, index, strict=True):
                place[d] = i
                box[sharding[d]] = bounds[d][i]  # type: ignore[index]
            ranks.append(int(mesh.mesh[tuple(place)]))
            owned.append(tuple(box))
        layout = _layouts[signature] = _Layout(axes, tuple(ranks), tuple(owned), ranks.index(dist.get_rank()))
    return layout


def _pack(key: Tensor, value: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """Keys and values of a box, one message."""
    at = slices(box, origin)
    return torch.cat((key[at].reshape(-1), value[at].reshape(-1)))


def _unpack(message: Tensor, key: Tensor, value: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    grid = [end - begin for begin, end in box]
    key_shape = (key.shape[0], *grid, *key.shape[-2:])
    value_shape = (value.shape[0], *grid, *value.shape[-2:])
    keys = message[: math.prod(key_shape)].view(key_shape)
    return keys, message[math.prod(key_shape) :].view(value_shape)


class _Exchange:
    """One call's messages: keys and values before, their gradients after."""

    def __init__(self, layout: _Layout, key: Tensor, value: Tensor) -> None:
        self.layout = layout
        self.key_like, self.value_like = key.detach(), value.detach()
        self.origin = starts(layout.own)
        self._pending: list[dist.Work] = []
        self._arriving: list[Tensor] = []
        self._departing: list[Tensor] = []
        self.gradients_started = False

    def _numel(self, box: Box) -> int:
        tokens = self.key_like.shape[0] * math.prod(end - begin for begin, end in box)
        return tokens * sum(t.shape[-2] * t.shape[-1] for t in (self.key_like, self.value_like))

    def _start(self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Box]]) -> None:
        ranks = self.layout.ranks
        self._arriving = [self.key_like.new_empty(self._numel(box)) for _, box in incoming]
        self._departing = [message for _, message in outgoing]  # alive until sent
        operations = [dist.P2POp(dist.isend, message, ranks[other]) for other, message in outgoing]
        operations += [
            dist.P2POp(dist.irecv, buffer, ranks[other])
            for (other, _), buffer in zip(incoming, self._arriving, strict=True)
        ]
        self._pending = dist.batch_isend_irecv(operations) if operations else []

    def start(self) -> None:
        """Sends what others need and asks for what this rank needs."""
        sends = [(o, _pack(self.key_like, self.value_like, box, self.origin)) for o, box in self.layout.sends]
        self._start(sends, list(self.layout.receives))

    def start_gradients(self, messages: list[Tensor]) -> None:
        """Sends the received halos' gradients back and asks for those of what was sent."""
        self.gradients_started = True
        outgoing = [(o, message) for (o, _), message in zip(self.layout.receives, messages, strict=True)]
        self._start(outgoing, list(self.layout.sends))

    def wait(self) -> list[Tensor]:
        """The messages that arrived, in the order of ranks."""
        for work in self._pending:
            work.wait()
        arrived, self._arriving, self._departing, self._pending = self._arriving, [], [], []
        return arrived


class _AddHaloGradients(torch.autograd.Function):
    """Keys and values as they are; backward, adds the gradients that other ranks send for them."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return key.view_as(key), value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[None, Tensor, Tensor]:
        exchange: _Exchange = ctx.exchange
        if not exchange.gradients_started:  # a rank that received no halo has no node that would have started
            exchange.start_gradients([])
        arrived = exchange.wait()
        if arrived:
            grad_key, grad_value = grad_key.clone(), grad_value.clone()
        for (_, box), message in zip(exchange.layout.sends, arrived, strict=True):
            at = slices(box, exchange.origin)
            keys, values = _unpack(message, exchange.key_like, exchange.value_like, box)
            grad_key[at] += keys
            grad_value[at] += values
        return None, grad_key, grad_value


class _ReceiveHalos(torch.autograd.Function):
    """The halos that arrived, as differentiable tensors; backward, sends their gradients home."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.wait())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.exchange.start_gradients([gradient.contiguous() for gradient in gradients])
        return None, None, None


def _assemble(
    key: Tensor, value: Tensor, own: Box, halos: list[tuple[Box, Tensor, Tensor]], box: Box
) -> tuple[Tensor, Tensor]:
    """Keys and values of a box, from this rank's shard and from halos."""
    origin = starts(box)
    grid = [end - begin for begin, end in box]
    keys = key.new_empty((key.shape[0], *grid, *key.shape[-2:]))
    values = value.new_empty((value.shape[0], *grid, *value.shape[-2:]))
    for part, part_key, part_value in [(own, key, value), *halos]:
        common = intersection(part, box)
        if common is not None:
            to, source = slices(common, origin), slices(common, starts(part))
            keys[to] = part_key[source]
            values[to] = part_value[source]
    return keys, values


def _agree(mesh: DeviceMesh, description: str, failure: str | None, device: torch.device) -> None:
    """Raises the same `ValueError` on every rank of the mesh when one of them failed, or they were not called alike.

    Two small numbers per rank travel; words only when something is wrong.
    """
    digest = int.from_bytes(hashlib.blake2b(description.encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([digest, 0 if failure is None else 1], dtype=torch.int64, device=device)
    group = _mesh_group(mesh)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).cpu()
    if bool((table[:, 1] == 0).all()) and bool((table[:, 0] == table[0, 0]).all()):
        return
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (description, failure), group=group)
    failed: dict[str, list[int]] = {}
    for rank, (_, report) in enumerate(reports):
        if report is not None:
            failed.setdefault(report, []).append(rank)
    if failed:
        raise ValueError("; ".join(f"{report} (on {_named(ranks)})" for report, ranks in failed.items()))
    first = reports[0][0]
    other = next(rank for rank, report in enumerate(reports) if report[0] != first)
    raise ValueError(f"ranks must call alike; rank 0 called with {first}, rank {other} with {reports[other][0]}")


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


_groups: dict[DeviceMesh, Any] = {}


def _mesh_group(mesh: DeviceMesh) -> Any:
    """A process group of all of the mesh's ranks."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh not in _groups:
        _groups[mesh] = mesh._flatten().get_group()
    return _groups[mesh]


def _is_dtensor(tensor: object) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _sharding_of(placements: Sequence[Any], rank: int) -> tuple[Sharding, ...]:
    """What each mesh dimension divides, from a DTensor's placements on `[batch, axes..., heads, channels]`."""
    result: list[Sharding] = []
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            result.append(None)
        elif placement.is_shard() and placement.dim <= rank:
            result.append("batch" if placement.dim == 0 else placement.dim - 1)
        elif placement.is_shard() and placement.dim == rank + 1:
            result.append("heads")
        else:
            raise ValueError(
                f"placements must be Replicate, or Shard of batch, axes or heads; got {placement} on "
                f"mesh dimension {dimension}"
            )
    return tuple(result)


def _check_sharding(mesh: DeviceMesh, sharding: Sequence[Sharding], rank: int) -> tuple[Sharding, ...]:
    if len(sharding) != mesh.ndim:
        raise ValueError(
            f"sharding must name what each of the mesh's {mesh.ndim} dimensions divides; got {tuple(sharding)}"
        )
    for what in sharding:
        if not (what in ("batch", "heads", None) or (isinstance(what, int) and 0 <= what < rank)):
            raise ValueError(f'sharding must hold axes 0 to {rank - 1}, "batch", "heads" or None; got {what!r}')
    named = [what for what in sharding if isinstance(what, int)]
    if len(set(named)) != len(named):
        raise ValueError(f"sharding must divide each axis over one mesh dimension only; got {tuple(sharding)}")
    return tuple(sharding)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    mesh: DeviceMesh | None = None,
    sharding: Sequence[Sharding] | None = None,
    extent: Sequence[int] | None = None,
    shard_sizes: Sequence[Sequence[int] | None] | None = None,
    return_lse: bool = False,
    kernel: str | Kernel | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over a grid that is sharded over a device mesh; every rank calls it with its shard.

    With DTensors, `mesh`, `sharding` and `extent` come from their placements and the result is a DTensor placed alike.
    With plain tensors they are arguments. Gradients flow to query, key and value, and to additional keys and values:
    plain ones get the gradient of this rank's queries alone, to be all-reduced as for any replicated parameter.

    Under `torch.compile` the call is one graph break. Time-outs are those of the process group.

    Args:
        query, key, value: this rank's shards `[batch, X, Y, Z, heads, head_dim]` (fewer axes for lower ranks), or
            DTensors.
        kernel_size, stride, dilation, is_causal, scale, kernel: as in `natten.na2d`.
        additional_keys, additional_values: the same on all ranks that share batch items and heads.
        mesh: the devices.
        sharding: for each dimension of the mesh what it divides: a spatial axis (0, 1, 2), "batch", "heads", or None.
        extent: lengths of the whole grid.
        shard_sizes: for each dimension of the mesh the lengths of its shards, or None for equal ones (`torch.chunk`).
        return_lse: also returns the logsumexp.
        validate: ranks compare their arguments first (two small numbers per rank travel), so that an illegal or unequal
            call raises the same exception everywhere instead of hanging. Without it the host does not wait.

    Raises:
        ValueError, TypeError: as `natten.na2d`; a shard does not have the shape that the arguments give it; ranks call
            with different arguments. With `validate`, the same on every rank, before any halo travels.
    """
    placed: _Placed | None = None
    if _is_dtensor(query):
        placed = _Placed.of(query, key, value)
        mesh, sharding, extent = placed.mesh, placed.sharding, placed.shape[1:-2]
        query, key, value = (tensor.to_local() for tensor in (query, key, value))  # type: ignore[attr-defined]
        additional_keys, additional_values = (placed.local_context(t) for t in (additional_keys, additional_values))
    if mesh is None or sharding is None or extent is None:
        raise ValueError("mesh, sharding and extent must be given with plain tensors")
    sizes: list[tuple[int, ...] | None] = [None] * mesh.ndim
    if shard_sizes is not None:
        sizes = [None if size is None else tuple(size) for size in shard_sizes]
    failure, layout = None, None
    try:
        window = (kernel_size, stride, dilation, is_causal)
        layout = _checked_layout(query, key, value, window, mesh, tuple(sharding), tuple(extent), tuple(sizes))
    except (ValueError, TypeError) as error:
        if not validate:
            raise
        failure = str(error)
    if validate:
        needs_gradient = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        description = (
            f"kernel_size {kernel_size}, stride {stride}, dilation {dilation}, is_causal {is_causal}, extent "
            f"{tuple(extent)}, sharding {tuple(sharding)}, shard_sizes {sizes}, {key.dtype}, head dims {key.shape[-1]} "
            f"and {value.shape[-1]}, gradients {needs_gradient}"
        )
        _agree(mesh, description, failure, query.device)
    assert layout is not None
    out, lse = _attend(
        layout,
        query,
        key,
        value,
        scale=scale,
        kernel=kernel,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )
    if placed is not None:
        shape = placed.shape[:-1]
        out, lse = placed.place(out, (*shape, out.shape[-1])), placed.place(lse, shape)
    return (out, lse) if return_lse else out


def _checked_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[Any, ...],
    mesh: DeviceMesh,
    sharding: tuple[Sharding, ...],
    extent: tuple[int, ...],
    sizes: tuple[tuple[int, ...] | None, ...],
) -> _Layout:
    rank = query.dim() - 3
    if not 1 <= rank <= 3 or len(extent) != rank:
        raise ValueError(
            f"query must have 4, 5 or 6 dimensions and extent one length per axis; got shape {tuple(query.shape)} and "
            f"extent {extent}"
        )
    _check_sharding(mesh, sharding, rank)
    if len(sizes) != mesh.ndim:
        raise ValueError(f"shard_sizes must have one entry per mesh dimension, {mesh.ndim}; got {len(sizes)}")
    layout = _layout(mesh, sharding, window_axes(extent, *window), sizes)
    expected = tuple(end - begin for begin, end in layout.own)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tuple(tensor.shape[1:-2]) != expected:
            raise ValueError(f"{name}'s shard must have the grid {expected}; got shape {tuple(tensor.shape)}")
    return layout


def _attend(layout: _Layout, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    axes, own = layout.axes, layout.own
    differentiable = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    exchange = _Exchange(layout, key, value)
    if differentiable:
        # Made first, so that its backward runs last: halo gradients travel while interior queries are differentiated.
        key, value = _AddHaloGradients.apply(exchange, key, value)  # type: ignore[no-untyped-call]
    exchange.start()
    inner, outer = split_queries(axes, own, own)
    parts = []
    if inner is not None:
        keys = needed_box(axes, inner)
        needed, at = slices(keys, starts(own)), slices(inner, starts(own))
        parts.append((inner, attend_piece(axes, query[at], key[needed], value[needed], inner, keys, **arguments)))
    messages = _ReceiveHalos.apply(exchange, key, value) if differentiable else exchange.wait()  # type: ignore[no-untyped-call]
    halos = [
        (box, *_unpack(message, key, value, box)) for (_, box), message in zip(layout.receives, messages, strict=True)
    ]
    for box in outer:
        keys = needed_box(axes, box)
        piece_key, piece_value = _assemble(key, value, own, halos, keys)
        at = slices(box, starts(own))
        parts.append((box, attend_piece(axes, query[at], piece_key, piece_value, box, keys, **arguments)))
    if len(parts) == 1:
        return parts[0][1]
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = parts[0][1][1].new_empty(query.shape[:-1])
    for box, (piece, piece_lse) in parts:
        at = slices(box, starts(own))
        out[at] = piece
        lse[at] = piece_lse
    return out, lse


@dataclass(frozen=True)
class _Placed:
    """How the DTensors of a call are placed."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    sharding: tuple[Sharding, ...]
    shape: tuple[int, ...]  # query's, global

    @staticmethod
    def of(query: Any, key: Any, value: Any) -> _Placed:
        for name, tensor in (("key", key), ("value", value)):
            if (
                not _is_dtensor(tensor)
                or tensor.device_mesh != query.device_mesh
                or tensor.placements != query.placements
            ):
                raise ValueError(f"{name} must be a DTensor on query's mesh with query's placements")
        sharding = _sharding_of(query.placements, query.dim() - 3)
        return _Placed(query.device_mesh, tuple(query.placements), sharding, tuple(query.shape))

    def local_context(self, tensor: Any) -> Any:
        """Additional keys or values: their gradient is a sum over the ranks that share the grid."""
        if tensor is None or not _is_dtensor(tensor):
            return tensor
        from torch.distributed.tensor import Partial, Replicate

        gradients = [
            Partial() if isinstance(what, int) and isinstance(placement, Replicate) else placement
            for what, placement in zip(self.sharding, tensor.placements, strict=True)
        ]
        return tensor.to_local(grad_placements=gradients)

    def place(self, local: Tensor, shape: Sequence[int]) -> Tensor:
        from torch.distributed.tensor import DTensor

        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
        )


def halo_bytes(
    extent: Sequence[int],
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: CausalFlag | None = False,
    *,
    shards: Sequence[int],
    bytes_per_token: int,
) -> list[int]:
    """Bytes of keys and values that each shard receives in the forward pass.

    Args:
        extent, kernel_size, stride, dilation, is_causal: the whole grid and its window.
        shards: number of equal shards along each axis.
        bytes_per_token: of one key and value, over batch and heads:
            `batch * heads_kv * (head_dim + head_dim_v) * itemsize`.

    Returns:
        One number for each shard, last axis fastest. The backward pass moves the same number, in the other direction.
    """
    axes = window_axes(tuple(extent), kernel_size, stride, dilation, is_causal)
    bounds = [shard_bounds(axis.extent, count) for axis, count in zip(axes, shards, strict=True)]
    result = []
    for box in itertools.product(*bounds):
        needed = math.prod(end - begin for begin, end in needed_box(axes, box))
        kept = intersection(needed_box(axes, box), box)
        result.append((needed - math.prod(end - begin for begin, end in kept or ((0, 0),))) * bytes_per_token)
    return result
