"""How kernels live inside torch: streams, graphs, devices, autocast, compile, determinism, memory and refusals."""

from __future__ import annotations

import pytest
import torch
from checks import attend, axis, check_attention, poisoned, refusal, results, tolerance_of
from ledger import Ledger
from problems import Case, Inputs
from torch import Tensor

import natten
from natten.dispatch import FAMILIES, Kernel, Operation

PLANE = Case((axis(37, 9), axis(29, 5)), batch=2, heads=4, heads_kv=2, head_dim=64, head_dim_v=64)
LONG = Case((axis(2000, 255),), batch=2, heads=4, head_dim=64, head_dim_v=64)


def dtype_of(kernel: Kernel) -> torch.dtype:
    """The half type where the kernel takes it."""
    return torch.float16 if torch.float16 in FAMILIES[kernel].dtypes else torch.float32


def forward(inputs: Inputs, case: Case, kernel: Kernel | None) -> Tensor:
    with torch.no_grad():
        return attend(case, inputs, kernel)[0]


def poison_places(case: Case, where: str) -> list[tuple[object, ...]]:
    """Index of what is poisoned, in tensors [B, X, Y, H, D]."""
    if where == "batch item":
        return [(1,)]
    if where == "head":
        return [(..., 0, slice(None))]
    return [(slice(None), slice(1, None, case.axes[0].dilation))]


@pytest.mark.parametrize("where", ["batch item", "head", "dilation group"])
def test_nan_elsewhere_changes_nothing(kernel: Kernel, device: torch.device, where: str) -> None:
    case = Case((axis(45, 7, 1, 3), axis(20, 9)), batch=3, heads=2, heads_kv=2, head_dim=32, head_dim_v=32)
    dtype = dtype_of(kernel)
    clean, dirty = case.tensors(dtype, device), case.tensors(dtype, device)
    (index,) = poison_places(case, where)
    with torch.no_grad():
        for tensor in (dirty.query, dirty.key, dirty.value, dirty.grad_out):
            tensor[index] = torch.nan
    for ours, theirs in zip(results(case, clean, kernel), results(case, dirty, kernel), strict=True):
        ours, theirs = (t if t.dim() == case.rank + 3 else t.unsqueeze(-1) for t in (ours, theirs))
        rest = torch.ones(ours.shape, dtype=torch.bool, device=device)
        rest[index] = False
        torch.testing.assert_close(theirs[rest], ours[rest])
        assert theirs[index].isnan().any()


def test_key_outside_a_window_changes_nothing(kernel: Kernel, device: torch.device) -> None:
    """A key may be loaded for other queries of a tile; for those whose window lacks it, its numbers must not count."""
    case = Case((axis(400, 31),), heads=2, head_dim=64, head_dim_v=64)
    dtype = dtype_of(kernel)
    clean, dirty = case.tensors(dtype, device), case.tensors(dtype, device)
    place, reach = 200, 15
    with torch.no_grad():
        dirty.key[:, place] = 300.0
        dirty.value[:, place] = 300.0
    expected, found = results(case, clean, kernel), results(case, dirty, kernel)
    sees = slice(place - reach, place + reach + 1)  # queries whose windows hold the key
    shares = slice(place - 2 * reach, place + 2 * reach + 1)  # keys that one of those queries sees, too
    for name, ours, theirs in zip(("out", "lse", "grad_query", "grad_key", "grad_value"), expected, found, strict=True):
        touched = shares if name in ("grad_key", "grad_value") else sees
        rest = torch.ones(400, dtype=torch.bool, device=device)
        rest[touched] = False
        # A leak would be of the order of 300; sums in another order may differ by a rounding.
        close = {"atol": 5e-3, "rtol": 5e-3, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(theirs[:, rest], ours[:, rest], **close)
        assert not torch.equal(theirs[:, place], ours[:, place])


def test_deterministic_backward(kernel: Kernel, device: torch.device) -> None:
    """The same bits in 20 runs, where determinism is asked for."""
    inputs = LONG.tensors(dtype_of(kernel), device)
    natten.use_deterministic_algorithms(True)
    try:
        first = results(LONG, inputs, kernel)
        for _ in range(19):
            for a, b in zip(first, results(LONG, inputs, kernel), strict=True):
                assert torch.equal(a, b)
    finally:
        natten.use_deterministic_algorithms(False)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned_tensors(ledger: Ledger, kernel: Kernel, device: torch.device, offset: int) -> None:
    """Tensors that begin off a 16-byte boundary, and rows of an odd length between them."""
    dtype = dtype_of(kernel)
    aligned = PLANE.tensors(dtype, device)

    def shifted(tensor: Tensor) -> Tensor:
        storage = torch.full((tensor.numel() * 2 + 64,), torch.nan, dtype=dtype, device=device)
        rows = tensor.detach().flatten(0, -2)
        pitch = rows.shape[1] + offset
        view = storage[offset:].as_strided((len(rows), rows.shape[1]), (pitch, 1))
        view.copy_(rows)
        strides = [pitch]
        for size in reversed(tensor.shape[1:-1]):
            strides.insert(0, strides[0] * size)
        return storage.as_strided(tensor.shape, (*strides, 1), offset).requires_grad_()

    moved = Inputs(
        *(shifted(t) for t in (aligned.query, aligned.key, aligned.value)),
        None,
        None,
        aligned.grad_out,
        aligned.grad_lse,
    )
    ledger.case()
    for (name, oracle, magnitude), result in zip(PLANE.expected(aligned), results(PLANE, moved, kernel), strict=True):
        ledger.check(name, result, oracle, magnitude, tolerance_of(kernel, dtype, allow_tf32=False), PLANE)


def test_expanded_tensors(kernel: Kernel, device: torch.device) -> None:
    """Strides of zero: one key and value for every batch item and head."""
    inputs = PLANE.tensors(dtype_of(kernel), device)
    key, value = (t.detach()[:1, :, :, :1].expand(t.shape) for t in (inputs.key, inputs.value))
    expanded = Inputs(inputs.query.detach(), key, value, None, None, inputs.grad_out, inputs.grad_lse)
    copied = Inputs(inputs.query.detach(), key.clone(), value.clone(), None, None, inputs.grad_out, inputs.grad_lse)
    torch.testing.assert_close(forward(expanded, PLANE, kernel), forward(copied, PLANE, kernel))


def test_runs_on_the_current_stream(kernel: Kernel, cuda: torch.device) -> None:
    """Inputs are written late on a side stream; work on any other stream would read NaN."""
    dtype = dtype_of(kernel)
    ready = LONG.tensors(dtype, cuda)
    expected = results(LONG, ready, kernel)
    late = LONG.tensors(dtype, cuda)
    with torch.no_grad():
        for tensor in (*late.differentiable(), late.grad_out):
            tensor.fill_(torch.nan)
    torch.cuda.synchronize(cuda)
    stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for target, source in zip(late.differentiable(), ready.differentiable(), strict=True):
                target.copy_(source)
            late.grad_out.copy_(ready.grad_out)
        found = results(LONG, late, kernel)
    stream.synchronize()
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_cuda_graph(kernel: Kernel, cuda: torch.device) -> None:
    """Forward and backward are captured; the replay computes with the inputs' new numbers."""
    dtype = dtype_of(kernel)
    inputs = PLANE.tensors(dtype, cuda)

    def both() -> list[Tensor]:
        out, lse = attend(PLANE, inputs, kernel)
        grads = torch.autograd.grad((out, lse), inputs.differentiable(), (inputs.grad_out, inputs.grad_lse))
        return [out, lse, *grads]

    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream(cuda).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for tensor in (*inputs.differentiable(), inputs.grad_out, inputs.grad_lse):
            tensor.normal_()
        for tensor in captured:
            tensor.fill_(torch.nan)
    graph.replay()
    for a, b in zip(both(), captured, strict=True):
        torch.testing.assert_close(a, b)


def test_second_device(ledger: Ledger, kernel: Kernel, cuda: torch.device) -> None:
    """Tensors decide where a call runs, not the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    other = torch.device("cuda", 1 - torch.cuda.current_device() if torch.cuda.current_device() < 2 else 0)
    check_attention(ledger, PLANE, kernel, dtype_of(kernel), other)
    assert torch.cuda.current_device() == cuda.index


def test_autocast(kernel: Kernel, device: torch.device) -> None:
    """float32 tensors are computed in the autocast type, and their gradients come back in float32."""
    autocast_dtype = torch.bfloat16
    if autocast_dtype not in FAMILIES[kernel].dtypes:
        pytest.skip(f"{kernel.name} does not take {autocast_dtype}")
    inputs = PLANE.tensors(torch.float32, device)
    with torch.autocast(device.type, autocast_dtype):
        out, _ = attend(PLANE, inputs, kernel)
    assert out.dtype == autocast_dtype
    grads = torch.autograd.grad(out, inputs.differentiable()[:3], inputs.grad_out.to(autocast_dtype))
    assert {grad.dtype for grad in grads} == {torch.float32}
    cast = Inputs(*(t.to(autocast_dtype) for t in inputs.differentiable()[:3]), None, None, out, out)
    # Composites: autocast has softmax in float32.
    torch.testing.assert_close(out, forward(cast, PLANE, kernel), atol=2e-2, rtol=2e-2)


def test_compile_without_graph_breaks(kernel: Kernel, device: torch.device) -> None:
    """Values and gradients of the compiled function equal those of the eager one."""
    inputs = PLANE.tensors(dtype_of(kernel), device)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = natten.na2d(query, key, value, **PLANE.window_arguments, return_lse=True, kernel=kernel.name)
        return out * 2 + lse.unsqueeze(-1).to(out.dtype)

    tensors = inputs.differentiable()
    eager = function(*tensors)
    compiled = torch.compile(function, fullgraph=True)(*tensors)
    # Compiled element-wise operations keep intermediate results that eager ones round.
    torch.testing.assert_close(compiled, eager, atol=4e-3, rtol=4e-3)
    for a, b in zip(*(torch.autograd.grad(o, tensors, inputs.grad_out) for o in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_opcheck(kernel: Kernel, device: torch.device) -> None:
    """Schema, mutation and fake kernel of the operators that this kernel implements."""
    case = Case((axis(9, 3, 1, 2), axis(6, 3)), batch=2, heads=2, head_dim=16, head_dim_v=16)
    dtype = dtype_of(kernel)
    inputs = case.tensors(dtype, device)
    query, key, value = (t.detach() for t in inputs.differentiable())
    family = FAMILIES[kernel]
    end = (case.packed_window, case.effective_scale, int(kernel), 0, [])
    weights = torch.rand(*query.shape[:-1], case.slots, dtype=dtype, device=device)
    ops = torch.ops.natten
    if Operation.qk in family.operations:
        torch.library.opcheck(ops.na_qk.default, (query, key, None, torch.empty_like(weights), *end))
        torch.library.opcheck(ops.na_av.default, (weights, value, torch.empty_like(query), *end))
        torch.library.opcheck(ops.na_inverse_av.default, (weights, query, torch.empty_like(key), *end))
    if Operation.forward in family.operations and not family.composite:
        out, lse = torch.empty_like(query), torch.empty(query.shape[:-1], device=device)
        torch.library.opcheck(ops.na_forward.default, (query, key, value, None, None, out, lse, *end))


def test_out_of_memory_is_torchs_error(kernel: Kernel, cuda: torch.device) -> None:
    """Inputs expanded over a batch whose output cannot fit; afterwards the kernel still works."""
    dtype = dtype_of(kernel)
    total = torch.cuda.get_device_properties(cuda).total_memory
    one = torch.randn(1, 64, 8, 64, dtype=dtype, device=cuda)
    batch = 2 * total // (one.numel() * one.element_size())
    big = one.expand(batch, -1, -1, -1)
    with pytest.raises(torch.OutOfMemoryError):
        natten.na1d(big, big, big, 7, kernel=kernel)
    assert natten.na1d(one, one, one, 7, kernel=kernel).isfinite().all()


def test_refuses_mixed_inputs(kernel: Kernel, device: torch.device) -> None:
    inputs = PLANE.tensors(dtype_of(kernel), device)
    query, key, value = (t.detach() for t in inputs.differentiable())
    window = PLANE.window_arguments
    with pytest.raises(ValueError, match="key must have query's dtype"):
        natten.na2d(query, key.double(), value, **window, kernel=kernel)
    with pytest.raises(ValueError, match="kernel_size \\* dilation must not exceed the extent 37 along axis 0"):
        natten.na2d(query, key, value, (38, 5), kernel=kernel)
    if device.type == "cuda":
        with pytest.raises(ValueError, match="key must be on query's device"):
            natten.na2d(query, key.cpu(), value, **window, kernel=kernel)
        with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
            natten.na2d(query.cpu(), key.cpu(), value.cpu(), **window, kernel=kernel)


def test_refuses_types_that_it_does_not_take(kernel: Kernel, device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        if dtype not in FAMILIES[kernel].dtypes:
            reason = refusal(kernel, PLANE, dtype, device)
            assert reason is not None
            inputs = PLANE.tensors(dtype, device)
            with pytest.raises(ValueError, match="does not take"):
                attend(PLANE, inputs, kernel)


def test_dispatcher_on_the_device(ledger: Ledger, cuda: torch.device) -> None:
    """What the dispatcher chooses by itself runs and is right, for every type and rank."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for axes in ((axis(300, 63),), (axis(30, 7), axis(20, 9)), (axis(6, 3), axis(9, 5), axis(12, 7))):
            for dim in (32, 36, 128):
                case = Case(axes, batch=2, heads=2, head_dim=dim, head_dim_v=dim)
                check_attention(ledger, case, None, dtype, cuda)


def test_cpu_kernels_refuse_cuda_tensors(cuda: torch.device) -> None:
    inputs = PLANE.tensors(torch.float32, cuda)
    with pytest.raises(ValueError, match="runs on cpu, not on cuda"):
        attend(PLANE, inputs, Kernel.cpu)


def test_poison_reaches_the_backward_pass(device: torch.device) -> None:
    """The poisoning that the other tests rely on."""
    with poisoned() as poison:
        filled = torch.empty(3, device=device), torch.empty_like(torch.ones(2, device=device))
        more = torch.ones(2, device=device).new_empty(4), torch.empty(5, dtype=torch.uint8, device=device)
    assert poison.tensors == 4
    assert all(tensor.isnan().all() for tensor in (*filled, more[0]))
    assert (more[1] == 255).all()
