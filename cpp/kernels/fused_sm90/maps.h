// Tensor maps: how the copy engine reads and writes heads-last tensors in place.
//
// A map has five dimensions, whatever the problem's rank: channel (D, so that padded channels arrive as zeros), fold, and
// the z, y, x positions of one dilation group. `fold` carries head, batch item and dilation group at once: a dimension
// whose stride divides all of theirs, so each is a multiple of one coordinate. Boxes have extent 1 along it.
//
// Groups of a dilated axis differ in length by at most one, and a map must claim no position beyond a group's end: the
// copy engine must deliver zeros there, not a neighbour's values. Boxes never reach before a group's begin, only
// beyond its end, so positions of the shorter groups are shifted by one: all groups end at the same coordinate. For
// that the base address moves back by one position where lengths differ, and longer groups move forward again in fold.
#pragma once

#include <cuda.h>

#include "kernels/arguments.h"
#include "kernels/fused_sm90/parameters.h"

namespace natten::fused_sm90 {

// One tensor of a problem, as a map sees it.
struct FoldedTensor {
  void* base;
  int channels;
  int64_t fold_stride, fold_size;
  int64_t position_stride[kAxes];  // elements
  int length[kAxes];               // positions of the longest group
  FoldUnits units;
};

// Null, or why no map describes the tensor [batch, ..., heads, channels]; fills `folded` otherwise. `length` and
// `dilation` per axis are local to the tensor (queries or keys).
const char* fold(const TensorView& tensor, int64_t batch, int heads, int channels, const int (&length)[kAxes],
                 const int (&dilation)[kAxes], FoldedTensor* folded);

// Throws std::runtime_error if the driver refuses.
CUtensorMap encode(const FoldedTensor& tensor, ScalarType type, int chunk_channels, const int (&box)[kAxes]);

}  // namespace natten::fused_sm90
