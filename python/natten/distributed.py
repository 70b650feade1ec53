"""Neighborhood attention on tensors sharded over devices: only halos of keys and values travel.

Queries, keys and values are cut along spatial axes (and, at no cost, along batch or heads) over a device mesh. Each
rank needs the keys that its queries' windows reach beyond its own shard, per side and axis no more than that: they come
point to point from the ranks that own them, however many those are. Windows are computed in global coordinates, so the
result is exactly the rows of the whole problem for every window: causal, strided, dilated, even, on
uneven shards, with shards smaller than the window. Interior queries run while halos travel; the backward pass sends
halo gradients back and adds them in the order of ranks, so it is deterministic. See docs/distributed.md.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from natten._pieces import Box, attend_piece, intersection, needed_box, slices, split_queries, starts, window_axes
from natten._problem import Axis
from natten._settings import autocast, autocast_enabled
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
class _Plan:
    """What this rank computes, sends and receives: derived once, by the same reasoning on every rank."""

    axes: tuple[Axis, ...]
    ranks: tuple[int, ...]  # global ranks that share this rank's batch items and heads, in the order of the mesh
    owned: tuple[Box, ...]  # their boxes
    me: int  # this rank's index in `ranks`

    @property
    def own(self) -> Box:
        return self.owned[self.me]

    def _shared_keys(self, user: int, owner: int) -> Box | None:
        return intersection(needed_box(self.axes, self.owned[user]), self.owned[owner])

    @functools.cached_property
    def sends(self) -> list[tuple[int, Box]]:
        """Global ranks, and the box of this rank's keys that each needs."""
        boxes = [(rank, self._shared_keys(i, self.me)) for i, rank in enumerate(self.ranks) if i != self.me]
        return [(rank, box) for rank, box in boxes if box is not None]

    @functools.cached_property
    def receives(self) -> list[tuple[int, Box]]:
        """Global ranks, and the box of each one's keys that this rank needs."""
        boxes = [(rank, self._shared_keys(self.me, i)) for i, rank in enumerate(self.ranks) if i != self.me]
        return [(rank, box) for rank, box in boxes if box is not None]

    @functools.cached_property
    def pieces(self) -> list[Box]:
        """Disjoint boxes of queries that make up the shard; those that need no halo first."""
        inner, outer = split_queries(self.axes, self.own, self.own)
        assert bool(outer) == bool(self.receives), "halos are what outer queries need"
        return outer if inner is None else [inner, *outer]

    @functools.cached_property
    def keys(self) -> list[Box]:
        """The keys that each piece needs."""
        return [needed_box(self.axes, box) for box in self.pieces]

    @functools.cached_property
    def own_keys(self) -> list[Box]:
        """Those of them that this rank owns: never none, since every query attends itself."""
        boxes = [intersection(box, self.own) for box in self.keys]
        return [box for box in boxes if box is not None]

    @functools.cached_property
    def inner(self) -> int:
        """How many pieces need no halo: one or none."""
        return int(self.keys[0] == self.own_keys[0])

    def local(self, box: Box) -> tuple[slice, ...]:
        """Index of a box in this rank's shard."""
        return slices(box, starts(self.own))


def _hashable(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, Sequence) and not isinstance(argument, str) else argument


class _Call(NamedTuple):
    """The arguments that all ranks must give alike."""

    sharding: tuple[Sharding, ...]
    window: tuple[Any, ...]  # kernel_size, stride, dilation, is_causal
    extent: tuple[int, ...]
    shard_sizes: tuple[tuple[int, ...] | None, ...]

    def described(self, key: Tensor, value: Tensor) -> str:
        names = ("kernel_size", "stride", "dilation", "is_causal")
        window = ", ".join(f"{name} {value}" for name, value in zip(names, self.window, strict=True))
        shared = [] if "batch" in self.sharding else [f"batch {key.shape[0]}"]
        shared += [] if "heads" in self.sharding else [f"{key.shape[-2]} heads of keys"]
        needs_gradient = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        return ", ".join(
            (
                window,
                f"extent {self.extent}, sharding {self.sharding}, shard_sizes {self.shard_sizes}",
                *shared,
                f"head dims {key.shape[-1]} and {value.shape[-1]}, {key.dtype}, gradients {needs_gradient}",
            )
        )


@functools.lru_cache(maxsize=1024)
def _plan(mesh: DeviceMesh, me: int, call: _Call) -> _Plan:
    sharding, window, extent, sizes = call
    if not 1 <= len(extent) <= 3:
        raise ValueError(f"extent must hold one length for each of 1 to 3 axes; got {extent}")
    _check_sharding(mesh, sharding, len(extent))
    if len(sizes) != mesh.ndim:
        raise ValueError(f"shard_sizes must have one entry per mesh dimension, {mesh.ndim}; got {len(sizes)}")
    axes = window_axes(extent, *window)
    divided = [(dimension, axis) for dimension, axis in enumerate(sharding) if isinstance(axis, int)]
    bounds = {d: shard_bounds(axes[axis].extent, mesh.size(d), sizes[d]) for d, axis in divided}
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    ranks, owned = [], []
    for index in itertools.product(*(range(mesh.size(d)) for d, _ in divided)):
        place = list(coordinate)
        box = [(0, axis.extent) for axis in axes]
        for (d, axis), i in zip(divided, index, strict=True):
            place[d] = i
            box[axis] = bounds[d][i]
        ranks.append(int(mesh.mesh[tuple(place)]))
        owned.append(tuple(box))
    return _Plan(axes, tuple(ranks), tuple(owned), ranks.index(me))


class _Exchange:
    """One call's messages: keys and values before, their gradients after.

    Holds tensors only between a start and its wait, so that a graph that refers to it keeps no keys alive.
    """

    def __init__(self, plan: _Plan, group: dist.ProcessGroup, key: Tensor, value: Tensor) -> None:
        self.plan = plan
        self.group = group
        self.batch, self.dtype, self.device = key.shape[0], key.dtype, key.device
        self.key_tail, self.value_tail = key.shape[-2:], value.shape[-2:]  # heads and channels
        self._works: list[dist.Work] = []
        self._departing: list[Tensor] = []
        self._arriving: list[Tensor] = []

    def message(self, box: Box) -> Tensor:
        """Room for the keys and values of a box."""
        tokens = self.batch * math.prod(end - begin for begin, end in box)
        numbers = tokens * (self.key_tail.numel() + self.value_tail.numel())
        return torch.empty(numbers, dtype=self.dtype, device=self.device)

    def parts(self, message: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Keys and values in a message, as views."""
        grid = [end - begin for begin, end in box]
        key_shape = (self.batch, *grid, *self.key_tail)
        numbers = math.prod(key_shape)
        return message[:numbers].view(key_shape), message[numbers:].view(self.batch, *grid, *self.value_tail)

    def _start(self, outgoing: list[Tensor], to: Sequence[tuple[int, Box]], since: Sequence[tuple[int, Box]]) -> None:
        assert not self._works
        self._departing = outgoing  # alive until sent
        self._arriving = [self.message(box) for _, box in since]
        operations = [
            dist.P2POp(dist.isend, message, rank, self.group) for message, (rank, _) in zip(outgoing, to, strict=True)
        ]
        operations += [
            dist.P2POp(dist.irecv, message, rank, self.group)
            for message, (rank, _) in zip(self._arriving, since, strict=True)
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def start(self, key: Tensor, value: Tensor) -> None:
        """Sends what others need and asks for what this rank needs."""
        messages = []
        for _, box in self.plan.sends:
            messages.append(self.message(box))
            at = self.plan.local(box)
            for part, tensor in zip(self.parts(messages[-1], box), (key, value), strict=True):
                part.copy_(tensor.detach()[at])
        self._start(messages, self.plan.sends, self.plan.receives)

    def start_gradients(self, messages: list[Tensor]) -> None:
        """Sends the received halos' gradients back and asks for those of what was sent."""
        self._start(messages, self.plan.receives, self.plan.sends)

    def wait(self) -> list[Tensor]:
        """The messages that arrived, in the order of ranks. NCCL: the stream waits for them, not the host."""
        for work in self._works:
            work.wait()
        arrived, self._arriving, self._departing, self._works = self._arriving, [], [], []
        return arrived


class _CutQueries(torch.autograd.Function):
    """The queries of every piece; backward writes each gradient once, where slices would add whole shards of zeros."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, query: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.shape = plan, query.shape
        return tuple(query[plan.local(box)] for box in plan.pieces)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _joined(ctx.plan, gradients, ctx.shape)


class _JoinPieces(torch.autograd.Function):
    """The shard's rows from every piece's."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, shape: Sequence[int], *parts: Tensor) -> Tensor:
        ctx.plan = plan
        return _joined(plan, parts, shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient[ctx.plan.local(box)] for box in ctx.plan.pieces)


def _joined(plan: _Plan, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    whole = parts[0].new_empty(shape)
    for box, part in zip(plan.pieces, parts, strict=True):
        whole[plan.local(box)] = part
    return whole


class _OwnKeys(torch.autograd.Function):
    """Own keys and values of every piece; backward adds the pieces' gradients, then those that other ranks send."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.shapes = exchange, (key.shape, value.shape)
        at = [exchange.plan.local(box) for box in exchange.plan.own_keys]
        return tuple(tensor[index] for index in at for tensor in (key, value))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        exchange: _Exchange = ctx.exchange
        plan = exchange.plan
        if not plan.receives:  # `_WithHalos`, which starts otherwise, has no node here
            exchange.start_gradients([])
        grad_key, grad_value = (gradients[0].new_zeros(shape) for shape in ctx.shapes)
        for box, part_key, part_value in zip(plan.own_keys, gradients[::2], gradients[1::2], strict=True):
            grad_key[plan.local(box)] += part_key
            grad_value[plan.local(box)] += part_value
        for (_, box), message in zip(plan.sends, exchange.wait(), strict=True):
            part_key, part_value = exchange.parts(message, box)
            grad_key[plan.local(box)] += part_key
            grad_value[plan.local(box)] += part_value
        return None, grad_key, grad_value


class _WithHalos(torch.autograd.Function):
    """Keys and values of every outer piece, from own ones and from messages; backward sends the halos' gradients home.

    Takes and returns `key, value` of each outer piece in turn.
    """

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, messages: list[Tensor], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        plan = exchange.plan
        halos = [(box, exchange.parts(message, box)) for (_, box), message in zip(plan.receives, messages, strict=True)]
        results: list[Tensor] = []
        for i, (keys, own_keys) in enumerate(zip(plan.keys[plan.inner :], plan.own_keys[plan.inner :], strict=True)):
            grid = [end - begin for begin, end in keys]
            for which, part in enumerate(own[2 * i : 2 * i + 2]):
                whole = part.new_empty((part.shape[0], *grid, *part.shape[-2:]))
                whole[slices(own_keys, starts(keys))] = part
                for box, halo in halos:
                    common = intersection(box, keys)
                    if common is not None:
                        whole[slices(common, starts(keys))] = halo[which][slices(common, starts(box))]
                results.append(whole)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange: _Exchange = ctx.exchange
        plan = exchange.plan
        messages = []
        for _, box in plan.receives:
            messages.append(exchange.message(box).zero_())
            halo = exchange.parts(messages[-1], box)
            for i, keys in enumerate(plan.keys[plan.inner :]):
                common = intersection(box, keys)
                if common is not None:
                    for which in range(2):
                        source = gradients[2 * i + which][slices(common, starts(keys))]
                        halo[which][slices(common, starts(box))] += source
        exchange.start_gradients(messages)
        own = []
        for i, (keys, own_keys) in enumerate(zip(plan.keys[plan.inner :], plan.own_keys[plan.inner :], strict=True)):
            own += [gradient[slices(own_keys, starts(keys))] for gradient in gradients[2 * i : 2 * i + 2]]
        return None, None, *own


def _agree(group: dist.ProcessGroup, description: str, failure: str | None, device: torch.device) -> None:
    """Raises the same `ValueError` on every rank of the group when one of them failed, or they were not called alike.

    Two small numbers per rank travel; words only when something is wrong.
    """
    digest = int.from_bytes(hashlib.blake2b(description.encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([digest, 0 if failure is None else 1], dtype=torch.int64, device=device)
    ranks = dist.get_process_group_ranks(group)
    everyone = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).cpu()
    if bool((table[:, 1] == 0).all()) and bool((table[:, 0] == table[0, 0]).all()):
        return
    reports: list[Any] = [None] * len(ranks)
    dist.all_gather_object(reports, (description, failure), group=group)
    failed: dict[str, list[int]] = {}
    for rank, (_, report) in zip(ranks, reports, strict=True):
        if report is not None:
            failed.setdefault(report, []).append(rank)
    if failed:
        raise ValueError(
            "; ".join(f"{report} (on rank {', '.join(map(str, where))})" for report, where in failed.items())
        )
    calls = {called: rank for rank, (called, _) in zip(reversed(ranks), reversed(reports), strict=True)}
    (called, rank), (other, where), *_ = sorted(calls.items(), key=lambda item: item[1])
    raise ValueError(f"ranks must call alike; rank {rank} called with {called}, rank {where} with {other}")


@functools.lru_cache(maxsize=64)
def _group(world: dist.ProcessGroup, mesh: DeviceMesh, device: torch.device) -> dist.ProcessGroup:
    """A process group of all of the mesh's ranks, connected: called by all of them for the first call's sake.

    `world` is the default group, which a program may destroy and make anew.
    """
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif mesh.size() == world.size():
        group = world
    else:
        group = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    # NCCL connects at the first operation and needs every rank for it, also those that have nothing to send.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def _sharding_of(placements: Sequence[Any], rank: int) -> tuple[Sharding, ...]:
    """What each mesh dimension divides, from a DTensor's placements on `[batch, axes..., heads, channels]`."""
    result: list[Sharding] = []
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            result.append(None)
        elif type(placement) is Shard and placement.dim <= rank:  # no subclass: those shard in another order
            result.append("batch" if placement.dim == 0 else placement.dim - 1)
        elif type(placement) is Shard and placement.dim == rank + 1:
            result.append("heads")
        else:
            raise ValueError(
                f"placements must be Replicate, or Shard of batch, axes or heads; got {placement} on "
                f"mesh dimension {dimension}"
            )
    return tuple(result)


def _check_sharding(mesh: DeviceMesh, sharding: tuple[Sharding, ...], rank: int) -> None:
    if len(sharding) != mesh.ndim:
        raise ValueError(f"sharding must name what each of the mesh's {mesh.ndim} dimensions divides; got {sharding}")
    for what in sharding:
        if not (what in ("batch", "heads", None) or (isinstance(what, int) and 0 <= what < rank)):
            raise ValueError(f'sharding must hold axes 0 to {rank - 1}, "batch", "heads" or None; got {what!r}')
    named = [what for what in sharding if isinstance(what, int)]
    if len(set(named)) != len(named):
        raise ValueError(f"sharding must divide each axis over one mesh dimension only; got {sharding}")


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
    if any(isinstance(tensor, DTensor) for tensor in (query, key, value)):
        if not (mesh is None and sharding is None and extent is None and shard_sizes is None):
            raise ValueError("mesh, sharding, extent and shard_sizes must not be given with DTensors, which know them")
        placed = _Placed.of(query, key, value)
        mesh, sharding, extent = placed.mesh, placed.sharding, placed.shape[1:-2]
        query, key, value = (tensor.to_local() for tensor in (query, key, value))  # type: ignore[attr-defined]
        additional_keys, additional_values = (placed.local_context(t) for t in (additional_keys, additional_values))
    if mesh is None or sharding is None or extent is None:
        raise ValueError("mesh, sharding and extent must be given with plain tensors")
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank, {dist.get_rank()}, must be part of mesh {mesh}")
    if autocast_enabled(query):  # before keys travel
        query, key, value, additional_keys, additional_values = autocast(
            query, key, value, additional_keys, additional_values
        )
    call = _Call(
        tuple(sharding),
        tuple(_hashable(part) for part in (kernel_size, stride, dilation, is_causal)),
        tuple(extent),
        (None,) * mesh.ndim if shard_sizes is None else tuple(_hashable(size) for size in shard_sizes),
    )
    group = _group(dist.group.WORLD, mesh, query.device)
    plan, failure = None, None
    try:
        plan = _plan(mesh, dist.get_rank(), call)
        _check_shards(plan, query, key, value, additional_keys, additional_values)
    except (ValueError, TypeError) as error:
        if not validate:
            raise
        failure = str(error)
    if validate:
        _agree(group, failure or call.described(key, value), failure, query.device)
    assert plan is not None
    extra = {"additional_keys": additional_keys, "additional_values": additional_values}
    out, lse = _attend(plan, group, query, key, value, scale=scale, kernel=kernel, **extra)
    if placed is not None:
        shape = placed.shape[:-1]
        out, lse = placed.place(out, (*shape, out.shape[-1])), placed.place(lse, shape)
    return (out, lse) if return_lse else out


def _check_shards(
    plan: _Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> None:
    """What the exchange relies on; the kernels' own rules are checked where they are called."""
    expected = tuple(end - begin for begin, end in plan.own)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != len(expected) + 3 or tuple(tensor.shape[1:-2]) != expected:
            raise ValueError(f"{name}'s shard must have the grid {expected}; got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device or tensor.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} must have query's batch size, dtype and device; got {tuple(tensor.shape)}, {tensor.dtype} on "
                f"{tensor.device} and {tuple(query.shape)}, {query.dtype} on {query.device}"
            )
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2] != 0 or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "key and value must share the heads, whose number divides query's, and query and key the head dim; got "
            f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    for name, extra, like in (
        ("additional_keys", additional_keys, key),
        ("additional_values", additional_values, value),
    ):
        if extra is not None and (
            extra.dim() != 4 or (extra.shape[0], *extra.shape[2:]) != (like.shape[0], *like.shape[-2:])
        ):
            raise ValueError(
                f"{name}'s shard must have shape [{like.shape[0]}, tokens, {like.shape[-2]}, {like.shape[-1]}]; got "
                f"{tuple(extra.shape)}"
            )


def _attend(
    plan: _Plan, group: dist.ProcessGroup, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    exchange = _Exchange(plan, group, key, value)
    # Made first, so that its backward runs last: halo gradients travel while inner queries are differentiated.
    keys = _OwnKeys.apply(exchange, key, value)  # type: ignore[no-untyped-call]
    queries = (query,)
    if len(plan.pieces) > 1:
        queries = _CutQueries.apply(plan, query)  # type: ignore[no-untyped-call]

    def attend(piece: int) -> tuple[Tensor, Tensor]:
        tensors = (queries[piece], keys[2 * piece], keys[2 * piece + 1])
        return attend_piece(plan.axes, *tensors, plan.pieces[piece], plan.keys[piece], **arguments)

    exchange.start(key, value)
    try:
        results = [attend(piece) for piece in range(plan.inner)]
    finally:  # others count on what was sent, whatever happens here
        messages = exchange.wait()
    if plan.receives:
        first = 2 * plan.inner
        keys = (*keys[:first], *_WithHalos.apply(exchange, messages, *keys[first:]))  # type: ignore[no-untyped-call]
    results += [attend(piece) for piece in range(plan.inner, len(plan.pieces))]
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    rows = query.shape[:-1]
    out: Tensor = _JoinPieces.apply(plan, (*rows, value.shape[-1]), *outs)  # type: ignore[no-untyped-call]
    lse: Tensor = _JoinPieces.apply(plan, rows, *lses)  # type: ignore[no-untyped-call]
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
                not isinstance(query, DTensor)
                or not isinstance(tensor, DTensor)
                or tensor.device_mesh != query.device_mesh
                or tensor.placements != query.placements
            ):
                raise ValueError(f"query and {name} must both be DTensors, on one mesh with the same placements")
        sharding = _sharding_of(query.placements, query.dim() - 3)
        return _Placed(query.device_mesh, tuple(query.placements), sharding, tuple(query.shape))

    def local_context(self, tensor: Any) -> Any:
        """Additional keys or values: their gradient is a sum over the ranks that share the grid."""
        if not isinstance(tensor, DTensor):
            return tensor
        gradients = [
            Partial() if isinstance(what, int) and isinstance(placement, Replicate) else placement
            for what, placement in zip(self.sharding, tensor.placements, strict=True)
        ]
        return tensor.to_local(grad_placements=gradients)

    def place(self, local: Tensor, shape: Sequence[int]) -> Tensor:
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
        needed, own = (math.prod(end - begin for begin, end in part) for part in (needed_box(axes, box), box))
        result.append(
            (needed - own) * bytes_per_token
        )  # every query attends itself: the shard is part of what it needs
    return result
