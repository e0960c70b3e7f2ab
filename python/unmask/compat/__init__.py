"""The authors' own functions, same names, arguments, defaults and return values, on unmask's ops: change one import.

| module | functions | authors' code |
|---|---|---|
| `llada` | generate, get_log_likelihood | ML-GSAI/LLaDA |
| `fast_dllm` | generate, generate_with_prefix_cache, generate_with_dual_cache | NVlabs/Fast-dLLM, llada/ |
| `adablock` | generate_adablock, generate_adablock_prefix_cache, generate_adablock_dual_cache; dream_generate, dream_generate_parallel | lgxi24/AdaBlock-dLLM |
| `dream` | diffusion_generate (a function, or a method to bind) | HKUNLP/Dream; NVlabs/Fast-dLLM, dream/ |
| `llada2` | generate, generate_cached | phymhan/S2D2, LLaDA2/, after inclusionAI's LLaDA2.X |
| `sdar` | block_diffusion_generate | JetAstra/SDAR; phymhan/S2D2, SDAR/ |
| `fast_dllm_v2` | generate | NVlabs/Fast-dLLM, v2/ |
| `s2d2` | sdar.block_diffusion_generate, llada2.generate_ssd_policy, fast_dllm_v2.generate_ssd_policy | phymhan/S2D2 |

model: one from `unmask.load`, or (the first four) the user's own module, bare or from `unmask.wrap`, whose mask id and shift then stand where
the authors' argument is not given. A module is called as the authors call theirs, with past_key_values and
replace_position where a function has a cache; one whose forward does not name these raises before it is called.
What the authors' code does on purpose (a forced first position, a forward too many) is the default; what is a bug is off and has a switch.
"""
