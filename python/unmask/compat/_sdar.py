"""SDAR's `block_diffusion_generate` with and without speculation: what it checks, what ends it, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..decode.policy import MAX_TEMPERATURE, Policy, quota_schedule
from ..decode.state import Row
from ..errors import SettingError, check_names
from ..values import integer, number
from . import _blocks

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential")
GREEDY = 1e-6  # S2D2's port: a temperature below it is none


class Call(_blocks.Call):
    """name: the prompt's in the authors' function. replay: the tokens are recorded ones."""

    def __init__(
        self, model: object, input_ids: object, mask_id: int, gen_length: int, max_gen_toks: int | None, block_length: int, denoising_steps: int,
        temperature: float, top_k: int, top_p: float, remasking_strategy: str, confidence_threshold: float,
        stopping_criteria_idx: Sequence[int] | None, do_sample: bool, *, name: str = "input_ids", replay: bool = False,
    ):  # fmt: skip
        self.model = _blocks.check_model(model, shifted=False)
        gen_length = gen_length if max_gen_toks is None else max_gen_toks
        _blocks.check_lengths(block_length=block_length, gen_length=gen_length)
        integer("denoising_steps", denoising_steps, 1, 1 << 20)
        check_names("remasking_strategy", [remasking_strategy], STRATEGIES)
        self.prompt = _blocks.check_one_prompt(self.model, input_ids, mask_id, name)
        self.stops = _blocks.stop_ids("stopping_criteria_idx", stopping_criteria_idx)
        self.policy = _policy(remasking_strategy, confidence_threshold, temperature, top_k, top_p, do_sample, replay)
        self.arguments = dict(
            length=_blocks.ceil_to(self.given + gen_length, block_length), mask_id=mask_id, block=block_length,
            quotas=quota_schedule(block_length, denoising_steps), block_done=self._done,
        )  # fmt: skip

    def _done(self, row: Row) -> None:
        self.loop.store_block(row)
        if self.stops and any(t in self.stops for t in self.loop.state.canvas[0, self.given :].tolist()):
            row.finish_reason = "eos"

    def run(self, trim: bool, stats: bool) -> torch.Tensor | tuple[torch.Tensor, dict]:
        loop, p = self.loop, self.given
        loop.prefill(p)
        x = loop.run()
        if trim:
            decided = [i + 1 for i in range(p, len(x)) if not bool(loop.state.masked[0, i])]
            x = x[: next((i for i in range(p, len(x)) if x[i] in self.stops), max(decided, default=p))]
        out = torch.tensor([x], dtype=torch.int64, device=self.model.device)
        return (out, {"decoding_order": loop.order, "total_forward_steps": loop.forwards}) if stats else out


def _policy(strategy: str, threshold: float, temperature: float, top_k: int, top_p: float, do_sample: bool, replay: bool) -> Policy:
    number("temperature", temperature, 0.0, MAX_TEMPERATURE)
    kept_k, kept_p = _blocks.filters(top_k, top_p)
    if replay and (temperature != 1.0 or kept_k is not None or kept_p is not None):
        raise SettingError(f"sampled_tokens needs temperature=1, top_k=0 and top_p=1, got {temperature}, {top_k} and {top_p}")
    sampled = do_sample and temperature >= GREEDY and not replay
    rule, knobs = "sdar_static", {}
    if strategy == "low_confidence_dynamic":
        rule, knobs = "sdar_dynamic", dict(threshold=_blocks.bar("confidence_threshold", threshold))
    return Policy(
        rule=rule, score="leftmost" if strategy == "sequential" else "confidence", knobs=knobs, temperature=float(temperature) if sampled else 0.0,
        top_k=kept_k if sampled else None, top_p=kept_p if sampled else None, top_k_first=True, tempered=sampled,
    )  # fmt: skip
