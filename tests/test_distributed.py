"""Sharded attention against one process, over the whole space of windows, with 2, 3 and 4 gloo processes."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
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


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    workers = WorkerPool(4)
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


@dataclass(frozen=True)
class Setting:
    """A way to call: what the mesh divides, and how the call is wrapped."""

    mesh_shape: tuple[int, ...]
    sharding: tuple[Any, ...] = (0,)
    wrapped: str = ""
    differentiable: tuple[int, ...] = (0, 1, 2)
    is_causal: bool = False


def part_of(tensor: Tensor, mesh: DeviceMesh, sharding: tuple[Any, ...]) -> Tensor:
    """This rank's shard of `[batch, axes..., heads, ...]` of rank 2, equal shards."""
    dimensions = {"batch": 0, 0: 1, 1: 2, "heads": 3}
    for d, what in enumerate(sharding):
        if what is not None:
            tensor = tensor.chunk(mesh.size(d), dimensions[what])[mesh.get_local_rank(d)]
    return tensor.detach().clone()


def run_setting(setting: Setting) -> list[float]:
    """In a worker: differences from one process, of both of two calls on the same tensors and of every gradient."""
    mesh = mesh_of(setting.mesh_shape)
    torch.manual_seed(0)
    shapes = ((4, 8, 8, 4, 6), (4, 8, 8, 4, 6), (4, 8, 8, 4, 5))
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = [torch.randn(4, 8, 8, 4, 5, dtype=torch.float64), torch.randn(4, 8, 8, 4, dtype=torch.float64)]
    windows: tuple[dict[str, Any], ...] = (
        {"kernel_size": (5, 3), "is_causal": (setting.is_causal, False)},
        {"kernel_size": (2, 4), "dilation": (3, 1)},
    )
    expected = [natten.na2d(*whole, **window, return_lse=True) for window in windows]
    expected_loss = sum((a * b).sum() for result in expected for a, b in zip(result, weights, strict=True))
    wanted = torch.autograd.grad(expected_loss, [whole[i] for i in setting.differentiable])

    local = [part_of(t, mesh, setting.sharding) for t in whole]
    for i in setting.differentiable:
        local[i].requires_grad_()
    local_weights = [part_of(t, mesh, setting.sharding) for t in weights]

    def loss(*tensors: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        query, key, value = (1 * t for t in tensors)
        results = [
            distributed.neighborhood_attention(
                query, key, value, **window, mesh=mesh, sharding=setting.sharding, extent=(8, 8), return_lse=True
            )
            for window in windows
        ]
        return sum((a * b).sum() for result in results for a, b in zip(result, local_weights, strict=True)), results

    if setting.wrapped == "checkpoint":
        total, found = torch.utils.checkpoint.checkpoint(loss, *local, use_reentrant=False)
    elif setting.wrapped == "compile":
        total, found = torch.compile(loss, backend="aot_eager")(*local)
    else:
        total, found = loss(*local)
    inputs = [local[i] for i in setting.differentiable]
    differences = []
    for _ in range(2):  # the graph serves twice
        grads = torch.autograd.grad(total, inputs, retain_graph=setting.wrapped != "checkpoint")
        for grad, want in zip(grads, wanted, strict=True):
            differences.append(float((grad - part_of(want, mesh, setting.sharding)).abs().max()))
        if setting.wrapped == "checkpoint":
            break
    for result, want_result in zip(found, expected, strict=True):
        for a, b in zip(result, want_result, strict=True):
            differences.append(float((a - part_of(b, mesh, setting.sharding)).abs().max()))
    return differences


@pytest.mark.parametrize("sharding", ["batch", "heads", None, 1])
def test_what_one_dimension_divides(four: WorkerPool, sharding: Any) -> None:
    for differences in results(four, run_setting, Setting((4,), (sharding,))):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("sharding", [(1, 0), ("heads", 1), (0, "batch"), (None, 0), (0, None), ("batch", "heads")])
def test_what_two_dimensions_divide(four: WorkerPool, sharding: tuple[Any, ...]) -> None:
    for differences in results(four, run_setting, Setting((2, 2), sharding)):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("wrapped", ["", "checkpoint", "compile"])
@pytest.mark.parametrize("is_causal", [False, True])  # causal: the first rank receives nothing, the last sends nothing
def test_how_a_call_is_wrapped(four: WorkerPool, wrapped: str, is_causal: bool) -> None:
    for differences in results(four, run_setting, Setting((4,), wrapped=wrapped, is_causal=is_causal)):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("differentiable", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(four: WorkerPool, differentiable: tuple[int, ...]) -> None:
    for differences in results(four, run_setting, Setting((2, 2), (0, 1), differentiable=differentiable)):
        assert max(differences) < 1e-12


def kept_alive(_: None) -> list[int]:
    """In a worker: tensors on keys' or values' memory that outlive the forward pass of a checkpointed block."""
    world = torch.distributed.get_world_size()
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    seen: list[int] = []

    def block(x: Tensor) -> Tensor:
        key, value = 2 * x, 3 * x
        seen.extend(t.untyped_storage().data_ptr() for t in (key, value))
        out = distributed.neighborhood_attention(
            x, key, value, 3, mesh=mesh_of((world,)), sharding=(0,), extent=(4 * world,)
        )
        assert isinstance(out, Tensor)
        return out.sin()

    out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    alive = [t.untyped_storage().data_ptr() for t in tensors if t is not x and t is not out and t.device.type == "cpu"]
    kept = [pointer for pointer in seen if pointer in alive]
    out.sum().backward()
    return kept


def test_checkpointing_frees_keys(pool: WorkerPool) -> None:
    assert results(pool, kept_alive) == [[]] * pool.size


def run_autocast(_: None) -> tuple[torch.dtype, set[torch.dtype], float]:
    """In a worker: dtypes of the output and of the halos under autocast, and the difference from one process."""
    world = torch.distributed.get_world_size()
    mesh = mesh_of((world,))
    torch.manual_seed(0)
    whole = [torch.randn(1, 4 * world, 2, 8) for _ in range(3)]
    travelled: set[torch.dtype] = set()
    original = distributed._Exchange.wait

    def wait(self: Any) -> list[Tensor]:
        messages = original(self)
        travelled.update(m.dtype for m in messages)
        return messages

    distributed._Exchange.wait = wait  # type: ignore[method-assign]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            expected = natten.na1d(*whole, 3)
            out = distributed.neighborhood_attention(
                *(part_of_line(t, mesh) for t in whole), 3, mesh=mesh, sharding=(0,), extent=(4 * world,)
            )
    finally:
        distributed._Exchange.wait = original  # type: ignore[method-assign]
    assert isinstance(out, Tensor)
    return out.dtype, travelled, float((out - part_of_line(expected, mesh)).abs().max())


def second_derivative(_: None) -> str:
    """In a worker: what asking for a second derivative says."""
    world = torch.distributed.get_world_size()
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = distributed.neighborhood_attention(x, x, x, 3, mesh=mesh_of((world,)), sharding=(0,), extent=(4 * world,))
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_second_derivatives_are_refused(pool: WorkerPool) -> None:
    for message in results(pool, second_derivative):
        assert "differentiate twice" in message


def part_of_line(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return tensor.chunk(mesh.size(), 1)[mesh.get_local_rank()]


def test_autocast_before_keys_travel(pool: WorkerPool) -> None:
    for dtype, travelled, difference in results(pool, run_autocast):
        assert dtype == torch.bfloat16
        assert travelled == {torch.bfloat16}
        assert difference < 2e-2


def run_layer(_: None) -> tuple[list[float], list[float]]:
    """In a worker: losses of some steps of a small network, on one process and sharded."""
    world = torch.distributed.get_world_size()
    mesh = mesh_of((world,))
    extent = (3 * world - 1, 5)  # uneven
    begin, end = distributed.shard_bounds(extent[0], world)[mesh.get_local_rank()]
    curves: list[list[float]] = []
    for place in ({}, {"mesh": mesh, "sharding": (0,), "extent": extent}):
        torch.manual_seed(0)
        layers = [
            natten.NeighborhoodAttention2D(8, 2, kernel_size, dilation=dilation, is_causal=is_causal, **place)
            for kernel_size, dilation, is_causal in ((3, 1, False), ((2, 3), (2, 1), (True, False)))
        ]
        network = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1]).double()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        x, target = (torch.randn(2, *extent, 8, dtype=torch.float64) for _ in range(2))
        losses = []
        for _ in range(5):
            rows = slice(begin, end) if place else slice(None)
            loss = (network(x[:, rows]) - target[:, rows]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            total = loss.detach()
            if place:
                torch.distributed.all_reduce(total)
                for parameter in network.parameters():
                    torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
            losses.append(float(total))
        curves.append(losses)
    return curves[0], curves[1]


def test_layers_learn_alike_on_shards(pool: WorkerPool) -> None:
    for alone, sharded in results(pool, run_layer):
        assert alone[-1] < 0.95 * alone[0]
        assert sharded == pytest.approx(alone, rel=1e-10)


def layer_as_it_is_used(_: None) -> list[float]:
    """In a worker: differences of a sharded layer from itself compiled, copied and saved."""
    world = torch.distributed.get_world_size()
    layer = natten.NeighborhoodAttention1D(4, 2, 3, mesh=mesh_of((world,)), sharding=(0,), extent=(4 * world,))
    assert f"extent=({4 * world},)" in repr(layer)
    x = torch.randn(1, 4, 4)
    expected = layer(x)
    plain = natten.NeighborhoodAttention1D(4, 2, 3)
    plain.load_state_dict(layer.state_dict())
    others = [torch.compile(layer, backend="eager"), copy.deepcopy(layer)]
    return [float((other(x) - expected).abs().max()) for other in others]


def test_layers_compile_and_copy(pool: WorkerPool) -> None:
    for differences in results(pool, layer_as_it_is_used):
        assert max(differences) < 1e-6


def test_layers_refuse_half_a_place() -> None:
    with pytest.raises(ValueError, match="given together"):
        natten.NeighborhoodAttention1D(4, 2, 3, extent=(8,))
    with pytest.raises(ValueError, match="must not hold heads"):
        natten.NeighborhoodAttention1D(4, 2, 3, mesh=object(), sharding=("heads",), extent=(8,))  # type: ignore[arg-type]


def run_submesh(_: None) -> float | str:
    """In a worker: attention over a two-dimensional mesh of two of the ranks, only these call."""
    key = (-1,)
    if key not in _meshes:
        _meshes[key] = DeviceMesh("cpu", [[0], [torch.distributed.get_world_size() - 1]])
    mesh = _meshes[key]
    torch.manual_seed(0)
    whole = torch.randn(1, 8, 6, 1, 4, dtype=torch.float64, requires_grad=True)
    arguments: dict[str, Any] = {"mesh": mesh, "sharding": (0, 1), "extent": (8, 6), "validate": False}
    if mesh.get_coordinate() is None:
        try:
            distributed.neighborhood_attention(whole, whole, whole, 3, **arguments)
        except ValueError as error:
            return str(error)
        raise AssertionError("a rank outside of the mesh was let in")
    natten.na2d(whole, whole, whole, 3).sin().sum().backward()
    assert whole.grad is not None
    expected = whole.grad.chunk(2, 1)[mesh.get_local_rank(0)]
    local = whole.detach().chunk(2, 1)[mesh.get_local_rank(0)].clone().requires_grad_()
    out = distributed.neighborhood_attention(local, local, local, 3, **arguments)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out.sin().sum(), local)
    return float((grad - expected).abs().max())


def test_a_mesh_of_some_ranks(four: WorkerPool) -> None:
    first, *others, last = results(four, run_submesh)
    assert first < 1e-12
    assert last < 1e-12
    assert all("must be part of mesh" in str(other) for other in others)


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
    batch = 2 if what == "batch" and rank == 0 else 1
    x, context = torch.zeros(batch, length, 1, 4), torch.zeros(batch, 3, 2 if what == "context" else 1, 4)
    extra: dict[str, Any] = {"additional_keys": context, "additional_values": context}
    key = torch.zeros(()) if what == "dimensions" and rank == 0 else x
    if what == "kernel":
        extra["kernel"] = "naive"
    try:
        distributed.neighborhood_attention(
            x, key, x, kernel_size, mesh=mesh, sharding=sharding, extent=(extent,), **extra
        )
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
        ("dimensions", "key's shard must have the grid"),
        ("batch", "ranks must call alike; rank 0 called with .*batch 2.*, rank 1 with .*batch 1"),
        ("context", "additional_keys's shard must have shape"),
        ("kernel", "naive"),
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
