// What every kernel family is given: plain structs, no torch. The ops fill them, after all checks.
#pragma once

#include <cstdint>

#include "window/axis.h"

namespace natten {

// Values are part of the operators' schema (the `kernel` argument); keep in step with python/natten/dispatch.py.
enum class Kernel : int { cpu_naive = 0, cpu = 1, naive = 2, gemm = 3, fused_sm80 = 4, fused_sm90 = 5 };

enum class ScalarType : int { float64, float32, float16, bfloat16 };

// Bits of the operators' `flags` argument.
constexpr int kAllowTf32 = 1;
constexpr int kDeterministic = 2;

// Heads-last tensor [B, X, Y, Z, H, C]: strides in elements, channel stride 1. `data` is null when absent.
// Tensors without a channel axis (logsumexp) keep the same fields. Additional keys [B, S, H, C] use axis_stride[2] for
// S.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t axis_stride[kAxes];
  int64_t head_stride;
};

// Chosen by the dispatcher; `size == 0` lets the kernel choose. The meaning of the values belongs to the kernel family.
struct Plan {
  int size;
  int values[16];
};

struct Problem {
  int rank;  // 1..3; axes [0, 3 - rank) have extent 1
  Axis axis[kAxes];
  int64_t batch;
  int heads, heads_kv;       // heads_kv divides heads; query head h reads key/value head h / (heads / heads_kv)
  int head_dim, head_dim_v;  // D, Dv
  int64_t additional;        // S, number of additional keys that every query attends; 0 without them
  ScalarType type;           // of every tensor but logsumexp (float32; float64 when type is float64) and rpb
  double scale;
  int flags;
  Plan plan;
};

// out, logsumexp = softmax(scale * query key^T over the window and the additional keys) value
struct ForwardArguments {
  Problem problem;
  TensorView query, key, value, additional_keys, additional_values;
  TensorView out, logsumexp;
};

// grad_logsumexp may be absent. Every gradient is overwritten, not accumulated into.
// workspace: at least what python/natten/dispatch.py states for the kernel; uninitialised.
struct BackwardArguments {
  Problem problem;
  TensorView grad_out, grad_logsumexp;
  TensorView query, key, value, additional_keys, additional_values, out, logsumexp;
  TensorView grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values;
  void* workspace;
  int64_t workspace_bytes;
};

// The unfused operators: three bilinear maps, closed under differentiation (PN, NN and IN of the NeurIPS work).
// `attention` is [B, X, Y, Z, H, K], K = product over axes of the window's slots, row-major; slot w of an axis is key
// position begin + w of the query's window. Slots past a window's end (causal, or kernel_size -1 over ragged dilation
// groups) hold -inf after qk and are ignored as inputs.
//   qk:         attention[i, w] = scale * query[i] . key[begin(i) + w]  (+ rpb[h, t - p + k - 1 per axis])
//   av:         out[i] = scale * sum_w attention[i, w] value[begin(i) + w]                          (K/V head h /
//   group) inverse_av: out[j] = scale * sum over queries i that see j of attention[i, j - begin(i)] input[i]  (summed
//   over the
//               query heads of a K/V head)
// Uses of the fields: qk(a = query [H, D], b = key [Hkv, D], c = attention), av(a = attention, b = value [Hkv, D],
// c = out [H, D]), inverse_av(a = attention, b = input [H, D], c = out [Hkv, D]). D is problem.head_dim.
struct UnfusedArguments {
  Problem problem;
  TensorView a, b, c;
  const void* rpb;   // [H, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1] contiguous, in the problem's type; null without bias
  int slots[kAxes];  // window slots per axis; their product is K
};

// grad_rpb[h, ...] = sum over batch and queries of grad_attention at that relative position. Deterministic.
struct RpbBackwardArguments {
  Problem problem;
  TensorView grad_attention;
  void* grad_rpb;  // contiguous, in the problem's type
  int slots[kAxes];
};

}  // namespace natten
