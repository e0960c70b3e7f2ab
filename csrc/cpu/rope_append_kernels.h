// Entry point of rope_append (kernels/rope_append.cpp).
#pragma once
#include "common/rope_append_params.h"
#include "cpu/isa.h"

// Tokens [begin, end).
UNMASK_DECLARE_KERNEL(void, rope_append_tokens, const unmask::RopeParams& p, int64_t begin, int64_t end, float* scratch)
