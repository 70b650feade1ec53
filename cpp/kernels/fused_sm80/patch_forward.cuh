// Forward for small windows: a warp owns a patch of at most 16 queries and walks exactly the keys of their union, which
// the block has loaded for all of its patches. docs/kernels/fused-sm80.md explains the schedule.
#pragma once

#include <type_traits>

#include "kernels/fused_sm80/patch_forward_block.cuh"
#include "ptx/math.h"
#include "ptx/mma.h"

namespace natten::fused_sm80 {

template <class Element_, int kHeadDim_, int kGroups_, bool kSingle_, int kMostWarps_, int kBlocksPerSm_>
struct PatchForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // D and Dv, padded with zeros
  static constexpr int kGroups = kGroups_;    // of 16 keys in a chunk
  // Every patch has one chunk, and the block one slab: no rescaling, masks and addresses once for all heads.
  static constexpr bool kSingle = kSingle_;
  static constexpr int kMostWarps = kMostWarps_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kRowBytes = kPatchRowBytes<kHeadDim>;

  // Of a warp, in shared memory.
  struct Own {
    alignas(16) char queries[tile::kPatchRows * kRowBytes];
    RowOffsets offsets[tile::kPatchRows];
    uint32_t columns[16 * kGroups];  // where the columns of a chunk lie
  };
  static_assert(sizeof(Own) % 16 == 0);
};

template <class Config>
__global__ void __launch_bounds__(Config::kMostWarps * 32, Config::kBlocksPerSm)
    patch_forward_kernel(const __grid_constant__ PatchParameters p) {
  using Element = typename Config::Element;
  constexpr int kD = Config::kHeadDim, kGroups = Config::kGroups, kRowBytes = Config::kRowBytes;
  constexpr int kRows = tile::kPatchRows;
  constexpr bool kSingle = Config::kSingle;

  // Dynamic: what belongs to each warp; keys and values of one slab or two; tables of a slab's rows.
  extern __shared__ __align__(128) char memory[];
  __shared__ PatchBlock block;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  using P = PatchParameters;

  if (warp == 0) block.locate(p);
  __syncthreads();
  if (block.empty()) return;

  typename Config::Own& own = reinterpret_cast<typename Config::Own*>(memory)[warp];
  const uint32_t own_bytes = warps * sizeof(own), slabs = ptx::shared_address(memory) + own_bytes;
  const int slab_step = p.slab_extent[p.slab_axis];
  const int slab_count = kSingle ? 1 : (block.size[p.slab_axis] + slab_step - 1) / slab_step;
  const int heads = block.heads;
  const tile::Slab slab_shape{p.slab_line, p.slab_line * p.slab_extent[1]};
  SlabRow* const slab_table = reinterpret_cast<SlabRow*>(memory + own_bytes + p.slabs * 2 * p.slab_bytes);
  if (p.head_dim < kD || p.head_dim_v < kD)  // loads leave these channels alone
    for (uint32_t i = threadIdx.x * 16; i < own_bytes + p.slabs * 2 * p.slab_bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(memory + i) = uint4{};
  fill_slab_rows<kRowBytes>(slab_table, p, block, p.tensor[P::kKey]);
  if (!p.same_steps) fill_slab_rows<kRowBytes>(slab_table + p.slab_tokens, p, block, p.tensor[P::kValue]);
  __syncthreads();
  const PatchRows rows(p, block, warp, lane, own.offsets);

  const uint32_t queries = ptx::shared_address(own.queries);
  auto load_queries = [&](int head) {  // counted in the set
    constexpr int kLanes = kD / 8;
    const int chunk = lane % kLanes;
    const char* origin = block.origin[P::kQuery] + (block.first_head + head) * p.tensor[P::kQuery].head + chunk * 16;
    if (chunk * 8 >= p.head_dim) return;
#pragma unroll
    for (int row = lane / kLanes; row < kRows; row += 32 / kLanes)
      if ((rows.exist >> row) & 1)
        ptx::cp_async_16(queries + row * kRowBytes + chunk * 16, origin + own.offsets[row].query);
  };
  const int slab_axis_rows =  // of a slab, per step along its axis
      p.slab_axis == 0   ? p.slab_extent[1] * p.slab_extent[2]
      : p.slab_axis == 1 ? p.slab_extent[2]
                         : 1;
  auto load = [&](int which, int channels, int head, int slab, uint32_t destination) {
    const PatchTensor& t = p.tensor[which];
    const char* origin = block.origin[which] + int(p.heads_per_kv.quotient(block.first_head + head)) * t.head;
    if constexpr (!kSingle) origin += int64_t(slab * slab_step) * t.step[p.slab_axis];
    const int steps = kSingle ? block.size[p.slab_axis] : min(block.size[p.slab_axis] - slab * slab_step, slab_step);
    load_slab<kD>(destination, slab_table + (which == P::kKey || p.same_steps ? 0 : p.slab_tokens), origin,
                  steps * slab_axis_rows, channels);
  };
  auto load_keys = [&](int head, int slab, int buffer) {
    load(P::kKey, p.head_dim, head, slab, slabs + buffer * 2 * p.slab_bytes);
  };
  auto load_values = [&](int head, int slab, int buffer) {
    load(P::kValue, p.head_dim_v, head, slab, slabs + (buffer * 2 + 1) * p.slab_bytes);
  };

  load_queries(0);
  load_keys(0, 0, 0);
  if (kSingle) ptx::cp_async_commit();
  load_values(0, 0, 0);
  ptx::cp_async_commit();

  // ---- one chunk of keys
  const float scale_log2 = fmaxf(fabsf(p.scale_log2), 1e-30f);  // zero times -infinity would be NaN
  float out[kD / 8][4];
  float maximum[2], sum[2];  // of the unscaled scores; of this thread's columns
  float s[2 * kGroups][4];

  // Where the columns of a chunk lie: for one that begins at the slab's first row; they depend on the chunk's width
  // alone.
  auto locate_columns = [&](int width, tile::SmallDivisor by_width, uint32_t first, uint32_t last) {
    const int skip = (p.slab_line - width) * kRowBytes;
    __syncwarp();
#pragma unroll
    for (int j = lane; j < 16 * kGroups; j += 32)
      own.columns[j] = min(first + j * kRowBytes + by_width.quotient(j) * skip, last);
    __syncwarp();
  };
  // ldmatrix: the lane's row among 16 keys, and its 16-byte chunk, for the two operands.
  const uint32_t* const key_columns = own.columns + (lane & 7) + (lane >> 4) * 8;
  const uint32_t* const value_columns = own.columns + (lane & 15);
  const uint32_t key_chunk = (lane >> 3 & 1) * 16, value_chunk = (lane >> 4) * 16;

  // Where a chunk begins, and its last row; columns past the end repeat the last one.
  struct ChunkAt {
    uint32_t first, last;
    int groups;
  };
  auto locate_chunk = [&](const tile::Chunk& chunk, uint32_t slab) {
    const uint32_t first = slab + slab_shape.row(chunk.x, chunk.y, chunk.z) * kRowBytes;
    const uint32_t last = first + ((chunk.lines - 1) * p.slab_line + chunk.width - 1) * kRowBytes;
    return ChunkAt{first, last, (chunk.columns() + 15) / 16};
  };
  auto address = [&](const ChunkAt& at, const uint32_t* lane_columns, int group) {
    const uint32_t column = lane_columns[16 * group];
    return kSingle ? column : min(at.first + column, at.last);
  };
  // Calls body with a number of groups, compiled in, that is at least `groups`. Chunks of one-chunk patches are passed
  // by a branch per group instead: their scores fill the registers.
  auto with_groups = [&](int groups, auto body) {
    if (kSingle || groups > kGroups - 1)
      body(std::integral_constant<int, kGroups>());
    else if (groups > kGroups - 2)
      body(std::integral_constant<int, kGroups - 1>());
    else if (groups > kGroups - 3)
      body(std::integral_constant<int, kGroups - 2>());
    else
      body(std::integral_constant<int, kGroups - 3>());
  };
  uint32_t q[kD / 16][4];
  auto read_queries = [&] {
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
      ptx::ldmatrix_x4(q[k], queries + (lane & 15) * kRowBytes + 32 * k + (lane >> 4) * 16);
    if (p.scale < 0) {  // softmax wants a positive scale: its sign moves into the queries
#pragma unroll
      for (int k = 0; k < kD / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] ^= 0x80008000u;
    }
  };
  // Masked scores of a chunk, and the largest of each row.
  auto compute_scores = [&](const ChunkAt& at, const tile::PatchMask& mask, float (&largest)[2]) {
    with_groups(at.groups, [&](auto groups) {
      constexpr int kCount = decltype(groups)::value;
#pragma unroll
      for (int g = 0; g < kCount; ++g)
        if (!kSingle || g < at.groups) {
          const uint32_t key = address(at, key_columns, g) + key_chunk;
#pragma unroll
          for (int e = 0; e < 4; ++e) s[2 * g][e] = s[2 * g + 1][e] = 0.f;
#pragma unroll
          for (int k = 0; k < kD / 16; ++k) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, key + 32 * k);
            ptx::mma_m16n8k16(s[2 * g], q[k], b[0], b[1], Element());
            ptx::mma_m16n8k16(s[2 * g + 1], q[k], b[2], b[3], Element());
          }
        }
      largest[0] = largest[1] = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2 * kCount; ++j)
        if (!kSingle || j / 2 < at.groups) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            if (!mask.keeps(j, e)) s[j][e] = -INFINITY;
            if (!mask.keeps(j, e + 1)) s[j][e + 1] = -INFINITY;
            largest[e / 2] = fmaxf(largest[e / 2], fmaxf(s[j][e], s[j][e + 1]));
          }
        }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 2));
    }
  };
  auto add_values = [&](const ChunkAt& at) {
    float reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) reference[r] = maximum[r] == -INFINITY ? 0.f : maximum[r] * scale_log2;
    with_groups(at.groups, [&](auto groups) {
      constexpr int kCount = decltype(groups)::value;
#pragma unroll
      for (int g = 0; g < kCount; ++g)
        if (!kSingle || g < at.groups) {
          uint32_t weights[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = &s[2 * g + i / 2][2 * (i % 2)];
            const float low = ptx::exp2(fmaf(pair[0], scale_log2, -reference[i % 2]));
            const float high = ptx::exp2(fmaf(pair[1], scale_log2, -reference[i % 2]));
            sum[i % 2] += low + high;
            weights[i] = ptx::pack(low, high, Element());
          }
          const uint32_t value = address(at, value_columns, g) + value_chunk + p.slab_bytes;
#pragma unroll
          for (int d = 0; d < kD / 16; ++d) {
            uint32_t b[4];
            ptx::ldmatrix_x4_transposed(b, value + 32 * d);
            ptx::mma_m16n8k16(out[2 * d], weights, b[0], b[1], Element());
            ptx::mma_m16n8k16(out[2 * d + 1], weights, b[2], b[3], Element());
          }
        }
    });
  };
  auto clear = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maximum[r] = -INFINITY;
      sum[r] = 0.f;
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0.f;
  };
  // Neighbouring lanes exchange pairs of channels, so that each stores four consecutive ones: whole sectors per row.
  auto store = [&](int head) {
    const int odd = lane & 1, quad = lane % 4;
    const PatchTensor &to = p.tensor[P::kOut], &tl = p.tensor[P::kLogsumexp];
    char* const out_origin = const_cast<char*>(block.origin[P::kOut]) + (block.first_head + head) * to.head;
    char* const logsumexp_origin = const_cast<char*>(block.origin[P::kLogsumexp]) + (block.first_head + head) * tl.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
      const float inverse = ptx::reciprocal(sum[r]);
      const int row = 8 * r + lane / 4;
      const bool exists = (rows.exist >> row) & 1;
      char* const destination = out_origin + own.offsets[row].out;
#pragma unroll
      for (int j = 0; j < kD / 8; j += 2) {
        const uint32_t even_block = ptx::pack(out[j][2 * r] * inverse, out[j][2 * r + 1] * inverse, Element());
        const uint32_t odd_block = ptx::pack(out[j + 1][2 * r] * inverse, out[j + 1][2 * r + 1] * inverse, Element());
        const uint32_t received = __shfl_xor_sync(~0u, odd ? even_block : odd_block, 1);
        const int channel = 8 * (j + odd) + 2 * (quad - odd);
        if (exists && channel < p.head_dim_v)
          *reinterpret_cast<uint2*>(destination + 2 * channel) =
              odd ? make_uint2(received, odd_block) : make_uint2(even_block, received);
      }
      if (quad == 0 && exists)
        *reinterpret_cast<float*>(logsumexp_origin + own.offsets[row].logsumexp) =
            (maximum[r] * scale_log2 + __log2f(sum[r])) * 0.6931471805599453f;
    }
  };

  if constexpr (kSingle) {
    const tile::Chunk chunk{rows.needed[0].begin, rows.needed[1].begin, rows.needed[2].begin, rows.needed[1].size(),
                            rows.needed[2].size()};
    const auto by_width = tile::SmallDivisor::make(chunk.width);
    ChunkAt at = locate_chunk(chunk, slabs);
    if (rows.exist == 0) at.groups = 0;
    locate_columns(chunk.width, by_width, at.first, at.last);
    const Range across{rows.window[2].begin - chunk.z, rows.window[2].end - chunk.z};
    const Range lines{rows.window[1].begin - chunk.y, rows.window[1].end - chunk.y};
    const tile::PatchMask mask = tile::PatchMask::distribute(
        tile::column_pattern(across, chunk.width, by_width, lane >> 4) & tile::line_bits(lines, chunk.width, lane >> 4),
        lane);
    // Keys of the next head arrive during the second product, values of this one during the first.
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
      if (head == 0)
        ptx::cp_async_wait<1>();
      else
        ptx::cp_async_wait<0>();
      __syncthreads();
      if (head > 0) {
        load_values(head, 0, 0);
        ptx::cp_async_commit();
      }
      read_queries();
      compute_scores(at, mask, maximum);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (head + 1 < heads) {
        load_queries(head + 1);
        load_keys(head + 1, 0, 0);
        ptx::cp_async_commit();
      }
      sum[0] = sum[1] = 0.f;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] = 0.f;
      add_values(at);
      store(head);
    }
  } else {
    const int steps = heads * slab_count;
    int head = 0, slab = 0;
    clear();
    // Planes that this thread's two rows attend.
    const int first_row = lane / 4, second_row = lane / 4 + 8;
    const Range planes[2] = {
        {__shfl_sync(~0u, rows.window[0].begin, first_row), __shfl_sync(~0u, rows.window[0].end, first_row)},
        {__shfl_sync(~0u, rows.window[0].begin, second_row), __shfl_sync(~0u, rows.window[0].end, second_row)}};
    // Masks within a plane are kept while chunks repeat their lines and columns in other planes, columns while they
    // repeat their width.
    tile::Chunk known{0, -1, -1, 0, 0};
    tile::SmallDivisor by_width{};
    uint64_t pattern = 0;
    tile::PatchMask plane_mask{};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (slab == 0) read_queries();
      const int next_slab = slab + 1 < slab_count ? slab + 1 : 0, next_head = next_slab == 0 ? head + 1 : head;
      if (next_head < heads) {
        if (next_slab == 0) load_queries(next_head);
        load_keys(next_head, next_slab, (step + 1) & 1);
        load_values(next_head, next_slab, (step + 1) & 1);
        ptx::cp_async_commit();
      }

      // The part of the patch's keys that lies in this slab.
      Range part[kAxes];
      int shift[kAxes];
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        shift[a] = a == p.slab_axis ? slab * slab_step : 0;
        part[a] = {max(rows.needed[a].begin - shift[a], 0), min(rows.needed[a].end - shift[a], p.slab_extent[a])};
      }
      if (rows.exist != 0 && part[0].size() > 0 && part[1].size() > 0 && part[2].size() > 0) {
        const auto shape = tile::ChunkShape::make<16 * kGroups>(part[1].size(), part[2].size());
        const uint32_t buffer = slabs + (step & 1) * 2 * p.slab_bytes;
        int x = part[0].begin, y = part[1].begin, z = part[2].begin;
#pragma unroll 1
        do {
          const tile::Chunk chunk{x, y, z, min(shape.lines, part[1].end - y), min(shape.width, part[2].end - z)};
          const ChunkAt at = locate_chunk(chunk, buffer);
          const bool same_width = chunk.width == known.width, same_z = same_width && z + shift[2] == known.z;
          if (!same_width) {
            by_width = tile::SmallDivisor::make(chunk.width);
            locate_columns(chunk.width, by_width, 0, ~0u);
          }
          if (!same_z) {
            const Range across{min(max(rows.window[2].begin - shift[2] - z, 0), chunk.width),
                               min(max(rows.window[2].end - shift[2] - z, 0), chunk.width)};
            pattern = tile::column_pattern(across, chunk.width, by_width, lane >> 4);
          }
          if (!same_z || y + shift[1] != known.y || chunk.lines != known.lines) {
            const Range lines{min(max(rows.window[1].begin - shift[1] - y, 0), chunk.lines),
                              min(max(rows.window[1].end - shift[1] - y, 0), chunk.lines)};
            plane_mask = tile::PatchMask::distribute(pattern & tile::line_bits(lines, chunk.width, lane >> 4), lane);
            known = {0, y + shift[1], z + shift[2], chunk.lines, chunk.width};
          }
          const tile::PatchMask mask =
              plane_mask.rows(planes[0].contains(x + shift[0]), planes[1].contains(x + shift[0]));

          float largest[2];
          compute_scores(at, mask, largest);
          if (__any_sync(~0u, largest[0] > maximum[0] || largest[1] > maximum[1])) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float next = fmaxf(maximum[r], largest[r]);
              const float factor = next == maximum[r] ? 1.f : ptx::exp2((maximum[r] - next) * scale_log2);
              maximum[r] = next;
              sum[r] *= factor;
#pragma unroll
              for (int j = 0; j < kD / 8; ++j) {
                out[j][2 * r] *= factor;
                out[j][2 * r + 1] *= factor;
              }
            }
          }
          add_values(at);
          // Next chunk: along x, then y, then z, so that masks are kept for long.
          if (++x >= part[0].end) {
            x = part[0].begin;
            y += shape.lines;
            if (y >= part[1].end) {
              y = part[1].begin;
              z += shape.width;
            }
          }
        } while (z < part[2].end);
      }
      if (next_slab == 0) {
        store(head);
        clear();
      }
      head = next_head;
      slab = next_slab;
    }
  }
}

}  // namespace natten::fused_sm80
