// A warp on the CPU, for tests: the names of csrc/cuda/common/warp.cuh for the host. Each of the 32 lanes is a fiber
// that runs until its next warp-wide operation; when all have arrived, all go on. Lanes that disagree about which
// operation comes next, and lanes that leave while others wait, are errors, and so are misaligned 16-byte loads: on a
// GPU they would hang or trap.
#pragma once
#define UNMASK_EMULATE_WARP 1

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#define UNMASK_DEVICE inline
#define UNMASK_KERNEL_BOUNDS(threads, blocks) inline void
#define __shared__ static

namespace unmask::cuda {

class Warp {
 public:
  static Warp& now() {
    static Warp warp;
    return warp;
  }

  void run(int64_t block, int warp, const std::function<void()>& kernel) {
    block_ = block;
    warp_ = warp;
    kernel_ = &kernel;
    error_.clear();
    for (lane_ = 0; lane_ < 32; ++lane_) {
      Lane& lane = lanes_[lane_];
      if (!lane.stack) lane.stack.reset(new char[kStack]);
      getcontext(&lane.start);
      lane.start.uc_stack.ss_sp = lane.stack.get();
      lane.start.uc_stack.ss_size = kStack;
      lane.start.uc_link = nullptr;
      lane.turns = 0;
      lane.done = false;
      makecontext(&lane.start, &Warp::enter, 0);
      swapcontext(&main_start_, &lane.start);  // up to the setjmp in enter()
    }
    for (int left = 32; left > 0 && error_.empty();) {
      for (lane_ = 0; lane_ < 32 && error_.empty(); ++lane_) {
        if (lanes_[lane_].done) continue;
        if (_setjmp(main_) == 0) _longjmp(lanes_[lane_].here, 1);
        left -= lanes_[lane_].done;
      }
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Every lane gives a value and gets all 32.
  const uint64_t* exchange(int operation, uint64_t value) {
    const int64_t turn = lanes_[lane_].turns++;
    Box& box = boxes_[turn & 1];  // two boxes: a lane may be one operation ahead of those behind it in the round
    box.operation[lane_] = operation;
    box.turn[lane_] = turn;
    box.value[lane_] = value;
    const int self = lane_;
    leave();
    for (int i = 0; i < 32; ++i) {
      if (box.turn[i] != turn || box.operation[i] != operation)
        error("lanes " + std::to_string(self) + " and " + std::to_string(i) + " are at different warp operations");
    }
    return box.value;
  }

  void error(const std::string& text) {
    if (error_.empty()) error_ = text;
    leave();
  }
  int lane() const { return lane_; }
  int warp() const { return warp_; }
  int64_t block() const { return block_; }

 private:
  static constexpr size_t kStack = size_t{1} << 17;
  struct Lane {
    ucontext_t start;
    jmp_buf here;  // a switch by setjmp costs no system call
    std::unique_ptr<char[]> stack;
    int64_t turns = 0;
    bool done = false;
  };
  struct Box {
    int operation[32];
    int64_t turn[32];
    uint64_t value[32];
  };
  void leave() {
    if (_setjmp(lanes_[lane_].here) == 0) _longjmp(main_, 1);
  }
  static void enter() {
    Warp& w = now();
    Lane& self = w.lanes_[w.lane_];
    if (_setjmp(self.here) == 0) swapcontext(&self.start, &w.main_start_);
    (*w.kernel_)();
    self.done = true;
    for (const Lane& lane : w.lanes_) {
      if (lane.turns != w.lanes_[0].turns && lane.done) w.error_ = "a lane left while others wait";
    }
    _longjmp(w.main_, 1);
  }

  Lane lanes_[32];
  Box boxes_[2];
  ucontext_t main_start_;
  jmp_buf main_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  int lane_ = 0, warp_ = 0;
  int64_t block_ = 0;
};

inline int lane_id() { return Warp::now().lane(); }
inline int warp_in_block() { return Warp::now().warp(); }
inline int64_t block_index() { return Warp::now().block(); }
inline void warp_sync() { Warp::now().exchange(1, 0); }

template <class T>
inline T warp_pick(int operation, T v, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = Warp::now().exchange(operation, bits)[lane < 0 || lane > 31 ? lane_id() : lane];
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T> inline T warp_get(T v, int lane) { return warp_pick(2, v, lane & 31); }
template <class T> inline T warp_get_up(T v, int by) { return warp_pick(3, v, lane_id() - by); }
template <class T> inline T warp_get_xor(T v, int mask) { return warp_pick(4, v, lane_id() ^ mask); }
inline uint32_t warp_ballot(bool b) {
  const uint64_t* all = Warp::now().exchange(5, b);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i] != 0) << i;
  return bits;
}
inline uint32_t warp_max_u32(uint32_t v) {
  const uint64_t* all = Warp::now().exchange(6, v);
  for (int i = 0; i < 32; ++i) v = all[i] > v ? static_cast<uint32_t>(all[i]) : v;
  return v;
}
inline uint32_t warp_min_u32(uint32_t v) {
  const uint64_t* all = Warp::now().exchange(7, v);
  for (int i = 0; i < 32; ++i) v = all[i] < v ? static_cast<uint32_t>(all[i]) : v;
  return v;
}
inline uint32_t warp_or_u32(uint32_t v) {
  const uint64_t* all = Warp::now().exchange(8, v);
  for (int i = 0; i < 32; ++i) v |= static_cast<uint32_t>(all[i]);
  return v;
}
inline void shared_or(uint32_t* word, uint32_t bits) { *word |= bits; }
inline int bit_count(uint32_t v) { return __builtin_popcount(v); }
inline int lowest_bit(uint32_t v) { return __builtin_ffs(static_cast<int>(v)) - 1; }

struct alignas(16) Vec16 { uint32_t w[4]; };
inline Vec16 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) Warp::now().error("a 16-byte load is not aligned");
  Vec16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec16 load16_mutable(const void* p) { return load16(p); }
inline void store16(void* p, const Vec16& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) Warp::now().error("a 16-byte store is not aligned");
  std::memcpy(p, &v, sizeof v);
}
inline float float_of_half(uint16_t h) {
  _Float16 f;
  std::memcpy(&f, &h, sizeof f);
  return static_cast<float>(f);
}
inline uint16_t half_of_float(float v) {
  const _Float16 f = static_cast<_Float16>(v);
  uint16_t h;
  std::memcpy(&h, &f, sizeof h);
  return h;
}
inline float exp2_approx(float y) {
  const float r = std::exp2(y);
  return r < 0x1p-126f ? 0.0f : r;  // NaN stays
}
inline float max_drop_nan(float a, float b) { return std::fmax(a, b); }
inline float max_keep_nan(float a, float b) { return a != a ? a : b != b ? b : std::fmax(a, b); }

// All warps of a launch, one after the other.
inline void emulate(int64_t blocks, int warps, const std::function<void()>& kernel) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int w = 0; w < warps; ++w) Warp::now().run(b, w, kernel);
}

}  // namespace unmask::cuda
