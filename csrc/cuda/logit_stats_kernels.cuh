// The kernels of logit_stats, stats_tile and stats_finish behind the scan (logit_stats.cuh): included by one translation unit.
#pragma once
#include "cuda/logit_stats_fold.cuh"

namespace unmask::cuda {

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4) stats_fold(const StatsJob job, const StatsOutputs out) {
  if (entry_of_warp() < job.entries) finish_entry(job, out, job.entry_begin + entry_of_warp());
}

// Few rows, sm_90 and later: both launches in one. The blocks of a cluster share an entry, each warp takes one chunk and asks for all of it
// at once (64 registers; fp32 and guidance: half of it, then the rest meanwhile), so that a row costs one trip to memory; the first warp
// then folds what the cluster's barrier made visible.
template <FloatType kType, bool kSampled, bool kGuided>
UNMASK_KERNEL_BOUNDS(kMostClusterWarps * 32, 1)
stats_cluster(const StatsJob job, const StatsOutputs out, const int cluster, const int warps) {
  auto* marks = reinterpret_cast<uint32_t (*)[2][kMarkWords]>(dynamic_shared());  // of each warp
  const int64_t local = block_index() / cluster, chunk = block_index() % cluster * warps + warp_in_block();
  if (chunk < job.chunks)
    scan_group<kType, kSampled, kGuided, (kType == FloatType::f32 ? 4 : 8) / (kGuided ? 2 : 1)>(job, local, chunk,
                                                                                                marks[warp_in_block()]);
  cluster_sync();
  if (chunk == 0) finish_entry(job, out, job.entry_begin + local);
}

// Folds one tile into the running states; id_logit [T', n_ids] may be null if there are no ids.
struct StateTile {
  int32_t* state;
  int64_t state_stride[2];
  float* id_logit;
  int64_t id_stride[2];
};

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4) stats_fold_tile(const StatsJob job, const StateTile tile) {
  if (entry_of_warp() >= job.entries) return;
  const int64_t entry = job.entry_begin + entry_of_warp();
  const StateRow row{tile.state + entry * tile.state_stride[0], tile.state_stride[1]};
  float* logit = tile.id_logit + entry * tile.id_stride[0];
  WarpState st = row.load();
  if (st.next == 0) {  // empty: whatever else the words say
    st = WarpState{};
    st.kept = job.in.kept;
    st.status = list_status(job);
    for (int64_t i = lane_id(); i < job.in.n_ids; i += 32) logit[i * tile.id_stride[1]] = neg_inf();
  }
  if (st.next != job.in.offset || st.kept != job.in.kept) {  // tiles out of order, or another topk
    st.status |= kStatusBadSegment;
    st.next = st.next > 1 ? st.next : 1;
  } else {
    st.status |= bias_status(job.in, entry);
    fold_partials(job, entry, &st);
    st.status |= gather_ids(job, entry, entry, logit, tile.id_stride[1]);
    st.next = static_cast<int32_t>(job.in.offset + job.in.count);
  }
  row.store(st);
}

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4)
stats_end(const StateTile tile, const StatsOutputs out, const int64_t entries) {
  const int64_t entry = entry_of_warp();
  if (entry >= entries) return;
  WarpState st = StateRow{tile.state + entry * tile.state_stride[0], tile.state_stride[1]}.load();
  if (st.next != 0 && out.topk > st.kept) st.status |= kStatusBadSegment;  // the tiles kept fewer
  const float* logit = tile.id_logit + entry * tile.id_stride[0];
  for (int64_t i = lane_id(); i < out.n_ids; i += 32) out.at_ids(entry)[2 * i + 1] = logit[i * tile.id_stride[1]];
  write_outputs(out, entry, st);
}

}  // namespace unmask::cuda
