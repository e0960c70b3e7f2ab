"""How probable is an answer to a model: Monte-Carlo bounds on its log-likelihood, the chain rule, greedy agreement, replayable masks.

A masked diffusion model has no left-to-right factorisation to read a likelihood from. What evaluation and preference training use instead
is a bound: mask part of the answer, score what was masked, weight by how much was masked, and average over random masks.

- `masks`: which positions are masked in each sample, and with which weight; a pure function of a seed.
- `scorer`: log-probabilities of tokens at masked positions, from a `Model` (fused head, logits never stored) or any module.
- `estimate`: `log_likelihood`, the estimators of LLaDA and Dream and the chain rule.
- `greedy`: `suffix_greedy_prediction`.
- `compare`: `score_masks`, several models on the same masks.

Everything here is evaluation: nothing keeps a graph for autograd.
"""

from .compare import Scores, score_masks
from .estimate import Estimate, log_likelihood
from .greedy import suffix_greedy_prediction
from .masks import Masks, chain_masks, coupled_masks, sample_masks, stratified_counts, stratified_times

__all__ = [
    "Estimate",
    "Masks",
    "Scores",
    "chain_masks",
    "coupled_masks",
    "log_likelihood",
    "sample_masks",
    "score_masks",
    "stratified_counts",
    "stratified_times",
    "suffix_greedy_prediction",
]
