// The tensor copy engine of sm_90: rank-5 tensor maps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/barrier.h"

namespace natten::ptx {

// Coordinates of a box, innermost dimension first, as the maps of this project order them.
struct BoxCoordinate {
  int channel, fold, z, y, x;
};

__device__ __forceinline__ void tensor_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies a box to shared memory and counts its bytes (those of positions outside the tensor too: zeros) on `barrier`.
__device__ __forceinline__ void tensor_load(void* destination, const CUtensorMap& map, uint64_t& barrier,
                                            const BoxCoordinate& c) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c.channel), "r"(c.fold), "r"(c.z), "r"(c.y), "r"(c.x)
      : "memory");
}

// Copies a box from shared memory; positions outside the tensor are not written.
__device__ __forceinline__ void tensor_store(const void* source, const CUtensorMap& map, const BoxCoordinate& c) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(
                   shared_address(source)),
               "l"(&map), "r"(c.channel), "r"(c.fold), "r"(c.z), "r"(c.y), "r"(c.x)
               : "memory");
}

// Adds a box of floats from shared memory to the tensor, each addition atomic; positions outside are left out.
// Committed and waited for like a store.
__device__ __forceinline__ void tensor_reduce_add(const void* source, const CUtensorMap& map, const BoxCoordinate& c) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(
          shared_address(source)),
      "l"(&map), "r"(c.channel), "r"(c.fold), "r"(c.z), "r"(c.y), "r"(c.x)
      : "memory");
}

__device__ __forceinline__ void tensor_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the committed stores have read shared memory / are complete.
__device__ __forceinline__ void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void tensor_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's earlier accesses to shared memory before later ones of the copy engine and of wgmma.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace natten::ptx
