// block_attention: packed query tokens against segments of the K/V cache. -> (out, lse).
// Plans the call (entries, work items), then runs items on torch's threads, each taking the next item when it is free.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/block_attention_args.h"
#include "common/register.h"
#include "common/status.h"
#include "cpu/alloc.h"
#include "cpu/block_attention_kernels.h"
#include "cpu/layer_parts.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kMinRows = 32;             // rows of the smallest tile: one panel of the widest ISA
constexpr int64_t kTileElements = 16384;     // rows x D of the largest tile: Q^T and O (fp32) take 128 KB of L2
constexpr int64_t kItemsPerThread = 4;       // below this, row tiles are cut smaller
constexpr double kParallelFlops = 1.0e6;     // ~10 us of one core: below, waking threads costs more than it brings

struct FreeDeleter {
  void operator()(float* p) const { std::free(p); }
};

// Scratch of this thread, grown when a call needs more and kept: no allocation per call, per item or per tile.
float* thread_scratch(int64_t floats) {
  static thread_local std::unique_ptr<float, FreeDeleter> buffer;
  static thread_local int64_t size = 0;
  if (floats > size) {
    buffer.reset();
    size = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 4095) / 4096 * 4096;
    buffer.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    STD_TORCH_CHECK(buffer != nullptr, "block_attention: no memory for ", bytes, " bytes of scratch");
    size = floats;
  }
  return buffer.get();
}

// Runs f(i) for i in [0, n), each thread taking the next i when it is free.
template <class F>
void for_each_item(int64_t n, bool parallel, const F& f) {
  if (!parallel || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(std::min(n, num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

class Plan {
 public:
  Plan(const Tensor& q, const Tensor& k_cache, const Tensor& cu_q, const Tensor& kv_row, const Tensor& seg,
       const std::optional<Tensor>& mask, const std::optional<Tensor>& status, AttentionParams& params)
      : p_(params), tokens_(q.size(0)), kv_heads_(k_cache.size(1)) {
    const int64_t batch = kv_row.size(0), slots = k_cache.size(2), cache_rows = k_cache.size(0);
    const auto* cu = static_cast<const int64_t*>(cu_q.const_data_ptr());
    const auto* row = static_cast<const int64_t*>(kv_row.const_data_ptr());
    const auto* segments = static_cast<const int64_t*>(seg.const_data_ptr());
    const auto* mask_data = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    auto* bits = status ? static_cast<int32_t*>(status->mutable_data_ptr()) : nullptr;
    const int64_t cu_step = cu_q.stride(0), row_step = kv_row.stride(0), bits_step = status ? status->stride(0) : 0;
    const int64_t q_max = mask ? mask->size(1) : 0, mask_step = mask && mask->size(0) > 1 ? mask->stride(0) : 0;
    const int64_t seg_step = seg.stride(0);
    int64_t reached = 0;  // the highest offset so far; an entry that begins below it overlaps an earlier one
    for (int64_t b = 0; b < batch; ++b) {
      AttentionEntry e{};
      e.q_begin = cu[b * cu_step];
      const int64_t q_end = cu[(b + 1) * cu_step];
      e.q_count = q_end - e.q_begin;
      e.row = row[b * row_step];
      e.seg = segments + b * seg_step, e.segments = seg.size(1), e.seg_stride = seg.stride(1),
      e.seg_field_stride = seg.stride(2);
      e.mask = mask_data ? mask_data + b * mask_step : nullptr;
      int32_t bad = 0;
      if (e.row < -1 || e.row >= cache_rows) bad |= kStatusBadRow;
      if (e.q_begin < reached || q_end < e.q_begin || q_end > tokens_) bad |= kStatusBadSegment;
      else if (mask && e.q_count > q_max) bad |= kStatusBadSegment;
      for (int64_t g = 0; g < e.segments; ++g) {
        const int64_t start = e.seg[g * e.seg_stride], length = e.seg[g * e.seg_stride + e.seg_field_stride];
        if (start < 0 || length < 0 || start > slots || length > slots - start) {
          bad |= kStatusBadSegment;
          break;
        }
        e.keys += length;
      }
      reached = std::max({reached, e.q_begin, q_end});
      if (bad != 0 && bits != nullptr) bits[b * bits_step] |= bad;
      if (bad != 0 || e.row < 0 || e.q_count == 0) continue;
      entries_.push_back(e);
    }
    cut();
  }

  void zero_uncovered(size_t element) const {
    int64_t at = 0;
    for (const auto& e : entries_) {
      zero(at, e.q_begin, element);
      at = e.q_begin + e.q_count;
    }
    zero(at, tokens_, element);
  }

  void run() const {
    const auto item = UNMASK_KERNEL(block_attention_item);
    const bool parallel = flops_ >= kParallelFlops;
    if (!split_) {
      for_each_item(static_cast<int64_t>(items_.size()), parallel,
                    [&](int64_t i) { item(p_, entries_[items_[i].entry], items_[i], thread_scratch(scratch_)); });
      return;
    }
    const auto merge = UNMASK_KERNEL(block_attention_merge);
    const auto partial_of = UNMASK_KERNEL(block_attention_partial);
    std::vector<AttentionItem> parts;
    std::vector<int64_t> first;
    int64_t floats = 0;
    for (const auto& it : items_) floats += it.split_end * partial_of(p_, it.row_end - it.row_begin);
    Tensor buffer = empty<1>({floats}, ScalarType::Float);
    float* at = static_cast<float*>(buffer.mutable_data_ptr());
    for (const auto& it : items_) {
      first.push_back(static_cast<int64_t>(parts.size()));
      for (int64_t s = 0; s < it.split_end; ++s) {
        AttentionItem part = it;
        part.split_begin = s, part.split_end = s + 1, part.partial = at;
        at += partial_of(p_, it.row_end - it.row_begin);
        parts.push_back(part);
      }
    }
    for_each_item(static_cast<int64_t>(parts.size()), parallel,
                  [&](int64_t i) { item(p_, entries_[parts[i].entry], parts[i], thread_scratch(scratch_)); });
    for_each_item(static_cast<int64_t>(items_.size()), parallel,
                  [&](int64_t i) { merge(p_, entries_[items_[i].entry], parts[first[i]], items_[i].split_end); });
  }

 private:
  AttentionParams& p_;
  int64_t tokens_, kv_heads_;
  std::vector<AttentionEntry> entries_;
  std::vector<AttentionItem> items_;
  bool split_ = false;
  double flops_ = 0.0;
  int64_t scratch_ = 0;

  // Row tiles as large as the cache allows (K and V are then read and widened least often), smaller if threads would idle; key splits
  // on their own only when there are still too few items. Neither choice changes a bit of the result.
  void cut() {
    const int64_t threads = num_threads();
    int64_t tile = kMinRows;
    while (tile * 2 * p_.dim <= kTileElements) tile *= 2;
    int64_t largest = 0, splits = 0;
    for (const auto& e : entries_) {
      largest = std::max(largest, e.q_count * p_.group);
      splits = std::max(splits, (e.keys + kAttentionSplit - 1) / kAttentionSplit);
      flops_ += 4.0 * static_cast<double>(e.q_count * p_.group * kv_heads_) * static_cast<double>(e.keys * p_.dim);
    }
    while (tile > kMinRows && (tile >= 2 * largest || count(tile) < kItemsPerThread * threads)) tile /= 2;
    items_.reserve(static_cast<size_t>(count(tile)));
    for (size_t i = 0; i < entries_.size(); ++i) {
      const auto& e = entries_[i];
      const int64_t rows = e.q_count * p_.group,
                    n = std::max<int64_t>(1, (e.keys + kAttentionSplit - 1) / kAttentionSplit);
      for (int64_t h = 0; h < kv_heads_; ++h)
        for (int64_t r = 0; r < rows; r += tile)
          items_.push_back({static_cast<int64_t>(i), h, r, std::min(rows, r + tile), 0, n, nullptr});
    }
    split_ = splits > 1 && threads > 1 && static_cast<int64_t>(items_.size()) < 2 * threads;
    scratch_ = UNMASK_KERNEL(block_attention_scratch)(p_, std::min(tile, largest));
  }

  int64_t count(int64_t tile) const {
    int64_t n = 0;
    for (const auto& e : entries_) n += kv_heads_ * ((e.q_count * p_.group + tile - 1) / tile);
    return n;
  }

  void zero(int64_t begin, int64_t end, size_t element) const {
    if (begin >= end) return;
    const int64_t row = p_.q_heads * p_.dim;
    std::fill_n(static_cast<char*>(p_.out) + static_cast<size_t>(begin * row) * element,
                static_cast<size_t>((end - begin) * row) * element, 0);
    std::fill(p_.lse + begin * p_.q_heads, p_.lse + end * p_.q_heads, -std::numeric_limits<float>::infinity());
  }
};

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& cu_q, const Tensor& kv_row, const Tensor& seg,
                                           const std::optional<Tensor>& q_end, const std::optional<Tensor>& mask,
                                           double scale, std::optional<Tensor> status, bool /*batch_invariant*/) {
  check_block_attention(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status);
  Tensor out = empty<3>({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty<2>({q.size(0), q.size(1)}, ScalarType::Float);
  block_attention_into(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status, out, lse);
  return {out, lse};
}

}  // namespace

void block_attention_into(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_q,
                          const Tensor& kv_row, const Tensor& seg, const std::optional<Tensor>& q_end,
                          const std::optional<Tensor>& mask, double scale, const std::optional<Tensor>& status,
                          Tensor& out, Tensor& lse) {
  AttentionParams p{};
  p.q_heads = q.size(1), p.dim = q.size(2), p.group = p.q_heads / k_cache.size(1);
  p.q = q.const_data_ptr(), p.k = k_cache.const_data_ptr(), p.v = v_cache.const_data_ptr();
  p.out = out.mutable_data_ptr(), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  std::copy_n(q.strides().data(), 3, p.q_stride);
  std::copy_n(k_cache.strides().data(), 4, p.k_stride);
  std::copy_n(v_cache.strides().data(), 4, p.v_stride);
  p.dtype = dtype_code(q);
  p.scale = static_cast<float>(scale * 1.4426950408889634);
  if (q_end) p.q_end = static_cast<const int64_t*>(q_end->const_data_ptr()), p.q_end_stride = q_end->stride(0);
  if (mask) p.mask_stride[0] = mask->stride(1), p.mask_stride[1] = mask->stride(2), p.mask_width = mask->size(2);

  const Plan plan(q, k_cache, cu_q, kv_row, seg, mask, status, p);
  plan.zero_uncovered(p.dtype == 0 ? 4 : 2);
  if (p.q_heads > 0) plan.run();
}

}  // namespace unmask::cpu

UNMASK_IMPL(CPU, block_attention, &unmask::cpu::block_attention)
