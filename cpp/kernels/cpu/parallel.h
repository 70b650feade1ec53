// Threads of torch's own pool, without torch's headers in the kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace natten::cpu {

// Calls body(begin, end) over a partition of [0, count) on torch's threads; defined in ops/parallel.cpp.
// An exception thrown by the body reaches the caller.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int thread_count();

}  // namespace natten::cpu
