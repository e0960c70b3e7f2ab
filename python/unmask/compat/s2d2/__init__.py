"""S2D2's self-speculative generators (phymhan/S2D2, arXiv 2603.25702), same names and arguments, on unmask's ops.

| module | function | authors' file |
|---|---|---|
| `sdar` | block_diffusion_generate | SDAR/generate_ssd_policy.py |
| `llada2` | generate_ssd_policy | LLaDA2/generate_utils.py |
| `fast_dllm_v2` | generate_ssd_policy | Fast-dLLM-v2/generate_policy_utils.py |

Each also takes uniforms= (per verification one number per token of the span) and resampled= (the tokens drawn at first rejections, in order),
which replay a recorded run; without them the numbers come from a counter-based generator seeded from torch's default one. `unmask.speculate.s2d2`
has the same for ragged batches, other policies and a greedy mode without random numbers.
"""
