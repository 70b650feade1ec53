// Tensor maps: how the copy engine reads and writes heads-last tensors in place.
//
// A map has five dimensions, whatever the problem's rank: channel (D, so that padded channels arrive as zeros), fold,
// and the z, y, x positions of one dilation group. `fold` carries head, batch item and dilation group at once: a
// dimension whose stride divides all of theirs, so each is a multiple of one coordinate. Boxes have extent 1 along it.
//
// A map must claim no position beyond a group's end: the copy engine has to deliver zeros there, not a neighbour's
// values (a masked NaN still poisons P V). Groups of a dilated axis differ in length by at most one, so a tensor has
// one map for each combination of longer and shorter axes. (Shifting the shorter groups by one position would need only
// one map, based one position before the tensor; the copy engine faults if nothing is mapped there.)
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
  int length[kAxes];               // positions of the longer groups
  bool ragged[kAxes];              // the other groups have one position less
  FoldUnits units;
};

// Null, or why no map describes the tensor [batch, ..., heads, channels]; fills `folded` otherwise. `length` and
// `dilation` per axis are local to the tensor (queries or keys).
const char* fold(const TensorView& tensor, int64_t batch, int heads, int channels, const int (&length)[kAxes],
                 const int (&dilation)[kAxes], FoldedTensor* folded);

// Fills the maps that the tensor's groups need: maps[i] for groups that are shorter along the axes in bit mask i.
// Rows of a box (`chunk_channels` elements of `type`) are swizzled if they are 128 or 64 bytes long. A tensor of floats
// is folded with strides in units of 2 bytes, like the others.
// Throws std::runtime_error if the driver refuses.
void encode(const FoldedTensor& tensor, ScalarType type, int chunk_channels, const int (&box)[kAxes],
            CUtensorMap (&maps)[kGroupShapes]);

}  // namespace natten::fused_sm90
