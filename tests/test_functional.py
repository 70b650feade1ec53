"""The public functions beside na1d, na2d and na3d, and what torch offers around all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import AxisCase, Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import reference


def whole_axis(length: int, kernel_size: int = 3, causal: bool = False) -> AxisCase:
    """An axis without stride, dilation or pieces."""
    return AxisCase(kernel_size, 1, 1, causal, length, 0, length, 0, length)


def dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None) -> Any:
    """Attention by the book."""
    heads = query.shape[2] // key.shape[2]
    q, k, v = query.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(heads, 1) for t in (key, value))
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("tokens", "tokens_kv"), [(5, 5), (3, 8), (8, 3), (9, 3), (1, 4), (4, 1), (11, 4)])
def test_attention(tokens: int, tokens_kv: int, is_causal: bool) -> None:
    query = torch.randn(2, tokens, 4, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, tokens_kv, 2, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, tokens_kv, 2, 5, dtype=torch.float64, requires_grad=True)
    results = natten.attention(query, key, value, is_causal, return_lse=True)
    expected = dense(query, key, value, is_causal)
    seeds = [torch.randn_like(t) for t in expected]
    inputs = (query, key, value)
    pairs = zip(
        (*results, *torch.autograd.grad(results, inputs, seeds)),
        (*expected, *torch.autograd.grad(expected, inputs, seeds)),
        strict=True,
    )
    for result, oracle in pairs:
        torch.testing.assert_close(result, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("cumulative", [False, True])
def test_packed_sequences(cumulative: bool, is_causal: bool) -> None:
    lengths_q, lengths_kv = [3, 0, 5], [4, 2, 2]
    query, key, value = (torch.randn(1, n, 2, 4, dtype=torch.float64) for n in (8, 8, 8))
    arguments: dict[str, Any] = {"seqlens_Q": torch.tensor(lengths_q), "seqlens_KV": torch.tensor(lengths_kv)}
    if cumulative:
        arguments = {
            "cumulative_seqlen_Q": torch.tensor([0, 3, 3, 8]), "cumulative_seqlen_KV": torch.tensor([0, 4, 6, 8]),
            "max_seqlen_Q": 5, "max_seqlen_KV": 4,
        }  # fmt: skip
    out, lse = natten.attention(query, key, value, is_causal, **arguments, return_lse=True)
    parts = [
        dense(query[:, a : a + m], key[:, c : c + n], value[:, c : c + n], is_causal)
        for a, m, c, n in ((0, 3, 0, 4), (3, 5, 6, 2))
    ]
    torch.testing.assert_close(out, torch.cat([p[0] for p in parts], 1))
    torch.testing.assert_close(lse, torch.cat([p[1] for p in parts], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlens_Q": [8]}, "seqlens_Q and seqlens_KV must be given together"),
        ({"cumulative_seqlen_KV": [0, 8]}, "cumulative_seqlen_Q and cumulative_seqlen_KV must be given together"),
        ({"seqlens_Q": [8], "seqlens_KV": [7]}, "seqlens_KV must divide the 8 tokens into sequences"),
        ({"seqlens_Q": [4, 4], "seqlens_KV": [8]}, "as many sequences; got 2 and 1"),
        ({"seqlens_Q": [4, 4], "seqlens_KV": [8, 0]}, "every sequence with queries must have keys"),
        ({"cumulative_seqlen_Q": [0, 9, 8], "cumulative_seqlen_KV": [0, 4, 8]}, "cumulative_seqlen_Q must divide"),
        ({"seqlens_Q": [8.0], "seqlens_KV": [8]}, "seqlens_Q must be a 1-D tensor of ints"),
        ({"q_tile_size": 0}, "q_tile_size must hold positive ints"),
    ],
)
def test_wrong_sequences(arguments: dict[str, Any], message: str) -> None:
    tensors = [torch.randn(1, 8, 2, 4) for _ in range(3)]
    given = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        natten.attention(*tensors, **given)


def test_packed_sequences_need_a_batch_of_one() -> None:
    tensors = [torch.randn(2, 8, 2, 4) for _ in range(3)]
    lengths = torch.tensor([8])
    with pytest.raises(ValueError, match="packed sequences need a batch size of 1; got 2"):
        natten.attention(*tensors, seqlens_Q=lengths, seqlens_KV=lengths)


@pytest.mark.parametrize("torch_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [2, 3])
def test_merge_attentions(parts: int, torch_compile: bool) -> None:
    query = torch.randn(2, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 12, 2, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 12, 2, 4, dtype=torch.float64, requires_grad=True)
    pieces = [
        natten.attention(query, k, v, return_lse=True)
        for k, v in zip(keys.chunk(parts, 1), values.chunk(parts, 1), strict=True)
    ]
    results = natten.merge_attentions([p[0] for p in pieces], [p[1] for p in pieces], torch_compile=torch_compile)
    expected = dense(query, keys, values)
    seeds = [torch.randn_like(t) for t in expected]
    inputs = (query, keys, values)
    pairs = zip(
        (*results, *torch.autograd.grad(results, inputs, seeds)),
        (*expected, *torch.autograd.grad(expected, inputs, seeds)),
        strict=True,
    )
    for result, oracle in pairs:
        torch.testing.assert_close(result, oracle, rtol=1e-10, atol=1e-10)


def test_merge_with_an_attention_to_nothing() -> None:
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2)
    nothing = torch.full_like(lse, -torch.inf)
    merged, merged_lse = natten.merge_attentions([out, torch.zeros_like(out)], [lse, nothing])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    merged, merged_lse = natten.merge_attentions([torch.zeros_like(out)] * 2, [nothing] * 2)
    assert torch.equal(merged, torch.zeros_like(out))
    assert torch.equal(merged_lse, nothing)


def test_merge_keeps_the_dtype_and_sums_in_float32() -> None:
    out = torch.randn(1, 3, 2, 4).bfloat16()
    merged, lse = natten.merge_attentions([out, out], [torch.zeros(1, 3, 2)] * 2)
    assert (merged.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(merged, out)


@pytest.mark.parametrize(
    ("outputs", "lse", "message"),
    [
        ([(1, 3, 2, 4)], [(1, 3, 2)], "at least two tensors; got 1"),
        ([(1, 3, 2, 4)] * 2, [(1, 3, 2)], "one tensor per output, 2; got 1"),
        ([(1, 3, 2, 4), (1, 3, 2, 5)], [(1, 3, 2)] * 2, "outputs must agree in shape and dtype"),
        ([(1, 3, 2, 4)] * 2, [(1, 3, 2), (1, 3, 1)], r"lse_tensors\[1\] must have the shape"),
    ],
)
def test_wrong_merge(outputs: list[tuple[int, ...]], lse: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natten.merge_attentions([torch.zeros(s) for s in outputs], [torch.zeros(s) for s in lse])


def test_composite_of_the_unfused_operators() -> None:
    """What kernel `gemm` runs for fused attention: qk, softmax, av, and the additional keys beside them."""
    from natten._attention import composite
    from natten._problem import attention_problem

    case = Case((whole_axis(6), whole_axis(5, 2, causal=True)), batch=2, heads=4, heads_kv=2, additional=3, scale=0.7)
    inputs = case.tensors()
    tensors = inputs.differentiable()
    problem = attention_problem(
        2,
        *tensors[:3],
        **case.window_arguments,
        scale=case.scale,
        additional_keys=tensors[3],
        additional_values=tensors[4],
    )
    results = composite(problem, *tensors, None)
    grads = torch.autograd.grad(results, tensors, (inputs.grad_out, inputs.grad_lse))
    for (name, oracle, _), result in zip(case.expected(inputs), (*results, *grads), strict=True):
        torch.testing.assert_close(result, oracle, rtol=1e-11, atol=1e-11, msg=name)
    out, lse = composite(problem, *tensors, None, with_lse=False)
    assert torch.equal(out, results[0])
    assert lse is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        out, lse = natten.na1d(query, key.to(dtype), value, 3, return_lse=True)
        logits = natten.na_qk(query, key, 3)
        averages = natten.na_av(logits.float().softmax(-1), value, 3)
    assert (out.dtype, lse.dtype, logits.dtype, averages.dtype) == (dtype, torch.float32, dtype, dtype)
    assert torch.equal(out, natten.na1d(query.to(dtype), key.to(dtype), value.to(dtype), 3))
    (grad,) = torch.autograd.grad(out.float().sum(), value)
    assert grad.dtype == torch.float32


def test_composite_under_autocast() -> None:
    """softmax runs in float32 under autocast; the composite's weights stay in the type of its tensors."""
    from natten._attention import composite
    from natten._problem import attention_problem

    tensors = [torch.randn(1, 8, 2, 4).bfloat16() for _ in range(3)]
    extra = [torch.randn(1, 3, 2, 4).bfloat16() for _ in range(2)]
    for context in ([None, None], extra):
        problem = attention_problem(1, *tensors, 3, additional_keys=context[0], additional_values=context[1])
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = composite(problem, *tensors, *context, None)
        expected, _ = composite(problem, *tensors, *context, None)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected)


def test_autocast_leaves_float64() -> None:
    tensors = [torch.randn(1, 8, 2, 4, dtype=torch.float64) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert natten.na1d(*tensors, 3).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    tensors = [torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3)]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return natten.na1d(query, key, value, 3).square()

    plain = torch.autograd.grad(function(*tensors).sum(), tensors)
    out = checkpoint(function, *tensors, use_reentrant=use_reentrant)
    out.sum().backward()
    for tensor, grad in zip(tensors, plain, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_meta_tensors() -> None:
    query = torch.empty(2, 8, 9, 4, 16, dtype=torch.float16, device="meta", requires_grad=True)
    key = torch.empty(2, 8, 9, 2, 16, dtype=torch.float16, device="meta")
    value = torch.empty(2, 8, 9, 2, 24, dtype=torch.float16, device="meta")
    out, lse = natten.na2d(query, key, value, 3, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 8, 9, 4, 24), torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 8, 9, 4), torch.float32)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert grad.shape == query.shape
    assert natten.na_qk(query, key, 3, is_causal=True).shape == (2, 8, 9, 4, 9)


def count_flops(function: Any) -> int:
    """What torch counts while the function runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_a_window_over_everything_are_those_of_dense_attention() -> None:
    query, key, value = (torch.randn(2, 16, 4, 8, requires_grad=True) for _ in range(3))
    dense_flops = count_flops(lambda: dense(query, key, value))
    assert count_flops(lambda: natten.na1d(query, key, value, 16)) == dense_flops
    both = count_flops(lambda: natten.na1d(query, key, value, -1).sum().backward())
    assert both == dense_flops + dense_flops * 5 // 2


def test_flops_count_pairs_inside_windows() -> None:
    case = Case(
        (AxisCase(3, 2, 1, True, 7, 0, 7, 0, 7), AxisCase(-1, 1, 2, False, 5, 0, 5, 0, 5)), head_dim_v=4, additional=2
    )
    inputs = case.tensors()
    tables = [axis.window().members(0, axis.queries, axis.keys).sum() for axis in case.axes]
    pairs = int(tables[0] * tables[1])
    fused = count_flops(
        lambda: natten.na2d(
            inputs.query, inputs.key, inputs.value, **case.window_arguments,
            additional_keys=inputs.additional_keys, additional_values=inputs.additional_values,
        )
    )  # fmt: skip
    assert fused == 2 * (pairs + 35 * 2) * (8 + 4)
    query, key = inputs.query.detach(), inputs.key.detach()
    assert count_flops(lambda: natten.na_qk(query, key, **case.window_arguments)) == 2 * pairs * 8
    value = inputs.value
    weights = torch.randn(1, 7, 5, 1, case.slots, dtype=torch.float64)
    assert (
        count_flops(lambda: natten.na_av(weights, value, **case.window_arguments).sum().backward()) == 2 * 2 * pairs * 4
    )


def test_deterministic_setting() -> None:
    assert not natten.are_deterministic_algorithms_enabled()
    natten.use_deterministic_algorithms()
    try:
        assert natten.are_deterministic_algorithms_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        natten.use_deterministic_algorithms(False)
    torch.use_deterministic_algorithms(True)
    try:
        assert natten.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_views_of_a_packed_projection_are_read_in_place() -> None:
    packed = torch.randn(2, 8, 9, 3, 4, 8, dtype=torch.float64)
    query, key, value = packed.unbind(3)
    expected = natten.na2d(query.contiguous(), key.contiguous(), value.contiguous(), 3)
    out = natten.na2d(query, key, value, 3)
    assert torch.equal(out, expected)
    assert out.is_contiguous()


def test_oracle_agrees_with_the_public_functions() -> None:
    case = Case((whole_axis(9, 4), whole_axis(7)), heads=2)
    inputs = case.tensors()
    weights = natten.na_qk(inputs.query, inputs.key, **case.window_arguments).softmax(-1)
    expected, _ = reference.attention(inputs.query, inputs.key, inputs.value, case.window)
    torch.testing.assert_close(natten.na_av(weights, inputs.value, **case.window_arguments), expected)
