// The CPU kernels of moe_route and moe_combine.
#pragma once
#include <cstdint>

#include "common/moe_route.h"
#include "cpu/isa.h"

// Fills `expert` and `weight` of tokens [begin, end); -1 and 0 for those that are not live.
UNMASK_DECLARE_KERNEL(void, route_tokens, const unmask::RouteParams& params, int64_t begin, int64_t end)
// Output rows of tokens [begin, end).
UNMASK_DECLARE_KERNEL(void, combine_rows, const unmask::CombineParams& params, int64_t begin, int64_t end)
