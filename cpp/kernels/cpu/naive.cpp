// The definition, as readable loops: one query (or, in a backward pass, one key) after the other.
// Gradients are gathered through the inverse window, never scattered, so that results do not depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/element.h"
#include "kernels/cpu/parallel.h"
#include "kernels/families.h"

namespace natten::cpu_naive {
namespace {

using cpu::BFloat16;
using cpu::Compute;
using cpu::Half;
using cpu::narrow;
using cpu::widen;

struct Coordinate {
  int axis[kAxes];
};

// A local coordinate seen from its dilation group.
struct Position {
  Group group[kAxes];
  int position[kAxes];
};

Position query_position(const Problem& problem, const Coordinate& query) {
  Position result;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    const int global = axis.q_start + query.axis[a];
    result.group[a] = make_group(axis, global % axis.dilation);
    result.position[a] = global / axis.dilation;
  }
  return result;
}

Position key_position(const Problem& problem, const Coordinate& key) {
  Position result;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axis[a];
    const int global = axis.kv_start + key.axis[a];
    result.group[a] = make_group(axis, global % axis.dilation);
    result.position[a] = global / axis.dilation;
  }
  return result;
}

// Calls visit(position in the group per axis) for every element of the box, row-major.
template <class Visit>
void for_each(const Range (&box)[kAxes], const Visit& visit) {
  Coordinate c;
  for (c.axis[0] = box[0].begin; c.axis[0] < box[0].end; ++c.axis[0])
    for (c.axis[1] = box[1].begin; c.axis[1] < box[1].end; ++c.axis[1])
      for (c.axis[2] = box[2].begin; c.axis[2] < box[2].end; ++c.axis[2]) visit(c);
}

// The keys that a query attends: visit(local coordinate of the key, position of the key in the dilation group).
template <class Visit>
void for_each_key(const Problem& problem, const Position& query, const Visit& visit) {
  Range box[kAxes];
  for (int a = 0; a < kAxes; ++a) box[a] = window(query.group[a], query.position[a]);
  for_each(box, [&](const Coordinate& position) {
    Coordinate key;
    for (int a = 0; a < kAxes; ++a)
      key.axis[a] =
          query.group[a].kv_first + (position.axis[a] - query.group[a].kv_position) * problem.axis[a].dilation;
    visit(key, position);
  });
}

// The queries, among those that were passed, that attend a key.
template <class Visit>
void for_each_query(const Problem& problem, const Position& key, const Visit& visit) {
  Range box[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    const Group& g = key.group[a];
    const Range seen = inverse_window(g, key.position[a]);
    box[a] = {std::max(seen.begin, g.q_position), std::min(seen.end, g.q_position + g.q_count)};
  }
  for_each(box, [&](const Coordinate& position) {
    Coordinate query;
    for (int a = 0; a < kAxes; ++a)
      query.axis[a] = key.group[a].q_first + (position.axis[a] - key.group[a].q_position) * problem.axis[a].dilation;
    visit(query, position);
  });
}

int64_t offset(const TensorView& view, int64_t batch, const Coordinate& c, int head) {
  int64_t result = batch * view.batch_stride + head * view.head_stride;
  for (int a = 0; a < kAxes; ++a) result += c.axis[a] * view.axis_stride[a];
  return result;
}

template <class E>
E* at(const TensorView& view, int64_t batch, const Coordinate& c, int head) {
  return static_cast<E*>(view.data) + offset(view, batch, c, head);
}

// Token s of additional keys or values [B, S, Hkv, D].
template <class E>
E* additional_at(const TensorView& view, int64_t batch, int64_t s, int head) {
  return static_cast<E*>(view.data) + batch * view.batch_stride + s * view.axis_stride[2] + head * view.head_stride;
}

template <class E>
Compute<E> dot(const E* a, const E* b, int count) {
  Compute<E> sum = 0;
  for (int c = 0; c < count; ++c) sum += widen(a[c]) * widen(b[c]);
  return sum;
}

template <class E>
void add_scaled(Compute<E>* sum, Compute<E> weight, const E* row, int count) {
  for (int c = 0; c < count; ++c) sum[c] += weight * widen(row[c]);
}

template <class E>
void store(E* row, const Compute<E>* values, Compute<E> factor, int count) {
  for (int c = 0; c < count; ++c) narrow(values[c] * factor, row[c]);
}

// Runs body(batch, coordinate, head) over all tokens of a [B, lengths..., heads] tensor, on all threads.
template <class Body>
void parallel_tokens(int64_t batch, const Coordinate& lengths, int heads, const Body& body) {
  const int64_t count = batch * lengths.axis[0] * lengths.axis[1] * lengths.axis[2] * heads;
  cpu::parallel_for(count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t rest = i;
      const int head = static_cast<int>(rest % heads);
      rest /= heads;
      Coordinate c;
      for (int a = kAxes - 1; a >= 0; --a) {
        c.axis[a] = static_cast<int>(rest % lengths.axis[a]);
        rest /= lengths.axis[a];
      }
      body(rest, c, head);
    }
  });
}

Coordinate query_lengths(const Problem& p) { return {{p.axis[0].q_length, p.axis[1].q_length, p.axis[2].q_length}}; }
Coordinate key_lengths(const Problem& p) { return {{p.axis[0].kv_length, p.axis[1].kv_length, p.axis[2].kv_length}}; }

template <class E>
void forward_as(const ForwardArguments& arguments) {
  using T = Compute<E>;
  const Problem& problem = arguments.problem;
  const int d = problem.head_dim, dv = problem.head_dim_v;
  const T scale = static_cast<T>(problem.scale);
  parallel_tokens(problem.batch, query_lengths(problem), problem.heads, [&](int64_t b, const Coordinate& query, int h) {
    const int h_kv = h / (problem.heads / problem.heads_kv);
    const E* q = at<E>(arguments.query, b, query, h);
    const Position position = query_position(problem, query);

    std::vector<T> weights;
    for_each_key(problem, position, [&](const Coordinate& key, const Coordinate&) {
      weights.push_back(scale * dot(q, at<E>(arguments.key, b, key, h_kv), d));
    });
    for (int64_t s = 0; s < problem.additional; ++s)
      weights.push_back(scale * dot(q, additional_at<E>(arguments.additional_keys, b, s, h_kv), d));

    const T largest = *std::max_element(weights.begin(), weights.end());
    T sum = 0;
    for (T& weight : weights) sum += weight = std::exp(weight - largest);

    std::vector<T> out(dv, T(0));
    auto weight = weights.begin();
    for_each_key(problem, position, [&](const Coordinate& key, const Coordinate&) {
      add_scaled(out.data(), *weight++, at<E>(arguments.value, b, key, h_kv), dv);
    });
    for (int64_t s = 0; s < problem.additional; ++s)
      add_scaled(out.data(), *weight++, additional_at<E>(arguments.additional_values, b, s, h_kv), dv);

    store(at<E>(arguments.out, b, query, h), out.data(), 1 / sum, dv);
    *at<T>(arguments.logsumexp, b, query, h) = largest + std::log(sum);
  });
}

// With P = exp(S - logsumexp) and dP = dO V^T:  dS = P (dP - delta),  delta = rowsum(dO O) - grad_logsumexp,
// because d logsumexp / dS = P. Then dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
template <class E>
class Backward {
 public:
  explicit Backward(const BackwardArguments& arguments)
      : arguments_(arguments), problem_(arguments.problem), group_heads_(problem_.heads / problem_.heads_kv) {}

  void run() {
    const Coordinate queries = query_lengths(problem_);
    delta_.resize(problem_.batch * queries.axis[0] * queries.axis[1] * queries.axis[2] * problem_.heads);
    parallel_tokens(problem_.batch, queries, problem_.heads,
                    [&](int64_t b, const Coordinate& query, int h) { compute_delta(b, query, h); });
    parallel_tokens(problem_.batch, queries, problem_.heads,
                    [&](int64_t b, const Coordinate& query, int h) { query_gradient(b, query, h); });
    parallel_tokens(problem_.batch, key_lengths(problem_), problem_.heads_kv,
                    [&](int64_t b, const Coordinate& key, int h) { key_gradients(b, key, h); });
    const Coordinate additional = {{1, 1, static_cast<int>(problem_.additional)}};
    parallel_tokens(problem_.batch, additional, problem_.heads_kv,
                    [&](int64_t b, const Coordinate& c, int h) { additional_gradients(b, c.axis[2], h); });
  }

 private:
  using T = Compute<E>;
  struct Weights {
    T p, ds;
  };

  T& delta(int64_t b, const Coordinate& query, int h) {
    int64_t index = b;
    for (int a = 0; a < kAxes; ++a) index = index * problem_.axis[a].q_length + query.axis[a];
    return delta_[index * problem_.heads + h];
  }

  void compute_delta(int64_t b, const Coordinate& query, int h) {
    T value = dot(at<E>(arguments_.grad_out, b, query, h), at<E>(arguments_.out, b, query, h), problem_.head_dim_v);
    if (arguments_.grad_logsumexp.data) value -= *at<T>(arguments_.grad_logsumexp, b, query, h);
    delta(b, query, h) = value;
  }

  Weights weights(int64_t b, const Coordinate& query, int h, const E* key, const E* value) {
    const T s = static_cast<T>(problem_.scale) * dot(at<E>(arguments_.query, b, query, h), key, problem_.head_dim);
    const T p = std::exp(s - *at<T>(arguments_.logsumexp, b, query, h));
    const T dp = dot(at<E>(arguments_.grad_out, b, query, h), value, problem_.head_dim_v);
    return {p, p * (dp - delta(b, query, h))};
  }

  void query_gradient(int64_t b, const Coordinate& query, int h) {
    const int h_kv = h / group_heads_, d = problem_.head_dim;
    std::vector<T> dq(d, T(0));
    const auto add = [&](const E* key, const E* value) {
      add_scaled(dq.data(), weights(b, query, h, key, value).ds, key, d);
    };
    for_each_key(problem_, query_position(problem_, query), [&](const Coordinate& key, const Coordinate&) {
      add(at<E>(arguments_.key, b, key, h_kv), at<E>(arguments_.value, b, key, h_kv));
    });
    for (int64_t s = 0; s < problem_.additional; ++s)
      add(additional_at<E>(arguments_.additional_keys, b, s, h_kv),
          additional_at<E>(arguments_.additional_values, b, s, h_kv));
    store(at<E>(arguments_.grad_query, b, query, h), dq.data(), static_cast<T>(problem_.scale), d);
  }

  // Gradients of one key and its value, summed over `queries(visit)`.
  template <class Queries>
  void gather(int64_t b, int h_kv, const E* key, const E* value, E* grad_key, E* grad_value, const Queries& queries) {
    const int d = problem_.head_dim, dv = problem_.head_dim_v;
    std::vector<T> dk(d, T(0)), dvalue(dv, T(0));
    for (int h = h_kv * group_heads_; h < (h_kv + 1) * group_heads_; ++h) {
      queries([&](const Coordinate& query) {
        const Weights w = weights(b, query, h, key, value);
        add_scaled(dk.data(), w.ds, at<E>(arguments_.query, b, query, h), d);
        add_scaled(dvalue.data(), w.p, at<E>(arguments_.grad_out, b, query, h), dv);
      });
    }
    store(grad_key, dk.data(), static_cast<T>(problem_.scale), d);
    store(grad_value, dvalue.data(), T(1), dv);
  }

  void key_gradients(int64_t b, const Coordinate& key, int h_kv) {
    const Position position = key_position(problem_, key);
    gather(b, h_kv, at<E>(arguments_.key, b, key, h_kv), at<E>(arguments_.value, b, key, h_kv),
           at<E>(arguments_.grad_key, b, key, h_kv), at<E>(arguments_.grad_value, b, key, h_kv),
           [&](const auto& visit) {
             for_each_query(problem_, position, [&](const Coordinate& query, const Coordinate&) { visit(query); });
           });
  }

  void additional_gradients(int64_t b, int64_t s, int h_kv) {
    Range all[kAxes];
    for (int a = 0; a < kAxes; ++a) all[a] = {0, problem_.axis[a].q_length};
    gather(b, h_kv, additional_at<E>(arguments_.additional_keys, b, s, h_kv),
           additional_at<E>(arguments_.additional_values, b, s, h_kv),
           additional_at<E>(arguments_.grad_additional_keys, b, s, h_kv),
           additional_at<E>(arguments_.grad_additional_values, b, s, h_kv),
           [&](const auto& visit) { for_each(all, visit); });
  }

  const BackwardArguments& arguments_;
  const Problem& problem_;
  const int group_heads_;
  std::vector<T> delta_;  // [B, X, Y, Z, H]
};

// Row-major index of the key at `key_position` among the slots of the query's window.
int64_t slot(const Position& query, const Coordinate& key_position, const int (&slots)[kAxes]) {
  int64_t index = 0;
  for (int a = 0; a < kAxes; ++a)
    index = index * slots[a] + key_position.axis[a] - window(query.group[a], query.position[a]).begin;
  return index;
}

// Row-major index into [2 k0 - 1, 2 k1 - 1, 2 k2 - 1].
int64_t relative_index(const Position& query, const Coordinate& key_position) {
  int64_t index = 0;
  for (int a = 0; a < kAxes; ++a) {
    const int k = query.group[a].kernel_size;
    index = index * (2 * k - 1) + key_position.axis[a] - query.position[a] + k - 1;
  }
  return index;
}

int64_t relative_count(const Problem& problem) {
  int64_t count = 1;
  for (int a = 0; a < kAxes; ++a) count *= 2 * make_group(problem.axis[a], 0).kernel_size - 1;
  return count;
}

template <class E>
void qk_as(const UnfusedArguments& arguments) {
  using T = Compute<E>;
  const Problem& problem = arguments.problem;
  const int64_t slots = int64_t(1) * arguments.slots[0] * arguments.slots[1] * arguments.slots[2];
  parallel_tokens(problem.batch, query_lengths(problem), problem.heads, [&](int64_t b, const Coordinate& query, int h) {
    const int h_kv = h / (problem.heads / problem.heads_kv);
    const Position position = query_position(problem, query);
    E* row = at<E>(arguments.c, b, query, h);
    for (int64_t w = 0; w < slots; ++w) narrow(-std::numeric_limits<T>::infinity(), row[w]);
    for_each_key(problem, position, [&](const Coordinate& key, const Coordinate& key_position) {
      T logit = static_cast<T>(problem.scale) *
                dot(at<E>(arguments.a, b, query, h), at<E>(arguments.b, b, key, h_kv), problem.head_dim);
      if (arguments.rpb) {
        const int64_t index = h * relative_count(problem) + relative_index(position, key_position);
        logit += widen(static_cast<const E*>(arguments.rpb)[index]);
      }
      narrow(logit, row[slot(position, key_position, arguments.slots)]);
    });
  });
}

template <class E>
void av_as(const UnfusedArguments& arguments) {
  using T = Compute<E>;
  const Problem& problem = arguments.problem;
  parallel_tokens(problem.batch, query_lengths(problem), problem.heads, [&](int64_t b, const Coordinate& query, int h) {
    const int h_kv = h / (problem.heads / problem.heads_kv);
    const Position position = query_position(problem, query);
    const E* row = at<E>(arguments.a, b, query, h);
    std::vector<T> out(problem.head_dim, T(0));
    for_each_key(problem, position, [&](const Coordinate& key, const Coordinate& key_position) {
      add_scaled(out.data(), widen(row[slot(position, key_position, arguments.slots)]),
                 at<E>(arguments.b, b, key, h_kv), problem.head_dim);
    });
    store(at<E>(arguments.c, b, query, h), out.data(), static_cast<T>(problem.scale), problem.head_dim);
  });
}

template <class E>
void inverse_av_as(const UnfusedArguments& arguments) {
  using T = Compute<E>;
  const Problem& problem = arguments.problem;
  const int group_heads = problem.heads / problem.heads_kv;
  parallel_tokens(
      problem.batch, key_lengths(problem), problem.heads_kv, [&](int64_t b, const Coordinate& key, int h_kv) {
        const Position position = key_position(problem, key);
        const Coordinate key_position = {{position.position[0], position.position[1], position.position[2]}};
        std::vector<T> out(problem.head_dim, T(0));
        for (int h = h_kv * group_heads; h < (h_kv + 1) * group_heads; ++h) {
          for_each_query(problem, position, [&](const Coordinate& query, const Coordinate& query_position) {
            Position seen_by = position;
            for (int a = 0; a < kAxes; ++a) seen_by.position[a] = query_position.axis[a];
            const E* row = at<E>(arguments.a, b, query, h);
            add_scaled(out.data(), widen(row[slot(seen_by, key_position, arguments.slots)]),
                       at<E>(arguments.b, b, query, h), problem.head_dim);
          });
        }
        store(at<E>(arguments.c, b, key, h_kv), out.data(), static_cast<T>(problem.scale), problem.head_dim);
      });
}

// One thread sums a head's whole table: batch by batch and query by query, always in the same order.
template <class E>
void rpb_backward_as(const RpbBackwardArguments& arguments) {
  using T = Compute<E>;
  const Problem& problem = arguments.problem;
  const int64_t count = relative_count(problem);
  cpu::parallel_for(problem.heads, 1, [&](int64_t first_head, int64_t last_head) {
    for (int h = static_cast<int>(first_head); h < last_head; ++h) {
      std::vector<T> table(count, T(0));
      Range all[kAxes];
      for (int a = 0; a < kAxes; ++a) all[a] = {0, problem.axis[a].q_length};
      for (int64_t b = 0; b < problem.batch; ++b) {
        for_each(all, [&](const Coordinate& query) {
          const Position position = query_position(problem, query);
          const E* row = at<E>(arguments.grad_attention, b, query, h);
          for_each_key(problem, position, [&](const Coordinate&, const Coordinate& key_position) {
            table[relative_index(position, key_position)] += widen(row[slot(position, key_position, arguments.slots)]);
          });
        });
      }
      store(static_cast<E*>(arguments.grad_rpb) + h * count, table.data(), T(1), static_cast<int>(count));
    }
  });
}

// Calls run(E()) with the element type of the problem.
template <class Run>
void with_element_type(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::float64:
      return run(double());
    case ScalarType::float32:
      return run(float());
    case ScalarType::float16:
      return run(Half());
    case ScalarType::bfloat16:
      return run(BFloat16());
  }
}

}  // namespace

void forward(const ForwardArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { forward_as<decltype(e)>(arguments); });
}
void backward(const BackwardArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { Backward<decltype(e)>(arguments).run(); });
}
void qk(const UnfusedArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { qk_as<decltype(e)>(arguments); });
}
void av(const UnfusedArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { av_as<decltype(e)>(arguments); });
}
void inverse_av(const UnfusedArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { inverse_av_as<decltype(e)>(arguments); });
}
void rpb_backward(const RpbBackwardArguments& arguments) {
  with_element_type(arguments.problem.type, [&](auto e) { rpb_backward_as<decltype(e)>(arguments); });
}

}  // namespace natten::cpu_naive
