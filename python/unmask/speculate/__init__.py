"""Speculative decoding: drafts that the same model verifies, several tokens to a forward."""
