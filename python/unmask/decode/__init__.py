"""Decoding: policy (what commits), schedule (where blocks end), cache (what is forwarded), state, engine (the loop), trace."""
