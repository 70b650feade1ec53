"""Every rule on arguments: breaking it raises before anything runs, and the message names argument, value and rule."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import natten
from natten import functional

EXTENT = 8


def tensors(rank: int = 2, **changes: Any) -> dict[str, Tensor]:
    """query, key and value of a small problem."""
    shape = (1, *([EXTENT] * rank), 2, 4)
    made = {name: torch.randn(shape) for name in ("query", "key", "value")}
    made.update(changes)
    return made


def call(**arguments: Any) -> Tensor:
    """na2d with a valid call's arguments where none is given."""
    return natten.na2d(**{**tensors(), "kernel_size": 3, **arguments})


def grid(*shape: int, **kwargs: Any) -> Tensor:
    """A tensor of the shape."""
    return torch.randn(shape, **kwargs)


SQUARE = (1, EXTENT, EXTENT, 2, 4)
# What is wrong, the error, and what its message must say.
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("query is no tensor", {"query": [1.0]}, TypeError, "query must be a torch.Tensor; got list"),
    ("key is no tensor", {"key": None}, TypeError, "key must be a torch.Tensor; got NoneType"),
    ("rank of query", {"query": grid(1, 8, 2, 4)}, ValueError, "query must have 5 dimensions"),
    ("rank of key", {"key": grid(1, 8, 2, 4)}, ValueError, "key must have 5 dimensions"),
    ("integers", {"query": torch.ones(SQUARE, dtype=torch.int32)}, TypeError, "query must be float64.*int32"),
    ("complex", {"value": torch.ones(SQUARE, dtype=torch.complex64)}, TypeError, "value must be float64.*complex64"),
    ("sparse", {"query": grid(*SQUARE).to_sparse()}, TypeError, "query must be a dense tensor"),
    ("dtypes differ", {"key": grid(*SQUARE, dtype=torch.float64)}, ValueError, "key must have query's dtype.*float64"),
    (
        "devices differ",
        {"value": grid(*SQUARE, device="meta")},
        ValueError,
        "value must be on query's device cpu; got meta",
    ),
    ("batch", {"key": grid(3, EXTENT, EXTENT, 2, 4)}, ValueError, "key must have query's batch size 1; got 3"),
    (
        "heads",
        {n: grid(1, EXTENT, EXTENT, 3, 4) for n in ("key", "value")},
        ValueError,
        "key's number of heads.* 3 and 2",
    ),
    ("no heads", {n: grid(1, EXTENT, EXTENT, 0, 4) for n in ("query", "key", "value")}, ValueError, "number of heads"),
    ("no channels", {"query": grid(1, EXTENT, EXTENT, 2, 0)}, ValueError, "query's last dimension must be at least 1"),
    ("head dim", {"key": grid(1, EXTENT, EXTENT, 2, 3)}, ValueError, "key must have query's head dim 4; got 3"),
    ("value heads", {"value": grid(1, EXTENT, EXTENT, 1, 4)}, ValueError, "value must have key's shape"),
    ("value grid", {"value": grid(1, EXTENT, 7, 2, 4)}, ValueError, "value must have key's shape"),
    (
        "grids differ",
        {n: grid(1, EXTENT, 7, 2, 4) for n in ("key", "value")},
        ValueError,
        "extent along axis 1.*8 and 7",
    ),
    (
        "no tokens",
        {n: grid(1, 0, 8, 2, 4) for n in ("query", "key", "value")},
        ValueError,
        "query must hold.*axis 0; got 0",
    ),
    ("channel stride", {"query": grid(1, 8, 8, 4, 2).mT}, ValueError, "query's last dimension must have stride 1"),
    ("kernel_size missing", {"kernel_size": None}, TypeError, "kernel_size must be an int along axis 0; got None"),
    ("kernel_size 0", {"kernel_size": 0}, ValueError, "kernel_size must be at least 1.*got 0 along axis 0"),
    ("kernel_size -2", {"kernel_size": (3, -2)}, ValueError, "kernel_size must be at least 1.*got -2 along axis 1"),
    ("kernel_size long", {"kernel_size": (3, 9)}, ValueError, "must not exceed the extent 8 along axis 1; got 9 [*] 1"),
    ("kernel_size float", {"kernel_size": 3.0}, TypeError, "kernel_size must be an int.*3.0 of type float"),
    ("kernel_size bool", {"kernel_size": True}, TypeError, "kernel_size must be an int.*bool True"),
    ("kernel_size numpy bool", {"kernel_size": np.bool_(True)}, TypeError, "kernel_size must be an int"),
    ("kernel_size string", {"kernel_size": "33"}, TypeError, "kernel_size must be an int"),
    ("kernel_size tensor", {"kernel_size": torch.tensor([3, 3])}, TypeError, "kernel_size.*not a tensor"),
    ("kernel_size three", {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or 2 of them.*got 3"),
    ("stride 0", {"stride": 0}, ValueError, "stride must be at least 1; got 0 along axis 0"),
    ("stride long", {"stride": (1, 4)}, ValueError, "stride must not exceed kernel_size; got 4 > 3 along axis 1"),
    ("stride bool", {"stride": (1, True)}, TypeError, "stride must be an int along axis 1"),
    ("stride of whole axis", {"kernel_size": -1, "stride": 9}, ValueError, "stride must not exceed the window of 8"),
    ("dilation 0", {"dilation": 0}, ValueError, "dilation must be at least 1; got 0 along axis 0"),
    ("dilation long", {"dilation": (1, 3)}, ValueError, "extent 8 along axis 1; got 3 [*] 3"),
    ("dilation of whole axis", {"kernel_size": -1, "dilation": 9}, ValueError, "dilation must not exceed the extent 8"),
    ("causal int", {"is_causal": (1, 0)}, TypeError, "is_causal must be a bool along axis 0; got 1 of type int"),
    ("causal three", {"is_causal": (True,) * 3}, ValueError, "is_causal must be a bool or 2 of them"),
    ("scale string", {"scale": "a"}, TypeError, "scale must be a number; got 'a'"),
    ("scale tensor", {"scale": torch.tensor(1.0)}, TypeError, "scale must be a number; got Tensor"),
    ("scale infinite", {"scale": float("inf")}, ValueError, "scale must be finite; got inf"),
    ("additional alone", {"additional_keys": grid(1, 3, 2, 4)}, ValueError, "must be given together"),
    (
        "additional rank",
        {"additional_keys": grid(1, 3, 1, 2, 4), "additional_values": grid(1, 3, 2, 4)},
        ValueError,
        "additional_keys must have 4 dimensions",
    ),
    (
        "additional heads",
        {"additional_keys": grid(1, 3, 1, 4), "additional_values": grid(1, 3, 2, 4)},
        ValueError,
        "additional_keys must have key's 2 heads and head dim 4",
    ),
    (
        "additional tokens",
        {"additional_keys": grid(1, 3, 2, 4), "additional_values": grid(1, 4, 2, 4)},
        ValueError,
        "additional_values must hold as many tokens as additional_keys, 3; got 4",
    ),
    (
        "additional dtype",
        {"additional_keys": grid(1, 3, 2, 4).double(), "additional_values": grid(1, 3, 2, 4)},
        ValueError,
        "additional_keys must have query's dtype",
    ),
    ("q_start negative", {"q_start": -1, "extent": 9}, ValueError, "q_start must not be negative; got -1 along axis 0"),
    ("q_start beyond", {"q_start": (0, 1)}, ValueError, r"q_start \+ length must not exceed the extent 8 along axis 1"),
    (
        "kv_start beyond",
        {"kv_start": 1, "extent": 8},
        ValueError,
        r"kv_start \+ length .* extent 8 along axis 0; got 1",
    ),
    ("extent short", {"extent": 7}, ValueError, "must not exceed the extent 7 along axis 0"),
    ("extent float", {"extent": 8.0}, TypeError, "extent must be an int"),
    (
        "key missing after",
        {"extent": 9},
        ValueError,
        "global coordinate 7 along axis 0 needs the key at 8.*cover .0, 8",
    ),
    (
        "key missing before",
        {"kv_start": 1, "q_start": 1, "extent": 9},
        ValueError,
        "coordinate 1 .* needs the key at 0",
    ),
    ("kernel unknown", {"kernel": "fast"}, ValueError, "kernel must be one of cpu_naive, cpu, .*'fast'"),
    (
        "kernel of another device",
        {"kernel": "naive"},
        ValueError,
        "kernel naive cannot run forward here: it runs on cuda",
    ),
    ("backend unknown", {"backend": "blackwell-fna"}, ValueError, "backend must be one of .*'blackwell-fna'"),
    (
        "backend and kernel",
        {"backend": "flex-fna", "kernel": "cpu"},
        ValueError,
        "kernel and backend exclude each other",
    ),
    ("tile shape", {"q_tile_shape": (0, 8)}, ValueError, "q_tile_shape must hold positive ints"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_argument(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call()  # a cached decision for a right call must not hide what is wrong with another
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rpb": grid(2, 5, 4)}, r"rpb must have shape .*\(2, 5, 5\); got \(2, 5, 4\)"),
        ({"rpb": grid(2, 5, 5).double()}, "rpb must have query's dtype"),
        ({"rpb": grid(2, 5, 5), "is_causal": (False, True)}, "rpb does not go with causal axes; axis 1"),
        ({"rpb": grid(2, 5, 5), "stride": (2, 1)}, "rpb does not go with stride > 1; got 2 along axis 0"),
        ({"rpb": grid(2, 5, 5), "kernel_size": -1}, "rpb needs an explicit kernel_size"),
        ({"key": grid(1, EXTENT, EXTENT, 2, 3)}, "key must have query's head dim 4; got 3"),
        ({"query": grid(2, 4)}, "query must have 4, 5 or 6 dimensions"),
        ({"kernel_size": 9}, "must not exceed the extent 8"),
        ({"kernel": "fused_sm80"}, "kernel fused_sm80 cannot run qk here"),
    ],
)
def test_wrong_argument_of_qk(arguments: dict[str, Any], message: str) -> None:
    right = {"query": grid(*SQUARE), "key": grid(*SQUARE), "kernel_size": 3}
    natten.na_qk(**right)
    with pytest.raises(ValueError, match=message):
        natten.na_qk(**{**right, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn": grid(1, EXTENT, EXTENT, 2, 8)}, "attn must have one weight per window slot, 9, .*got 8"),
        ({"value": grid(1, EXTENT, EXTENT, 3, 4)}, "value's number of heads must divide attn's"),
        ({"value": grid(2, EXTENT, EXTENT, 2, 4)}, "value must have attn's batch size 1; got 2"),
    ],
)
def test_wrong_argument_of_av(arguments: dict[str, Any], message: str) -> None:
    right = {"attn": grid(1, EXTENT, EXTENT, 2, 9), "value": grid(*SQUARE), "kernel_size": 3}
    natten.na_av(**right)
    with pytest.raises(ValueError, match=message):
        natten.na_av(**{**right, **arguments})


@pytest.mark.parametrize(
    "kernel_size", [3, [3, 3], (3, 3), np.int64(3), np.array([3, 3]), (np.int32(3), 3), torch.Size([3, 3])], ids=repr
)
def test_kinds_of_ints(kernel_size: Any) -> None:
    arguments = tensors()
    assert torch.equal(natten.na2d(**arguments, kernel_size=kernel_size), natten.na2d(**arguments, kernel_size=(3, 3)))


@pytest.mark.parametrize("is_causal", [True, [True, True], np.bool_(True), np.array([True, True])], ids=repr)
def test_kinds_of_bools(is_causal: Any) -> None:
    arguments = tensors()
    expected = natten.na2d(**arguments, kernel_size=3, is_causal=(True, True))
    assert torch.equal(natten.na2d(**arguments, kernel_size=3, is_causal=is_causal), expected)


def test_causal_none_is_false() -> None:
    arguments = tensors()
    assert torch.equal(natten.na2d(**arguments, kernel_size=3, is_causal=None), natten.na2d(**arguments, kernel_size=3))


def test_scale_zero_is_honoured() -> None:
    arguments = tensors(rank=1)
    out = natten.na1d(**arguments, kernel_size=EXTENT, scale=0.0)
    torch.testing.assert_close(out, arguments["value"].mean(1, keepdim=True).expand_as(out))


def test_extent_defaults_to_the_end_of_the_keys() -> None:
    """The last rows of a causal problem, as with a key/value cache."""
    arguments = tensors(rank=1)
    whole = natten.na1d(**arguments, kernel_size=4, is_causal=True)
    arguments["query"] = arguments["query"][:, 5:]
    torch.testing.assert_close(natten.na1d(**arguments, kernel_size=4, is_causal=True, q_start=5), whole[:, 5:])


# The public NATTEN package's parameters, in its order.
NA = (
    "query key value kernel_size stride dilation is_causal scale additional_keys additional_values "
    "attention_kwargs backend q_tile_shape kv_tile_shape backward_q_tile_shape backward_kv_tile_shape "
    "backward_kv_splits backward_use_pt_reduction run_persistent_kernel kernel_schedule torch_compile "
    "return_lse"
)
ATTENTION = (
    "query key value is_causal scale seqlens_Q seqlens_KV cumulative_seqlen_Q cumulative_seqlen_KV "
    "max_seqlen_Q max_seqlen_KV backend q_tile_size kv_tile_size backward_q_tile_size "
    "backward_kv_tile_size backward_kv_splits backward_use_pt_reduction run_persistent_kernel "
    "kernel_schedule torch_compile return_lse"
)
MODULE = "embed_dim num_heads kernel_size stride dilation is_causal qkv_bias qk_scale proj_drop"


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (natten.na1d, NA),
        (natten.na2d, NA),
        (natten.na3d, NA),
        (functional.neighborhood_attention_generic, NA),
        (natten.attention, ATTENTION),
        (natten.merge_attentions, "outputs lse_tensors torch_compile use_autograd_fix"),
        (natten.NeighborhoodAttention1D, MODULE),
        (natten.NeighborhoodAttention2D, MODULE),
        (natten.NeighborhoodAttention3D, MODULE),
    ],
)
def test_signature_of_the_public_package(function: Any, names: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_compatible_argument_is_accepted(rank: int) -> None:
    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    arguments = tensors(rank)
    expected = function(**arguments, kernel_size=3)
    tile = (8,) * rank
    result = function(
        *arguments.values(), 3, 1, 1, False, None, None, None, {"backend": "flex-fmha"}, "flex-fna",
        tile, tile, tile, tile, (1,) * rank, False, True, "pp", False, False,
    )  # fmt: skip
    assert torch.equal(result, expected)
