"""torch.ops.natten.na1d, na2d, na3d, qk and av: callable operators over the ones that kernels implement.

They are composites: tracing sees through them, autograd and autocast happen inside. `torch.compile` and `torch.export`
capture a call of the public functions as one of these, so nothing of the dispatcher is traced by Dynamo, and it meets
symbolic extents as `torch.SymInt`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten._attention import attend
from natten._library import fragment
from natten._unfused import checked_av, checked_qk

_WINDOW = "SymInt[] kernel_size, SymInt[] stride=1, SymInt[] dilation=1, bool[] is_causal=False"
_GLOBAL = "SymInt[]? q_start=None, SymInt[]? kv_start=None, SymInt[]? extent=None"


# torch.library.Library is not annotated.
define: Any = fragment.define
implement: Any = fragment.impl


def _define(rank: int) -> None:
    # A list argument with a default needs its length in the schema.
    window = _WINDOW.replace("[] stride", f"[{rank}] stride").replace("[] dilation", f"[{rank}] dilation")
    window = window.replace("bool[]", f"bool[{rank}]").replace("[] kernel_size", f"[{rank}] kernel_size")
    arguments = (
        f"Tensor query, Tensor key, Tensor value, {window}, float? scale=None, Tensor? additional_keys=None, "
        f"Tensor? additional_values=None, {_GLOBAL}, str? kernel=None, str? backend=None, "
        "bool deterministic=False"
    )

    def with_lse(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        q_start: Any = None,
        kv_start: Any = None,
        extent: Any = None,
        kernel: str | None = None,
        backend: str | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(
            rank,
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            additional_keys,
            additional_values,
            q_start,
            kv_start,
            extent,
            kernel,
            backend,
            deterministic,
        )
        assert lse is not None
        return out, lse

    def without_lse(*args: Any, **kwargs: Any) -> Tensor:
        return with_lse(*args, **kwargs)[0]

    define(f"na{rank}d({arguments}) -> Tensor")
    define(f"na{rank}d.with_lse({arguments}) -> (Tensor, Tensor)")
    implement(f"na{rank}d", without_lse, "CompositeImplicitAutograd")
    implement(f"na{rank}d.with_lse", with_lse, "CompositeImplicitAutograd")


for _rank in (1, 2, 3):
    _define(_rank)

define(
    "qk(Tensor query, Tensor key, SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal, "
    f"float? scale=None, Tensor? rpb=None, {_GLOBAL}, str? kernel=None) -> Tensor"
)
define(
    "av(Tensor attn, Tensor value, SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal, "
    f"{_GLOBAL}, str? kernel=None) -> Tensor"
)


def _qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float | None = None,
    rpb: Tensor | None = None,
    q_start: Any = None,
    kv_start: Any = None,
    extent: Any = None,
    kernel: str | None = None,
) -> Tensor:
    return checked_qk(
        query, key, kernel_size, stride, dilation, is_causal, scale, rpb, q_start, kv_start, extent, kernel
    )


def _av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    q_start: Any = None,
    kv_start: Any = None,
    extent: Any = None,
    kernel: str | None = None,
) -> Tensor:
    return checked_av(attn, value, kernel_size, stride, dilation, is_causal, q_start, kv_start, extent, kernel)


implement("qk", _qk, "CompositeImplicitAutograd")
implement("av", _av, "CompositeImplicitAutograd")
