// The floating types that ops take, as kernels name them.
#pragma once
#include <cstdint>

namespace unmask {

enum class FloatType : int32_t { f32, bf16, f16 };

}  // namespace unmask
