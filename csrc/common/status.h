// Bits of the int32 status words that ops write. Contents (ids, slots, lengths) cannot be checked on CUDA without a host sync, so on
// every backend a bad entry sets its bit, reads and writes nothing, and the Python API raises at the next flag read.
// python/unmask/ops.py repeats these values (tests compare them).
#pragma once
#include <cstdint>

namespace unmask {
enum Status : int32_t {
  kStatusOk = 0,
  kStatusNaN = 1,  // logits: a NaN in the row
  kStatusAllInf = 2,  // logits: no candidate above -inf
  kStatusBadRow = 4,  // row index outside the tensor it points into
  kStatusBadId = 8,  // token id outside [0, V)
  kStatusBadSlot = 16,  // K/V slot or canvas position outside its tensor
  kStatusBadSegment = 32,  // segment, length or offset outside [0, S] / not monotone
  kStatusNaNScore = 64,  // commit: a NaN score, position skipped
};
}
