// The CPU kernel of kl_stats.
#pragma once
#include <cstdint>

#include "common/kl_stats.h"
#include "cpu/isa.h"

// What the ids of chunk `chunk` add to the divergence of entry `entry`, whose two rows exist.
UNMASK_DECLARE_KERNEL(float, kl_chunk, const unmask::KlInputs& args, int64_t entry, int64_t chunk)
