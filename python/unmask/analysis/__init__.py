"""What a finished run tells: its order (AR-ness), and the answers it passed through on the way (voting, entropy, pass rates).

Everything is a function of a trace (`Result.trace`, or records as `decode.trace` describes them) or of parsed answers; no model runs here.
"""

from .answers import clusters, intermediate_answers
from .metrics import Passes, correctness, passes, temporal_semantic_entropy
from .order import ArNess, arness, commit_order, global_arness, local_arness
from .voting import Vote, vote, vote_answers, vote_weights

__all__ = [
    "ArNess", "Passes", "Vote", "arness", "clusters", "commit_order", "correctness", "global_arness", "intermediate_answers",
    "local_arness", "passes", "temporal_semantic_entropy", "vote", "vote_answers", "vote_weights",
]  # fmt: skip
