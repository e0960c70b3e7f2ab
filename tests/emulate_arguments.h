// Arguments of the C functions that tests call by ctypes, as the kernels take them.
#pragma once
#include <cstdint>

#include "common/strided.h"

template <class T>
unmask::Strided<T> strided(void* data, int64_t stride) {
  return {static_cast<T*>(data), stride};
}
