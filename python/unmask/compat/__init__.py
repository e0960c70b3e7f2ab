"""The authors' own functions, same names, arguments, defaults and return values, on unmask's ops: change one import.

`unmask.compat.llada.generate`, `unmask.compat.fast_dllm.{generate, generate_with_prefix_cache, generate_with_dual_cache}`.
"""
