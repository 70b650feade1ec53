"""Sharded attention against one process, over the whole space of windows, with 2, 3 and 4 gloo processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import AxisCase, Case, axis_cases
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from worker_pool import WorkerPool

import natten
from natten import distributed

WINDOW = ("kernel_size", "stride", "dilation", "is_causal")


@dataclass(frozen=True)
class Sharded:
    """A problem and how it is cut."""

    case: Case
    mesh_shape: tuple[int, ...]
    sharding: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]


@st.composite
def sharded_cases(draw: st.DrawFn, processes: int) -> Sharded:
    shapes = [(processes,)] + ([(2, 2)] if processes == 4 else [])
    mesh_shape = draw(st.sampled_from(shapes))
    rank = draw(st.integers(len(mesh_shape), 3))
    sharding = tuple(draw(st.permutations(range(rank)))[: len(mesh_shape)])
    axes: list[AxisCase] = []
    for axis in range(rank):
        shards = mesh_shape[sharding.index(axis)] if axis in sharding else 1
        longest = {1: 40, 2: 14, 3: 8}[rank]
        axes.append(draw(axis_cases(longest, pieces=False).filter(lambda a, n=shards: a.extent >= n)))
    sizes = []
    for shards, axis in zip(mesh_shape, sharding, strict=True):
        cuts = (
            draw(st.sets(st.integers(1, axes[axis].extent - 1), min_size=shards - 1, max_size=shards - 1))
            if shards > 1
            else set()
        )
        ends = [0, *sorted(cuts), axes[axis].extent]
        sizes.append(tuple(b - a for a, b in itertools.pairwise(ends)))
    heads_kv = draw(st.sampled_from((1, 2)))
    case = Case(
        tuple(axes),
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * draw(st.integers(1, 2)),
        heads_kv=heads_kv,
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        additional=draw(st.sampled_from((0, 0, 3))),
        seed=draw(st.integers(0, 2**20)),
    )
    return Sharded(case, mesh_shape, sharding, tuple(sizes))


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape)
    return _meshes[shape]


def shard_index(mesh: DeviceMesh, problem: Sharded) -> tuple[slice, ...]:
    """This rank's part of `[batch, axes..., ...]`."""
    index = [slice(None)] * (problem.case.rank + 1)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for place, axis, sizes in zip(coordinate, problem.sharding, problem.sizes, strict=True):
        begin = sum(sizes[:place])
        index[1 + axis] = slice(begin, begin + sizes[place])
    return tuple(index)


def run_sharded(problem: Sharded) -> list[Tensor]:
    """In a worker: differences from one process of out, lse and every gradient, over this rank's shard."""
    case, mesh = problem.case, mesh_of(problem.mesh_shape)
    whole = case.tensors()
    whole_result = _attention(case)(
        whole.query, whole.key, whole.value, **case.window_arguments,
        additional_keys=whole.additional_keys, additional_values=whole.additional_values, return_lse=True,
    )  # fmt: skip
    expected = torch.autograd.grad(whole_result, whole.differentiable(), (whole.grad_out, whole.grad_lse))

    at = shard_index(mesh, problem)
    local = [t.detach()[at].clone().requires_grad_() for t in (whole.query, whole.key, whole.value)]
    extra = [t.detach().clone().requires_grad_() for t in whole.differentiable()[3:]]
    window = {name: case.window_arguments[name] for name in WINDOW}
    out, lse = distributed.neighborhood_attention(
        *local, **window, additional_keys=extra[0] if extra else None, additional_values=extra[1] if extra else None,
        mesh=mesh, sharding=problem.sharding, extent=case.q_grid, shard_sizes=problem.sizes, return_lse=True,
    )  # fmt: skip
    grads = list(torch.autograd.grad((out, lse), [*local, *extra], (whole.grad_out[at], whole.grad_lse[at])))
    for i in range(3, len(grads)):  # replicated inputs
        torch.distributed.all_reduce(grads[i])
    pairs = list(zip((out, lse), (r[at] for r in whole_result), strict=True))
    pairs += [(g, e[at]) for g, e in zip(grads[:3], expected[:3], strict=True)]
    pairs += list(zip(grads[3:], expected[3:], strict=True))
    return [((a - b).norm() / b.norm().clamp_min(1.0)).detach() for a, b in pairs]


def _attention(case: Case) -> Any:
    return {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[case.rank]


@pytest.fixture(scope="module", params=[2, 3, 4])
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    workers = WorkerPool(request.param)
    yield workers
    workers.close()


def results(pool: WorkerPool, function: Any, argument: Any = None) -> list[Any]:
    values = pool.run(function, argument)
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values


def test_equal_to_one_process(pool: WorkerPool) -> None:
    @settings(max_examples=60)
    @given(problem=sharded_cases(pool.size))
    def check(problem: Sharded) -> None:
        for differences in results(pool, run_sharded, problem):
            assert max(differences) < 1e-12

    check()


def window_longer_than_shards(size: int) -> Sharded:
    axis = AxisCase(4 * size - 1, 1, 1, False, 4 * size, 0, 4 * size, 0, 4 * size)
    return Sharded(Case((axis,)), (size,), (0,), ((4,) * size,))


def test_halo_longer_than_a_shard(pool: WorkerPool) -> None:
    problem = window_longer_than_shards(pool.size)
    assert all(max(d) < 1e-12 for d in results(pool, run_sharded, problem))


def check_determinism(problem: Sharded) -> bool:
    """In a worker: gradients repeat bit for bit."""
    mesh = mesh_of(problem.mesh_shape)
    case = problem.case
    whole = case.tensors(torch.float32)
    at = shard_index(mesh, problem)
    seen = []
    for _ in range(4):
        local = [t.detach()[at].clone().requires_grad_() for t in (whole.query, whole.key, whole.value)]
        window = {name: case.window_arguments[name] for name in WINDOW}
        out = distributed.neighborhood_attention(*local, **window, mesh=mesh, sharding=(0,), extent=case.q_grid)
        assert isinstance(out, Tensor)
        seen.append(torch.autograd.grad(out, local, whole.grad_out[at]))
    return all(torch.equal(a, b) for grads in seen[1:] for a, b in zip(seen[0], grads, strict=True))


def test_gradients_are_deterministic(pool: WorkerPool) -> None:
    assert all(results(pool, check_determinism, window_longer_than_shards(pool.size)))


def run_dtensor(_: None) -> list[float]:
    """In a worker: DTensors in and out, uneven shards as DTensor cuts them, context replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = torch.distributed.get_world_size()
    mesh = mesh_of((world,))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3 * world - 1, 6, 2, 4, dtype=torch.float64) for _ in range(3))
    context = [torch.randn(2, 3, 2, 4, dtype=torch.float64) for _ in range(2)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *context)]
    expected = natten.na2d(*leaves[:3], kernel_size=(5, 3), is_causal=(False, True), additional_keys=leaves[3],
                           additional_values=leaves[4])  # fmt: skip
    expected.square().sum().backward()
    placed = [distribute_tensor(t, mesh, [Shard(1)]).requires_grad_() for t in (q, k, v)]
    shared = [distribute_tensor(t, mesh, [Replicate()]).requires_grad_() for t in context]
    out = distributed.neighborhood_attention(*placed, (5, 3), is_causal=(False, True), additional_keys=shared[0],
                                             additional_values=shared[1])  # fmt: skip
    assert out.shape == q.shape
    assert out.placements == (Shard(1),)
    out.square().sum().backward()
    found = [out.full_tensor(), *(t.grad.full_tensor() for t in (*placed, *shared))]
    return [float((a - b).abs().max()) for a, b in zip(found, [expected, *(t.grad for t in leaves)], strict=True)]


def test_dtensors(pool: WorkerPool) -> None:
    for differences in results(pool, run_dtensor):
        assert max(differences) < 1e-12


def illegal_call(what: str) -> Exception | None:
    """In a worker: what this rank raises when something is wrong on some rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = mesh_of((world,))
    length, kernel_size, extent, sharding = 4, 3, 4 * world, (0,)
    if what == "window":
        kernel_size = 4 * world + 1
    elif what == "shard" and rank == world - 1:
        length = 3
    elif what == "differs" and rank == world - 1:
        kernel_size = 5
    elif what == "empty":
        extent, length, kernel_size = world - 1, 1, 1
    elif what == "sharding":
        sharding = (1,)
    x = torch.zeros(1, length, 1, 4)
    try:
        distributed.neighborhood_attention(x, x, x, kernel_size, mesh=mesh, sharding=sharding, extent=(extent,))
    except Exception as error:
        return type(error)(str(error))
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("window", "kernel_size \\* dilation must not exceed"),
        ("shard", "query's shard must have the grid"),
        ("differs", "ranks must call alike"),
        ("empty", "every shard must hold at least one position"),
        ("sharding", "sharding must hold axes 0 to 0"),
    ],
)
def test_illegal_calls_raise_the_same_everywhere(pool: WorkerPool, what: str, message: str) -> None:
    raised = pool.run(illegal_call, what)
    assert all(isinstance(error, ValueError) for error in raised), raised
    assert len({str(error) for error in raised}) == 1
    with pytest.raises(ValueError, match=message):
        raise raised[0]
    assert pool.run(illegal_call, "nothing") == [None] * pool.size  # and the group still works


def count_bytes(problem: Sharded) -> int:
    """In a worker: bytes of the halos that this rank receives."""
    case, mesh = problem.case, mesh_of(problem.mesh_shape)
    whole = case.tensors()
    at = shard_index(mesh, problem)
    received = 0
    original = distributed._Exchange.wait

    def wait(self: Any) -> list[Tensor]:
        nonlocal received
        messages = original(self)
        received += sum(m.numel() * m.element_size() for m in messages)
        return messages

    distributed._Exchange.wait = wait  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            window = {name: case.window_arguments[name] for name in WINDOW}
            local = [t.detach()[at] for t in (whole.query, whole.key, whole.value)]
            distributed.neighborhood_attention(
                *local, **window, mesh=mesh, sharding=problem.sharding, extent=case.q_grid, shard_sizes=problem.sizes
            )
    finally:
        distributed._Exchange.wait = original  # type: ignore[method-assign]
    return received


def test_only_what_windows_need_travels(pool: WorkerPool) -> None:
    """The messages' bytes are the formula's, and the formula counts keys outside the shard that some window holds."""
    length = 6 * pool.size
    axis = AxisCase(5, 1, 1, False, length, 0, length, 0, length)
    causal = replace(axis, kernel_size=4, is_causal=True, dilation=2)
    for case in (Case((axis,)), Case((causal,)), Case((axis, causal), head_dim=3)):
        problem = Sharded(case, (pool.size,), (0,), ((6,) * pool.size,))
        window = {name: case.window_arguments[name] for name in WINDOW}
        token = case.batch * case.heads_kv * (case.head_dim + case.head_dim_v) * 8
        shards = (pool.size, *(1,) * (case.rank - 1))
        formula = distributed.halo_bytes(case.q_grid, **window, shards=shards, bytes_per_token=token)
        assert results(pool, count_bytes, problem) == formula
        first = case.axes[0]
        table = first.window().members(0, length, length)
        other = math.prod(a.extent for a in case.axes[1:])
        for rank, received in enumerate(formula):
            seen = table[6 * rank : 6 * rank + 6].any(0)
            seen[6 * rank : 6 * rank + 6] = False
            assert received == int(seen.sum()) * other * token


def test_shard_bounds_cut_as_dtensor_does() -> None:
    assert distributed.shard_bounds(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert distributed.shard_bounds(7, 3, (1, 1, 5)) == [(0, 1), (1, 2), (2, 7)]
    with pytest.raises(ValueError, match="add up to the extent"):
        distributed.shard_bounds(7, 3, (1, 1, 4))
    with pytest.raises(ValueError, match="at least one position"):
        distributed.shard_bounds(4, 3)
