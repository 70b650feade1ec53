// The boxes that a block walks: of keys, those that its queries' windows need and then the additional keys; of queries,
// those that attend its keys, for every query head that reads them.
#pragma once

#include "kernels/fused_sm80/block.cuh"

namespace natten::fused_sm80 {

// Bits of a box's flags.
constexpr int kAdditionalBox = 1;  // additional keys; the origin's z counts them
constexpr int kWholeBox = 2;       // every row exists

// Lives in shared memory. One thread enters box after box into a ring of kRing places, each with the addresses of its
// first row in kTensors tensors; the block synchronises; then all threads load it.
template <int kTensors, int kRows, int kRing, int kTables = kTensors>
struct BoxWalk {
  static constexpr int kRuns = kRows / tile::kRun;
  static_assert(kRuns <= tile::kMostRuns && (kRing & (kRing - 1)) == 0);
  enum Advance { along_z, along_y, along_x, next_round, kAdvances };

  int4 box[kRing];  // origin, flags
  const char* source[kRing][kTensors];
  int64_t run_offset[kTables][kRuns];
  int64_t advance[kTensors][kAdvances];  // from the last box before such a step to the first after it

  __device__ __forceinline__ int4 at(int n) const { return box[n % kRing]; }

  // By all threads.
  __device__ __forceinline__ void fill_run_offsets(const Parameters& p, int t, const Tensor& tensor) {
    const int run = int(threadIdx.x) - t * kRuns;
    if (run >= 0 && run < kRuns) run_offset[t][run] = offset_of_run(p.box, tensor, run);
  }

  // By one thread per tensor, once the block is located. `round` is what a whole walk further means: 0 or the distance
  // of heads.
  template <class Block>
  __device__ __forceinline__ void start(const Parameters& p, const Block& block, int t, const Tensor& tensor,
                                        const char* origin, int64_t round) {
    int64_t back = 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int axis = kAxes - 1 - a;
      const int64_t box_step = tensor.step[axis] << p.box.log[axis];
      advance[t][a] = box_step - back;
      back += box_step * (boxes_along(p, block.size, axis) - 1);
    }
    advance[t][next_round] = round - back;
    source[0][t] = origin;
  }

  __device__ __forceinline__ static int boxes_along(const Parameters& p, const int (&size)[kAxes], int axis) {
    return (size[axis] + (1 << p.box.log[axis]) - 1) >> p.box.log[axis];
  }
  __device__ __forceinline__ static int boxes(const Parameters& p, const int (&size)[kAxes]) {
    return boxes_along(p, size, 0) * boxes_along(p, size, 1) * boxes_along(p, size, 2);
  }

  __device__ __forceinline__ static int whole(const Parameters& p, const int (&size)[kAxes], const int4& b) {
    return b.x + (1 << p.box.log[0]) <= size[0] && b.y + (1 << p.box.log[1]) <= size[1] &&
                   b.z + (1 << p.box.log[2]) <= size[2]
               ? kWholeBox
               : 0;
  }
  // Enters box n, the one after box n - 1.
  __device__ __forceinline__ void enter(int n, const Parameters& p, const int (&size)[kAxes]) {
    int4 b = box[(n - 1) % kRing];
    int step = along_z;
    b.z += 1 << p.box.log[2];
    if (b.z >= size[2]) {
      b.z = 0;
      b.y += 1 << p.box.log[1];
      step = along_y;
      if (b.y >= size[1]) {
        b.y = 0;
        b.x += 1 << p.box.log[0];
        step = along_x;
        if (b.x >= size[0]) {
          b.x = 0;
          step = next_round;
        }
      }
    }
    b.w = whole(p, size, b);
    box[n % kRing] = b;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) source[n % kRing][t] = source[(n - 1) % kRing][t] + advance[t][step];
  }

  // Rows of a run of the box that exist.
  __device__ __forceinline__ static int existing_rows(const Parameters& p, const int (&size)[kAxes], const int4& b,
                                                      int run) {
    const int x = b.x + (run >> p.box.log_ym), y = b.y + ((run >> p.box.log_m) & ((1 << p.box.log[1]) - 1));
    const int z = b.z + (run & ((1 << p.box.log_m) - 1)) * tile::kRun;
    return x < size[0] && y < size[1] ? size[2] - z : 0;
  }
  // By the threads whose chunk has channels: box n of tensor t.
  template <class Load>
  __device__ __forceinline__ void load(int n, int t, uint32_t tile, const Parameters& p, const int (&size)[kAxes],
                                       const Tensor& tensor, const Load& loader) const {
    const int4 b = box[n % kRing];
    loader.template load_box<kRows, 1>({tile}, {source[n % kRing][t]}, {run_offset[t]}, {tensor.step[2]},
                                       b.w & kWholeBox, [&](int run) { return existing_rows(p, size, b, run); });
  }
};

// Tensor 0: keys, 1: values. Tables 2 and 3 are those of the additional ones.
template <int kKeys, int kRing>
struct KeyWalk : BoxWalk<2, kKeys, kRing, 4> {
  using Base = BoxWalk<2, kKeys, kRing, 4>;

  int window_boxes, steps;

  __device__ __forceinline__ void fill_run_offsets(const Parameters& p) {
    Base::fill_run_offsets(p, 0, p.key);
    Base::fill_run_offsets(p, 1, p.value);
    if (threadIdx.x < Base::kRuns) {
      this->run_offset[2][threadIdx.x] = int(threadIdx.x) * tile::kRun * p.additional_key.step[2];
      this->run_offset[3][threadIdx.x] = int(threadIdx.x) * tile::kRun * p.additional_value.step[2];
    }
  }
  // By the first warp, which then enters the first boxes and synchronises.
  template <class Block>
  __device__ __forceinline__ void start(const Parameters& p, const Block& block) {
    const int lane = threadIdx.x;
    const Tensor& t = lane == 0 ? p.key : p.value;
    if (lane < 2) Base::start(p, block, lane, t, block.walk_origin(t, block.head / p.heads_per_kv), 0);
    if (lane == 0) {
      const int4 first = make_int4(0, 0, 0, 0);
      this->box[0] = make_int4(0, 0, 0, Base::whole(p, block.size, first));
      window_boxes = Base::boxes(p, block.size);
      steps = window_boxes + (p.additional + kKeys - 1) / kKeys;
    }
    __syncwarp();
  }
  template <class Block>
  __device__ __forceinline__ void enter(int n, const Parameters& p, const Block& block) {
    if (n < window_boxes) {
      Base::enter(n, p, block.size);
      return;
    }
    const int first = (n - window_boxes) * kKeys, head = block.head / p.heads_per_kv;
    this->box[n % kRing] = make_int4(0, 0, first, kAdditionalBox | (first + kKeys <= p.additional ? kWholeBox : 0));
    const Tensor &k = p.additional_key, &v = p.additional_value;
    this->source[n % kRing][0] = k.data + block.batch * k.batch + head * k.head + first * k.step[2];
    this->source[n % kRing][1] = v.data + block.batch * v.batch + head * v.head + first * v.step[2];
  }
  // By all threads: the keys (t = 0) or the values (t = 1) of box n.
  template <class Block, class Load>
  __device__ __forceinline__ void load(int n, int t, uint32_t tile, const Parameters& p, const Block& block,
                                       const Load& loader) const {
    if (loader.chunk * 8 >= (t ? p.columns_v : p.columns)) return;
    const int4 b = this->box[n % kRing];
    const int table = t + 2 * (b.w & kAdditionalBox);
    loader.template load_box<kKeys, 1>({tile}, {this->source[n % kRing][t]}, {this->run_offset[table]},
                                       {step(p, table)}, b.w & kWholeBox,
                                       [&](int run) { return existing_rows(p, block, b, run); });
  }
  // By all threads: both.
  template <class Block, class Load>
  __device__ __forceinline__ void load_both(int n, uint32_t key_tile, uint32_t value_tile, const Parameters& p,
                                            const Block& block, const Load& loader) const {
    const bool key_chunk = loader.chunk * 8 < p.columns, value_chunk = loader.chunk * 8 < p.columns_v;
    if (key_chunk != value_chunk) return load(n, value_chunk, value_chunk ? value_tile : key_tile, p, block, loader);
    if (!key_chunk) return;
    const int4 b = this->box[n % kRing];
    const int table = 2 * (b.w & kAdditionalBox);
    loader.template load_box<kKeys, 2>({key_tile, value_tile}, {this->source[n % kRing][0], this->source[n % kRing][1]},
                                       {this->run_offset[table], this->run_offset[table + 1]},
                                       {step(p, table), step(p, table + 1)}, b.w & kWholeBox,
                                       [&](int run) { return existing_rows(p, block, b, run); });
  }

 private:
  __device__ __forceinline__ static int64_t step(const Parameters& p, int table) {
    return table == 0   ? p.key.step[2]
           : table == 1 ? p.value.step[2]
           : table == 2 ? p.additional_key.step[2]
                        : p.additional_value.step[2];
  }
  template <class Block>
  __device__ __forceinline__ static int existing_rows(const Parameters& p, const Block& block, const int4& b, int run) {
    return b.w & kAdditionalBox ? p.additional - b.z - run * tile::kRun : Base::existing_rows(p, block.size, b, run);
  }
};

// Tensor 0: queries, 1: output gradients, 2: statistics, 3: accumulators of query gradients, if any. Round r of the
// walk is query head r of the group.
template <int kQueries, int kRing, bool kAccumulate>
struct QueryWalk : BoxWalk<3 + kAccumulate, kQueries, kRing> {
  using Base = BoxWalk<3 + kAccumulate, kQueries, kRing>;

  __device__ __forceinline__ void fill_run_offsets(const Parameters& p) {
    Base::fill_run_offsets(p, 0, p.query);
    Base::fill_run_offsets(p, 1, p.grad_out);
    Base::fill_run_offsets(p, 2, p.statistics);
    if constexpr (kAccumulate) Base::fill_run_offsets(p, 3, p.accumulator);
  }
  // Box number `first` of all rounds becomes box 0. By the first warp.
  template <class Block>
  __device__ __forceinline__ void start(int first, const Parameters& p, const Block& block) {
    const int nz = Base::boxes_along(p, block.size, 2), ny = Base::boxes_along(p, block.size, 1);
    const int nx = Base::boxes_along(p, block.size, 0), lane = threadIdx.x;
    if (nz * ny * nx == 0) return;
    const int z = (first % nz) << p.box.log[2], y = (first / nz % ny) << p.box.log[1];
    const int x = (first / nz / ny % nx) << p.box.log[0], head = block.head * p.heads_per_kv + first / nz / ny / nx;
    const Tensor& t = lane == 0 ? p.query : lane == 1 ? p.grad_out : lane == 2 ? p.statistics : p.accumulator;
    if (lane < 3 + kAccumulate)
      Base::start(p, block, lane, t, block.walk_origin(t, head) + box_offset(t, {x, y, z}), t.head);
    if (lane == 0) this->box[0] = make_int4(x, y, z, Base::whole(p, block.size, make_int4(x, y, z, 0)));
    __syncwarp();
  }
  // One float2 per query.
  __device__ __forceinline__ void load_statistics(int n, uint32_t destination, const Parameters& p,
                                                  const int (&size)[kAxes]) const {
    if (threadIdx.x >= kQueries) return;
    const int4 b = this->box[n % kRing];
    const int run = threadIdx.x / tile::kRun, within = threadIdx.x % tile::kRun;
    const bool inside = (b.w & kWholeBox) != 0 || within < Base::existing_rows(p, size, b, run);
    ptx::cp_async_8(destination + threadIdx.x * 8,
                    this->source[n % kRing][2] + this->run_offset[2][run] + within * p.statistics.step[2], inside);
  }
};

}  // namespace natten::fused_sm80
