// Entry points of the row-wise kernels (kernels/elementwise.cpp).
#pragma once
#include "common/elementwise_params.h"
#include "cpu/isa.h"

UNMASK_DECLARE_KERNEL(void, rms_norm_rows, const unmask::NormParams& p, int64_t begin, int64_t end)
UNMASK_DECLARE_KERNEL(void, silu_mul_rows, const unmask::SiluParams& p, int64_t begin, int64_t end)
UNMASK_DECLARE_KERNEL(void, add_rows, const unmask::AddParams& p, int64_t begin, int64_t end)
