"""commit against the PyTorch loops it replaces, in one run: rows with a block of 32 (or 128) masked positions each.

`torch` is written after Fast-dLLM's rules: per row top-k of the masked confidences and a Python loop over the ranks (factor, quota) or
over the threshold's survivors, then torch.where into the canvas.
"""

from __future__ import annotations

import argparse

import torch

import report
import timing
from unmask import ops
from unmask.ops import Rule

SHAPES = {"1 row x 32": (1, 32), "8 rows x 32": (8, 32), "32 rows x 32": (32, 32), "8 rows x 128": (8, 128)}
LENGTH = 256


def torch_commit(rule: Rule, canvas, masked, tokens, confidence, threshold: float, factor: float, quota: int):
    """[B, L] tensors of the block's rows."""
    confidence = torch.where(masked, confidence, -torch.inf)
    transfer = torch.zeros_like(masked)
    for b in range(canvas.shape[0]):
        left = int(masked[b].sum())
        if left == 0:
            continue
        values, index = torch.topk(confidence[b], k=quota if rule is Rule.QUOTA else left)
        count = len(values)
        if rule is not Rule.QUOTA:
            for n in range(1, count):
                bar = threshold if rule is Rule.THRESHOLD else 1 - factor / (n + 2)
                if values[n] < bar:
                    count = n
                    break
        transfer[b, index[:count]] = True
    canvas[transfer] = tokens[transfer]
    masked &= ~transfer
    return masked.any(-1)


def case(name: str, rule: Rule, quick: bool) -> dict[str, object]:
    batch, block = SHAPES[name]
    n = batch * block
    canvas = torch.zeros(batch, LENGTH, dtype=torch.int64)
    fresh = torch.zeros(batch, LENGTH, dtype=torch.bool)
    fresh[:, :block] = True
    masked = fresh.clone()
    cu, row = torch.arange(0, n + 1, block), torch.arange(batch)
    pos = torch.arange(block).repeat(batch)
    token, score = torch.randint(0, 1000, (n,)), torch.rand(n)
    quota, threshold = torch.full((batch,), 4), torch.full((batch,), 0.9)
    block_tokens, block_scores = token.view(batch, block), score.view(batch, block)

    def ours():
        masked.copy_(fresh)
        return ops.commit(canvas, masked, cu, row, pos, token, score, rule=rule, params=(1.0,), quota=quota, threshold=threshold)

    def theirs():
        masked.copy_(fresh)
        return torch_commit(rule, canvas[:, :block], masked[:, :block], block_tokens, block_scores, 0.9, 1.0, 4)

    options = {"rounds": 3, "min_time": 0.05} if quick else {"rounds": 5, "min_time": 0.2}
    times = timing.measure({"ours": ours, "torch": theirs, "reset": lambda: masked.copy_(fresh)}, **options)
    mine, other = times["ours"] - times["reset"], times["torch"] - times["reset"]
    return {
        "shape": name,
        "rule": rule.name,
        "ours": report.seconds(mine),
        "ns per candidate": mine / n * 1e9,
        "torch": report.seconds(other),
        "x torch": other / mine,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    args = parser.parse_args()
    rules = (Rule.QUOTA, Rule.THRESHOLD, Rule.FACTOR)
    rows = [case(name, rule, args.quick) for rule in rules for name in SHAPES]
    notes = ["Times without the reset of the mask that each call needs; ours includes the op call, ~11 us here."]
    report.write("op_commit", "commit", {"commit": rows}, notes)


if __name__ == "__main__":
    main()
