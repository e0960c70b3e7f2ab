// A block of warps on the CPU, for tests: the names of csrc/cuda/common/warp.cuh for the host. Every lane of every warp is a fiber that runs
// until its next warp- or block-wide operation; a warp runs as far as it can without the others, so that a missing barrier shows. Lanes
// that disagree about which operation comes next, lanes that leave while others wait, and misaligned accesses are errors: on a GPU they
// would hang or trap. Shared memory starts as NaN.
#pragma once
#define UNMASK_EMULATE_WARP 1

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define UNMASK_DEVICE inline
#define UNMASK_KERNEL_BOUNDS(threads, blocks) inline void
#define __shared__ static

namespace unmask::cuda {

class Block {
 public:
  struct Payload { uint64_t word[4]; };

  static Block& now() {
    static Block block;
    return block;
  }

  // Runs blocks [block, block + cluster) side by side.
  void run(int64_t block, int cluster, int warps, int64_t shared_bytes, const std::function<void()>& kernel) {
    first_block_ = block;
    block_lanes_ = warps * 32;
    const int all = cluster * block_lanes_;
    lanes_.resize(static_cast<size_t>(all));
    boxes_.resize(static_cast<size_t>(all / 16));
    shared_bytes_ = (static_cast<size_t>(shared_bytes) + 127) / 128 * 128;
    shared_.assign(shared_bytes_ * static_cast<size_t>(cluster) + 128, static_cast<char>(0xFF));
    block_barriers_.assign(static_cast<size_t>(cluster), {});
    cluster_barrier_ = {};
    named_.clear();
    transfers.clear();
    objects.clear();
    kernel_ = &kernel;
    error_.clear();
    for (lane_ = 0; lane_ < all; ++lane_) {
      Lane& lane = self();
      if (!lane.stack) lane.stack.reset(new char[kStack]);
      getcontext(&lane.start);
      lane.start.uc_stack.ss_sp = lane.stack.get();
      lane.start.uc_stack.ss_size = kStack;
      lane.start.uc_link = nullptr;
      lane.turns = 0;
      lane.barrier = nullptr;
      lane.done = false;
      lane.copies.clear();
      lane.groups.clear();
      lane.ready = nullptr;
      makecontext(&lane.start, &Block::enter, 0);
      swapcontext(&main_start_, &lane.start);  // up to the setjmp in enter()
    }
    int left = all;
    while (left > 0 && error_.empty()) {
      const int before = left;
      bool moved = false;
      for (int w = 0; w < all / 32; ++w) {
        const int ran = run_warp(last_warp_first ? all / 32 - 1 - w : w, &left);
        moved = moved || ran > 0 || left != before;
      }
      if (moved || !error_.empty()) continue;
      if (transfers.empty()) {
        error_ = "lanes wait at a block-wide operation that others never reach";
      } else {  // as late as allowed: only when nobody gets on without it
        transfers.front()();
        transfers.pop_front();
      }
    }
    if (error_.empty() && !transfers.empty())
      error_ = "the kernel left while copies into its shared memory were on their way";
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Asynchronous copies arrive at once (else when their lane waits for them), so do products of a warpgroup; the last warp runs ahead
  // (else the first).
  bool eager_copies = false, eager_products = false, last_warp_first = false;

  // Work of nobody's thread (copies of the memory accelerator), oldest first; and barriers in shared memory, by address.
  std::deque<std::function<void()>> transfers;
  struct Counter {
    int arrivals = 0, left = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
  };
  std::map<const void*, Counter> objects;

  // The running lane goes on once ready() is true.
  void wait_for(const std::function<bool()>& ready) {
    if (ready()) return;
    self().ready = &ready;
    leave();
    self().ready = nullptr;
  }
  // A barrier of `threads` lanes of the block with a vote.
  bool vote(int barrier, int threads, bool mine) {
    Named& b = named_[{lane_ / block_lanes_, barrier}];
    b.any = b.any || mine;
    const int64_t round = b.at.round;
    wait_at(b.at, threads, [&] { b.result = b.any, b.any = false; });
    if (b.at.round != round + 1) error("a lane is two rounds behind at a barrier");
    return b.result;
  }

  // Every lane of the warp gives a value and gets all 32.
  const Payload* exchange(int operation, const Payload& value) {
    const int64_t turn = self().turns++;
    const int own = lane_ / 32 * 32;
    Box& box = boxes_[static_cast<size_t>(lane_ / 32 * 2 +
                                          (turn & 1))];  // two: a lane may be one operation ahead of those behind it
    box.operation[lane_ - own] = operation;
    box.turn[lane_ - own] = turn;
    box.value[lane_ - own] = value;
    const int lane = lane_ - own;
    leave();
    wait_for([&] {  // one that waits for something else comes later
      for (int i = 0; i < 32; ++i)
        if (box.turn[i] != turn && lanes_[static_cast<size_t>(own + i)].ready != nullptr) return false;
      return true;
    });
    for (int i = 0; i < 32; ++i) {
      if (box.turn[i] != turn || box.operation[i] != operation)
        error("lanes " + std::to_string(lane) + " and " + std::to_string(i) + " are at different warp operations");
    }
    return box.value;
  }

  // Every lane of the block, or of all blocks that run side by side.
  void barrier() { wait_at(block_barriers_[static_cast<size_t>(lane_ / block_lanes_)], block_lanes_); }
  void cluster_barrier() { wait_at(cluster_barrier_, static_cast<int>(lanes_.size())); }

  void error(const std::string& text) {
    if (error_.empty()) error_ = text;
    leave();
  }
  int lane() const { return lane_ % 32; }
  int warp() const { return lane_ % block_lanes_ / 32; }
  int64_t block() const { return first_block_ + lane_ / block_lanes_; }
  bool in_shared(const void* p, size_t bytes) {
    return p >= shared() && static_cast<const char*>(p) + bytes <= shared() + shared_bytes_;
  }
  char* shared() { return shared_of(lane_ / block_lanes_); }
  char* shared_of(int rank) {
    char* first = shared_.data() + (128 - reinterpret_cast<uintptr_t>(shared_.data()) % 128) % 128;
    return first + static_cast<size_t>(rank) * shared_bytes_;
  }

  // Asynchronous copies of the running lane, made as late as allowed (when it waits for them) or at once.
  void copy_later(char* to, const char* from, bool read) {
    if (to < shared() || to + 16 > shared() + shared_bytes_) error("a copy to a place outside of shared memory");
    self().copies.push_back({to, from, read});
    if (eager_copies) finish(self().copies.back());
  }
  void commit_copies() {
    self().groups.push_back(std::move(self().copies));
    self().copies.clear();
  }
  void wait_copies(int pending) {
    while (static_cast<int>(self().groups.size()) > pending) {
      for (const Copy& c : self().groups.front()) finish(c);
      self().groups.pop_front();
    }
  }

 private:
  static constexpr size_t kStack = size_t{1} << 17;
  struct Copy {
    char* to;
    const char* from;
    bool read;
  };
  struct Barrier {
    int waiting = 0;
    int64_t round = 0;
  };
  struct Lane {
    ucontext_t start;
    jmp_buf here;  // a switch by setjmp costs no system call
    std::unique_ptr<char[]> stack;
    int64_t turns = 0;  // warp operations
    const Barrier* barrier = nullptr;  // where the lane waits
    int64_t round = 0;
    bool done = false;
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> groups;
    const std::function<bool()>* ready = nullptr;  // where the lane waits for something else
  };
  struct Named {
    Barrier at;
    bool any = false, result = false;
  };
  struct Box {
    int operation[32];
    int64_t turn[32];
    Payload value[32];
  };
  void wait_at(Barrier& b, int lanes, const std::function<void()>& last = [] {}) {
    self().barrier = &b, self().round = b.round;
    if (++b.waiting == lanes) b.waiting = 0, ++b.round, last();
    leave();  // the last one too, so that the lanes of its warp stay in step
    self().barrier = nullptr;
  }
  // As far as a warp comes without the others: a barrier that is missing shows. Returns how often its lanes ran.
  int run_warp(int warp, int* left) {
    int ran = 0;
    for (bool again = true; again && error_.empty();) {
      again = false;
      for (lane_ = warp * 32; lane_ < warp * 32 + 32 && error_.empty(); ++lane_) {
        const Lane& lane = self();
        if (lane.done || (lane.barrier != nullptr && lane.barrier->round == lane.round) ||
            (lane.ready != nullptr && !(*lane.ready)()))
          continue;
        if (_setjmp(main_) == 0) _longjmp(self().here, 1);
        *left -= self().done;
        again = true;
        ++ran;
      }
    }
    return ran;
  }
  static void finish(const Copy& c) {
    if (c.read) std::memcpy(c.to, c.from, 16);
    else std::memset(c.to, 0, 16);
  }
  Lane& self() { return lanes_[static_cast<size_t>(lane_)]; }
  void leave() {
    if (_setjmp(self().here) == 0) _longjmp(main_, 1);
  }
  static void enter() {
    Block& b = now();
    Lane& self = b.self();
    if (_setjmp(self.here) == 0) swapcontext(&self.start, &b.main_start_);
    (*b.kernel_)();
    self.done = true;
    const int first = b.lane_ / 32 * 32;
    for (int i = first; i < first + 32; ++i) {
      const Lane& lane = b.lanes_[static_cast<size_t>(i)];
      if (lane.turns != b.lanes_[static_cast<size_t>(first)].turns && lane.done)
        b.error_ = "a lane left while others wait";
    }
    _longjmp(b.main_, 1);
  }

  std::vector<Lane> lanes_;
  std::vector<Box> boxes_;
  std::vector<char> shared_;
  ucontext_t main_start_;
  jmp_buf main_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  std::vector<Barrier> block_barriers_;
  Barrier cluster_barrier_;
  std::map<std::pair<int, int>, Named> named_;
  size_t shared_bytes_ = 0;
  int lane_ = 0, block_lanes_ = 32;
  int64_t first_block_ = 0;
};

inline int lane_id() { return Block::now().lane(); }
inline int warp_in_block() { return Block::now().warp(); }
inline int64_t block_index() { return Block::now().block(); }
inline void warp_sync() { Block::now().exchange(1, {}); }
inline void block_sync() { Block::now().barrier(); }
inline char* dynamic_shared() { return Block::now().shared(); }
constexpr bool kHasClusters = true;
inline void cluster_sync() { Block::now().cluster_barrier(); }
inline const char* cluster_shared(const char* mine, int rank) {
  return mine - Block::now().shared() + Block::now().shared_of(rank);
}
inline void device_fence() {}
inline uint32_t device_count_up(uint32_t* counter) { return (*counter)++; }

template <class T>
inline T warp_pick(int operation, T v, int lane) {
  static_assert(sizeof(T) <= 8);
  Block::Payload mine{};
  std::memcpy(mine.word, &v, sizeof v);
  const Block::Payload* all = Block::now().exchange(operation, mine);
  std::memcpy(&v, all[lane < 0 || lane > 31 ? lane_id() : lane].word, sizeof v);
  return v;
}
template <class T> inline T warp_get(T v, int lane) { return warp_pick(2, v, lane & 31); }
template <class T> inline T warp_get_up(T v, int by) { return warp_pick(3, v, lane_id() - by); }
template <class T> inline T warp_get_xor(T v, int mask) { return warp_pick(4, v, lane_id() ^ mask); }

// f(accumulated, a lane's word) over the warp's words.
template <class F>
inline uint32_t warp_fold(int operation, uint32_t v, uint32_t start, const F& f) {
  const Block::Payload* all = Block::now().exchange(operation, {{v}});
  for (int i = 0; i < 32; ++i) start = f(start, static_cast<uint32_t>(all[i].word[0]), i);
  return start;
}
inline uint32_t warp_ballot(bool b) {
  return warp_fold(5, b, 0, [](uint32_t x, uint32_t y, int i) { return x | y << i; });
}
inline uint32_t warp_max_u32(uint32_t v) {
  return warp_fold(6, v, v, [](uint32_t x, uint32_t y, int) { return x > y ? x : y; });
}
inline uint32_t warp_min_u32(uint32_t v) {
  return warp_fold(7, v, v, [](uint32_t x, uint32_t y, int) { return x < y ? x : y; });
}
inline uint32_t warp_or_u32(uint32_t v) {
  return warp_fold(8, v, v, [](uint32_t x, uint32_t y, int) { return x | y; });
}
inline void shared_or(uint32_t* word, uint32_t bits) { *word |= bits; }
inline int bit_count(uint32_t v) { return __builtin_popcount(v); }
inline int lowest_bit(uint32_t v) { return __builtin_ffs(static_cast<int>(v)) - 1; }

struct alignas(16) Vec16 { uint32_t w[4]; };
inline void check_aligned(const void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    Block::now().error("an access of " + std::to_string(bytes) + " bytes is not aligned");
}
inline Vec16 load16(const void* p) {
  check_aligned(p, 16);
  Vec16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec16 load16_mutable(const void* p) { return load16(p); }
inline void store16(void* p, const Vec16& v) {
  check_aligned(p, 16);
  std::memcpy(p, &v, sizeof v);
}
inline void store8(void* p, uint32_t low, uint32_t high) {
  check_aligned(p, 8);
  const uint32_t v[2] = {low, high};
  std::memcpy(p, v, sizeof v);
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

// All blocks of a launch, one cluster after the other.
inline void emulate(int64_t blocks, int warps, const std::function<void()>& kernel, int64_t shared_bytes = 0,
                    int cluster = 1) {
  for (int64_t b = 0; b < blocks; b += cluster) Block::now().run(b, cluster, warps, shared_bytes, kernel);
}

// Runs f; 1 and the text of the exception behind emulated_error() if it throws.
inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    last_error() = e.what();
    return 1;
  }
}

}  // namespace unmask::cuda

extern "C" inline __attribute__((used)) const char* emulated_error() { return unmask::cuda::last_error().c_str(); }
