// Hopper's barriers, TMA and warpgroup products on emulated warps: the names of csrc/cuda/common/hopper.cuh for the host. Include after
// emulate_warp.h, emulate_tensor_core.h and cuda/common/hopper.cuh.
//
// Boxes arrive as late as the waits allow (or at once), with the 128-byte swizzle. A product reads shared memory when it is waited for (or
// at once), and until then its accumulators read as NaN: a slot that is refilled too early, or a wait that is missing, shows. Bytes that
// were announced but not copied, or copied but not announced, leave a barrier that nobody passes.
#pragma once
#include "cuda/common/hopper.cuh"

#define UNMASK_GRID_CONSTANT

namespace unmask::cuda {

// Innermost dimension first; strides in bytes, of dimensions 1 and up.
struct TensorMap {
  const char* data;
  int rank, box_rows;
  int64_t size[5], stride[4];
};

constexpr uint32_t kSharedBase = 1024;  // an address of 0 would hide mistakes
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - Block::now().shared()) + kSharedBase;
}
inline const char* at_shared_address(uint32_t a) { return Block::now().shared() + (a - kSharedBase); }

// ---- barriers -----------------------------------------------------------------------------------------------------
inline Block::Counter& counter(uint64_t* b) {
  auto& all = Block::now().objects;
  if (all.count(b) == 0) Block::now().error("a barrier in shared memory is used before barrier_init");
  return all[b];
}
inline void settle(Block::Counter& c) {
  if (c.left == 0 && c.bytes == 0) c.left = c.arrivals, c.phase ^= 1u;
}
inline void barrier_init(uint64_t* b, int arrivals) {
  check_aligned(b, 8);
  if (!Block::now().in_shared(b, 8)) Block::now().error("a barrier outside of shared memory");
  Block::now().objects[b] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive_expecting(uint64_t* b, int bytes) {
  Block::Counter& c = counter(b);
  if (c.left <= 0) Block::now().error("more arrivals at a barrier than it counts");
  c.bytes += bytes, --c.left;
  settle(c);
}
inline void barrier_arrive(uint64_t* b) { barrier_arrive_expecting(b, 0); }
inline void barrier_wait(uint64_t* b, uint32_t parity) {
  const Block::Counter& c = counter(b);
  Block::now().wait_for([&c, parity] { return c.phase != parity; });
}
inline bool group_any(int barrier, int threads, bool mine) { return Block::now().vote(barrier, threads, mine); }
inline void fence_for_products() {}

// ---- copies -------------------------------------------------------------------------------------------------------
inline void prefetch_map(const TensorMap*) {}
inline void copy_box(char* to, const TensorMap* map, const int64_t* at, uint64_t* b) {
  if (shared_address(to) % 1024 != 0)
    Block::now().error("a box goes to a place that is not at a multiple of 1024 bytes");
  if (!Block::now().in_shared(to, static_cast<size_t>(map->box_rows) * kAtomRow))
    Block::now().error("a box goes outside of shared memory");
  Block::Counter& c = counter(b);
  int64_t from[5] = {};
  std::copy_n(at, map->rank, from);
  const auto copy = [to, map, from = std::vector<int64_t>(from, from + 5), &c] {
    for (int r = 0; r < map->box_rows; ++r) {
      bool inside = from[1] + r >= 0 && from[1] + r < map->size[1];
      int64_t offset = (from[1] + r) * map->stride[0];
      for (int d = 2; d < map->rank; ++d) {
        inside = inside && from[static_cast<size_t>(d)] >= 0 && from[static_cast<size_t>(d)] < map->size[d];
        offset += from[static_cast<size_t>(d)] * map->stride[d - 1];
      }
      for (int e = 0; e < kAtomElements; ++e) {
        uint16_t x = 0;
        if (inside && from[0] + e >= 0 && from[0] + e < map->size[0])
          std::memcpy(&x, map->data + offset + (from[0] + e) * 2, 2);
        std::memcpy(to + swizzled(r, e), &x, 2);
      }
    }
    c.bytes -= map->box_rows * kAtomRow;
    settle(c);
  };
  if (Block::now().eager_copies) copy();
  else Block::now().transfers.push_back(copy);
}
inline void copy_box(void* to, const TensorMap* map, int c0, int c1, int c2, int c3, uint64_t* b) {
  const int64_t at[] = {c0, c1, c2, c3};
  copy_box(static_cast<char*>(to), map, at, b);
}
inline void copy_box(void* to, const TensorMap* map, int c0, int c1, uint64_t* b) {
  const int64_t at[] = {c0, c1};
  copy_box(static_cast<char*>(to), map, at, b);
}

// ---- products -----------------------------------------------------------------------------------------------------
// Element (outer, k) of an operand: outer is M or N. The swizzle works on address bits, as in the hardware.
template <FloatType kType>
inline double operand(uint64_t descriptor, bool mn_major, int outer, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4,
             leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4,
             stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  const auto n = static_cast<uint32_t>(outer), kk = static_cast<uint32_t>(k);
  uint32_t a = start + (mn_major ? n / 64 * leading + kk / 8 * stride + kk % 8 * 128 + n % 64 * 2
                                 : n / 8 * stride + n % 8 * 128 + kk * 2);
  a ^= (a >> 7 & 7u) << 4;
  uint16_t x;
  std::memcpy(&x, at_shared_address(a), 2);
  return static_cast<double>(Element<kType>::value(x));
}

// What a lane has started: accumulators by address with their true values, and groups of products.
struct LaneProducts {
  std::map<float*, std::vector<float>> truth;
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
inline LaneProducts& lane_products() {
  static std::map<std::pair<int64_t, int>, LaneProducts> all;
  return all[{Block::now().block(), Block::now().warp() * 32 + lane_id()}];
}
inline void products_begin() { Block::now().exchange(30, {}); }
inline void products_commit() {
  Block::now().exchange(31, {});
  LaneProducts& l = lane_products();
  l.groups.push_back(std::move(l.open));
  l.open.clear();
}
template <int kPending>
inline void products_wait() {
  Block::now().exchange(32, {});
  LaneProducts& l = lane_products();
  while (static_cast<int>(l.groups.size()) > kPending) {
    for (const auto& p : l.groups.front()) p();
    l.groups.pop_front();
  }
  if (!l.groups.empty()) return;
  for (const auto& [c, values] : l.truth) std::copy(values.begin(), values.end(), c);
  l.truth.clear();
}
template <int kBlocks>
inline void settled(float (&)[kBlocks][4]) {}
template <int kBlocks>
inline void settled(uint32_t (&)[kBlocks][2]) {}

// a(row, k): element of the warp's rows g and g + 8 (row 0 and 1), k of 16.
template <FloatType kType, int kBlocks, class A>
inline void start_product(float (&c)[kBlocks][4], const A& a, uint64_t b, bool transposed, bool accumulate) {
  LaneProducts& l = lane_products();
  float* at = &c[0][0];
  if (l.truth.count(at) == 0) l.truth[at] = std::vector<float>(at, at + kBlocks * 4);
  std::fill(at, at + kBlocks * 4, std::nanf(""));
  const int t = lane_id() % 4;
  const auto run = [a, at, b, transposed, accumulate, t, &l] {
    std::vector<float>& value = l.truth[at];
    for (int i = 0; i < kBlocks * 4; ++i) {
      double sum = accumulate ? static_cast<double>(value[static_cast<size_t>(i)]) : 0.0;
      for (int k = 0; k < 16; ++k) sum += a(i % 4 / 2, k) * operand<kType>(b, transposed, i / 4 * 8 + 2 * t + i % 2, k);
      value[static_cast<size_t>(i)] = static_cast<float>(sum);
    }
  };
  if (Block::now().eager_products) run();
  else l.open.push_back(run);
}

template <FloatType kType, bool kTransposed, int kBlocks>
inline void product(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Block::Payload mine{};
  std::memcpy(mine.word, a, sizeof a);
  const Block::Payload* all = Block::now().exchange(33, mine);
  std::vector<double> rows(32);
  for (int r = 0; r < 2; ++r) {
    for (int k = 0; k < 16; ++k) {
      uint32_t x;
      std::memcpy(&x, reinterpret_cast<const char*>(all[lane_id() / 4 * 4 + k % 8 / 2].word) + 4 * (r + k / 8 * 2), 4);
      rows[static_cast<size_t>(r * 16 + k)] =
          static_cast<double>(Element<kType>::value(static_cast<uint16_t>(x >> (16 * (k % 2)))));
    }
  }
  start_product<kType>(
      c, [rows](int r, int k) { return rows[static_cast<size_t>(r * 16 + k)]; }, b, kTransposed, accumulate);
}
template <FloatType kType, int kBlocks>
inline void product(float (&c)[kBlocks][4], uint64_t a_desc, uint64_t b_desc, bool accumulate) {
  Block::now().exchange(34, {});
  const int row = Block::now().warp() % 4 * 16 + lane_id() / 4;
  start_product<kType>(
      c, [a_desc, row](int r, int k) { return operand<kType>(a_desc, false, row + 8 * r, k); }, b_desc, false,
      accumulate);
}

}  // namespace unmask::cuda
