// The table of contents: every op of torch.ops.unmask, one schema each. Semantics: python/unmask/reference.py (the definition in plain
// PyTorch) and python/unmask/ops.py (typed wrappers, shapes, errors). Adding an op: here, cpu/<op>.cpp, cuda/<op>.cu(h),
// ops.py + reference.py, tests/test_op_<op>.py + bench/bench_op_<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(unmask, m) {
  // Run-time facts: ISA, CUDA architectures, ABI target (csrc/cpu/info.cpp lists the codes).
  m.def("info(int what) -> int");

  // One counter-based uniform per entry, keyed by (seed, step, pos).
  m.def("uniform(Tensor seed, Tensor step, Tensor pos) -> Tensor");

  // Per-head q/k RMSNorm (optional) + RoPE at each token's position, K and V written in place into the cache; returns rotated q.
  m.def(
      "rope_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor row, Tensor pos, "
      "Tensor slot, "
      "Tensor? v_slot, Tensor? q_weight, Tensor? k_weight, Tensor inv_freq, float eps, Tensor(c!)? status=None) -> "
      "Tensor");

  // Packed query tokens against segments of the cache, non-causal, GQA; q_end and a small mask restrict single tokens. -> (out, lse)
  m.def(
      "block_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_q, Tensor kv_row, Tensor seg, Tensor? "
      "q_end, "
      "Tensor? mask, float scale, Tensor(a!)? status=None, bool batch_invariant=False) -> (Tensor, Tensor)");

  // One read of the logits. ids: token, then top-k ids; values: p, p1, p2, entropy, logsumexp, 1 - p, then (log-probability, logit) at each of
  // the ids asked for, then top-k logits. One tensor per dtype: every output costs as much as the reduction of a thousand logits.
  // null_logits: the logits are null_logits + guidance (logits - null_logits), classifier-free guidance, one read of each.
  m.def(
      "logit_stats(Tensor logits, Tensor? rows, Tensor? forbid, Tensor? suppress, Tensor? bias_ids, Tensor? bias, "
      "Tensor? ids, "
      "int topk, float temperature, Tensor? seed, Tensor? step, Tensor? pos, Tensor? null_logits=None, float "
      "guidance=1.0) "
      "-> (Tensor ids, Tensor values, Tensor status)");

  // The same reduction over one vocabulary tile, folded into a running state (head_stats is built on it), and its end.
  m.def(
      "stats_tile(Tensor logits, Tensor(a!) state, Tensor(b!)? id_logit, int offset, int vocab, Tensor? forbid, "
      "Tensor? suppress, "
      "Tensor? bias_ids, Tensor? bias, Tensor? ids, int topk, float temperature, Tensor? seed, Tensor? step, Tensor? "
      "pos) -> ()");
  m.def(
      "stats_finish(Tensor state, Tensor? id_logit, int topk) "
      "-> (Tensor ids, Tensor values, Tensor status)");

  // logit_stats of the tempered softmax that top-k and top-p leave, without a sort. Outputs as those of logit_stats with topk = 0 and no ids.
  m.def(
      "filtered_stats(Tensor logits, Tensor? rows, Tensor? forbid, Tensor? suppress, Tensor? bias_ids, Tensor? bias, "
      "float temperature, float top_p, int top_k, bool top_k_first, Tensor? seed, Tensor? step, Tensor? pos) "
      "-> (Tensor ids, Tensor values, Tensor status)");

  // KL divergence of each row's softmax from that of a row of earlier logits, both read once.
  m.def(
      "kl_stats(Tensor logits, Tensor previous, Tensor? rows, Tensor? previous_rows, Tensor lse, Tensor previous_lse) "
      "-> Tensor");

  // logit_stats of hidden @ head^T over vocabulary tiles packed by oneDNN, for the rows asked for; logits are never stored. CPU.
  m.def(
      "head_stats(Tensor hidden, Tensor[] tiles, Tensor? rows, Tensor? forbid, Tensor? suppress, Tensor? bias_ids, "
      "Tensor? bias, "
      "Tensor? ids, int topk, float temperature, Tensor? seed, Tensor? step, Tensor? pos) "
      "-> (Tensor ids, Tensor values, Tensor status)");

  // hidden @ weight^T and logit_stats in one pass over the weights, for up to 64 rows; logits are never stored. CUDA, sm_90a.
  m.def(
      "fused_head_stats(Tensor hidden, Tensor weight, Tensor? rows, Tensor? forbid, Tensor? suppress, Tensor? "
      "bias_ids, "
      "Tensor? bias, Tensor? ids, int topk, float temperature, Tensor? seed, Tensor? step, Tensor? pos) "
      "-> (Tensor ids, Tensor values, Tensor status)");

  // Order eligible positions by (score desc, position asc), apply the rule, write tokens in place. -> (committed, count, left)
  m.def(
      "commit(Tensor(a!) canvas, Tensor(b!) masked, Tensor cu, Tensor row, Tensor pos, Tensor token, Tensor score, "
      "Tensor? cost, "
      "Tensor? eligible, Tensor? editable, int rule, float[] params, Tensor? quota, Tensor? threshold, Tensor(c!)? "
      "status=None) "
      "-> (Tensor committed, Tensor count, Tensor left)");

  // Which draft nodes a plain decoding would also have passed through, by their contents: a walk down a chain or tree of equal nodes, or
  // (subset) the fixed point of "the furthest node that agrees with what this one became". -> (last, length)
  m.def(
      "verify_greedy(Tensor node, Tensor after, Tensor? parent, Tensor count, int mask_id, bool subset, "
      "Tensor(a!)? status=None) -> (Tensor last, Tensor length)");

  // Speculative sampling over packed spans: the accepted prefix of each, and a token of the residual at its first rejection.
  m.def(
      "verify_ratio(Tensor p_logits, Tensor q_logits, Tensor p_row, Tensor q_row, Tensor token, Tensor cu, Tensor? "
      "seed, Tensor? step, Tensor? pos, Tensor? uniforms, Tensor? forbid, float temper, float temperature, bool "
      "resample) "
      "-> (Tensor accepted, Tensor next, Tensor log_ratio, Tensor status)");

  // Row-wise pieces between the GEMMs: RMSNorm, residual add + RMSNorm in one pass, silu(gate) * up.
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");

  // A whole layer of these around products by oneDNN's packed weights, for steps of few rows on a CPU, where the calls between the products
  // cost a fifth of them. Without gate_up and down it ends at the normed input of a mixture of experts.
  m.def(
      "decoder_layer(Tensor x, Tensor(a!) residual, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor qkv, Tensor? "
      "qkv_bias, "
      "Tensor o, Tensor? gate_up, Tensor? down, Tensor attn_norm, Tensor mlp_norm, Tensor? q_norm, Tensor? k_norm, "
      "Tensor inv_freq, Tensor row, Tensor pos, Tensor slot, Tensor cu_q, Tensor kv_row, Tensor seg, Tensor? q_end, "
      "Tensor? mask, float eps, float scale, Tensor(d!)? token_status=None, Tensor(e!)? entry_status=None) -> Tensor");

  // Which experts a token goes through and with which weights, and the counting sort of (token, expert) pairs that products by expert need;
  // then a token's experts' outputs, weighted and added in the order of choice.
  m.def(
      "moe_route(Tensor logits, Tensor? row, Tensor? bias, int scoring, int n_groups, int groups_kept, int top_k, "
      "bool renormalise, float scale, int multiple) "
      "-> (Tensor expert, Tensor weight, Tensor place, Tensor source, Tensor offsets)");
  m.def("moe_combine(Tensor y, Tensor place, Tensor weight) -> Tensor");

  // The experts themselves, where oneDNN packed their weights: those that occur in `expert`, one after the other, weighted and added. CPU.
  m.def(
      "moe_experts(Tensor x, Tensor expert, Tensor weight, Tensor[] gate_up, Tensor[] down, Tensor? shared_gate_up, "
      "Tensor? shared_down) -> Tensor");
}
