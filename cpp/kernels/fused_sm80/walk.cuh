// The boxes that a block walks: of keys, those that its queries' windows need and then the additional keys; of queries,
// those that attend its keys, for every query head that reads them.
#pragma once

#include "kernels/fused_sm80/block.cuh"

namespace natten::fused_sm80 {

// Bits of a box's flags.
constexpr int kAdditionalBox = 1;  // additional keys; the origin's z counts them
constexpr int kWholeBox = 2;       // every row exists

// Lives in shared memory. Lanes of the first warp enter the boxes, a batch of them at a time, one each, into a ring of
// two batches, with the addresses of their first rows in kTensors tensors; the block synchronises; then all threads
// load one after the other.
template <int kTensors, int kRows, int kBatch_, int kTables = kTensors>
struct BoxWalk {
  static constexpr int kRuns = kRows / tile::kRun;
  static_assert(kRuns <= tile::kMostRuns);
  static constexpr int kBatch = kBatch_, kRing = 2 * kBatch;

  int4 box[kRing];  // origin, flags
  const char* source[kRing][kTensors];
  int64_t run_offset[kTables][kRuns];
  const char* origin[kTensors];  // of the needed positions
  int count[kAxes];              // boxes along the axes

  __device__ __forceinline__ int4 at(int n) const { return box[n % kRing]; }

  // By all threads.
  __device__ __forceinline__ void fill_run_offsets(const Parameters& p, int t, const Tensor& tensor) {
    const int run = int(threadIdx.x) - t * kRuns;
    if (run >= 0 && run < kRuns) run_offset[t][run] = offset_of_run(p.box, tensor, run);
  }

  // Boxes along the axes, by lanes of the first warp.
  __device__ __forceinline__ void count_boxes(const Parameters& p, const int (&size)[kAxes]) {
    if (threadIdx.x < kAxes) count[threadIdx.x] = boxes_along(p, size, threadIdx.x);
  }
  __device__ __forceinline__ static int boxes_along(const Parameters& p, const int (&size)[kAxes], int axis) {
    return (size[axis] + (1 << p.box.log[axis]) - 1) >> p.box.log[axis];
  }
  __device__ __forceinline__ static int boxes(const Parameters& p, const int (&size)[kAxes]) {
    return boxes_along(p, size, 0) * boxes_along(p, size, 1) * boxes_along(p, size, 2);
  }

  // Enters box n, the `number`th of the walk; returns the round: how many whole walks lie before it.
  __device__ __forceinline__ int enter_box(int n, int number, const Parameters& p, const int (&size)[kAxes]) {
    const int rows = number / count[2], planes = rows / count[1], round = planes / count[0];
    const int4 b = {(planes - round * count[0]) << p.box.log[0], (rows - planes * count[1]) << p.box.log[1],
                    (number - rows * count[2]) << p.box.log[2], 0};
    const bool whole = b.x + (1 << p.box.log[0]) <= size[0] && b.y + (1 << p.box.log[1]) <= size[1] &&
                       b.z + (1 << p.box.log[2]) <= size[2];
    box[n % kRing] = {b.x, b.y, b.z, whole ? kWholeBox : 0};
    return round;
  }
  __device__ __forceinline__ void enter_source(int n, int t, const Tensor& tensor, int round) {
    const int4 b = at(n);
    source[n % kRing][t] = origin[t] + box_offset(tensor, {b.x, b.y, b.z}) + round * tensor.head;
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
template <int kKeys>
struct KeyWalk : BoxWalk<2, kKeys, 8, 4> {
  using Base = BoxWalk<2, kKeys, 8, 4>;

  int window_boxes, steps;

  __device__ __forceinline__ void fill_run_offsets(const Parameters& p) {
    Base::fill_run_offsets(p, 0, p.key);
    Base::fill_run_offsets(p, 1, p.value);
    if (threadIdx.x < Base::kRuns) {
      this->run_offset[2][threadIdx.x] = int(threadIdx.x) * tile::kRun * p.additional_key.step[2];
      this->run_offset[3][threadIdx.x] = int(threadIdx.x) * tile::kRun * p.additional_value.step[2];
    }
  }
  // By the first warp; enters the first batch.
  template <class Block>
  __device__ __forceinline__ void start(const Parameters& p, const Block& block) {
    Base::count_boxes(p, block.size);
    if (threadIdx.x == 0) {
      const int head = block.head / p.heads_per_kv;
      this->origin[0] = block.walk_origin(p.key, head);
      this->origin[1] = block.walk_origin(p.value, head);
      window_boxes = Base::boxes(p, block.size);
      steps = window_boxes + (p.additional + kKeys - 1) / kKeys;
    }
    __syncwarp();
    enter(0, p, block);
  }
  // By the first warp: the batch that begins with box `first`.
  template <class Block>
  __device__ __forceinline__ void enter(int first, const Parameters& p, const Block& block) {
    const int n = first + int(threadIdx.x);
    if (threadIdx.x >= Base::kBatch || n >= steps) return;
    if (n < window_boxes) {
      Base::enter_box(n, n, p, block.size);
      Base::enter_source(n, 0, p.key, 0);
      Base::enter_source(n, 1, p.value, 0);
      return;
    }
    const int key = (n - window_boxes) * kKeys, head = block.head / p.heads_per_kv;
    this->box[n % Base::kRing] = make_int4(0, 0, key, kAdditionalBox | (key + kKeys <= p.additional ? kWholeBox : 0));
    const Tensor &k = p.additional_key, &v = p.additional_value;
    this->source[n % Base::kRing][0] = k.data + block.batch * k.batch + head * k.head + key * k.step[2];
    this->source[n % Base::kRing][1] = v.data + block.batch * v.batch + head * v.head + key * v.step[2];
  }
  // By all threads, at every step: a batch ahead.
  template <class Block>
  __device__ __forceinline__ void enter_ahead(int step, const Parameters& p, const Block& block) {
    if (step % Base::kBatch == 0 && threadIdx.x < 32) enter(step + Base::kBatch, p, block);
  }
  // By all threads: the keys (t = 0) or the values (t = 1) of box n.
  template <class Block, class Load>
  __device__ __forceinline__ void load(int n, int t, uint32_t tile, const Parameters& p, const Block& block,
                                       const Load& loader) const {
    if (loader.chunk * 8 >= (t ? p.columns_v : p.columns)) return;
    const int4 b = this->box[n % Base::kRing];
    const int table = t + 2 * (b.w & kAdditionalBox);
    loader.template load_box<kKeys, 1>({tile}, {this->source[n % Base::kRing][t]}, {this->run_offset[table]},
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
    const int4 b = this->box[n % Base::kRing];
    const int table = 2 * (b.w & kAdditionalBox);
    loader.template load_box<kKeys, 2>(
        {key_tile, value_tile}, {this->source[n % Base::kRing][0], this->source[n % Base::kRing][1]},
        {this->run_offset[table], this->run_offset[table + 1]}, {step(p, table), step(p, table + 1)}, b.w & kWholeBox,
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
// walk is query head r of the group. Larger batches would not leave sm_86 room for the wide tiles of D 64.
template <int kQueries, bool kAccumulate>
struct QueryWalk : BoxWalk<3 + kAccumulate, kQueries, 4> {
  using Base = BoxWalk<3 + kAccumulate, kQueries, 4>;

  int first, steps;  // of the boxes of all rounds

  __device__ __forceinline__ void fill_run_offsets(const Parameters& p) {
    Base::fill_run_offsets(p, 0, p.query);
    Base::fill_run_offsets(p, 1, p.grad_out);
    Base::fill_run_offsets(p, 2, p.statistics);
    if constexpr (kAccumulate) Base::fill_run_offsets(p, 3, p.accumulator);
  }
  // By the first warp; enters the first batch. The block's share of the walk is all of it, but for the additional keys.
  template <class Block>
  __device__ __forceinline__ void start(const Parameters& p, const Block& block) {
    Base::count_boxes(p, block.size);
    if (threadIdx.x == 0) {
      const int head = block.head * p.heads_per_kv;
      this->origin[0] = block.walk_origin(p.query, head);
      this->origin[1] = block.walk_origin(p.grad_out, head);
      this->origin[2] = block.walk_origin(p.statistics, head);
      if constexpr (kAccumulate) this->origin[3] = block.walk_origin(p.accumulator, head);
      const int64_t boxes = int64_t(Base::boxes(p, block.size)) * p.heads_per_kv;
      first = int(boxes * block.part / int(p.parts.value));
      steps = int(boxes * (block.part + 1) / int(p.parts.value)) - first;
    }
    __syncwarp();
    enter(0, p, block);
  }
  // By the first warp: the batch that begins with box n.
  template <class Block>
  __device__ __forceinline__ void enter(int n, const Parameters& p, const Block& block) {
    n += int(threadIdx.x);
    if (threadIdx.x >= Base::kBatch || n >= steps) return;
    const int round = Base::enter_box(n, first + n, p, block.size);
    Base::enter_source(n, 0, p.query, round);
    Base::enter_source(n, 1, p.grad_out, round);
    Base::enter_source(n, 2, p.statistics, round);
    if constexpr (kAccumulate) Base::enter_source(n, 3, p.accumulator, round);
  }
  // By all threads, at every step: a batch ahead.
  template <class Block>
  __device__ __forceinline__ void enter_ahead(int step, const Parameters& p, const Block& block) {
    if (step % Base::kBatch == 0 && threadIdx.x < 32) enter(step + Base::kBatch, p, block);
  }
  // One float2 per query.
  __device__ __forceinline__ void load_statistics(int n, uint32_t destination, const Parameters& p,
                                                  const int (&size)[kAxes]) const {
    if (threadIdx.x >= kQueries) return;
    const int4 b = this->at(n);
    const int run = threadIdx.x / tile::kRun, within = threadIdx.x % tile::kRun;
    const bool inside = (b.w & kWholeBox) != 0 || within < Base::existing_rows(p, size, b, run);
    ptx::cp_async_8(destination + threadIdx.x * 8,
                    this->source[n % Base::kRing][2] + this->run_offset[2][run] + within * p.statistics.step[2],
                    inside);
  }
};

}  // namespace natten::fused_sm80
