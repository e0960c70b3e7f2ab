"""verify_ratio and verify_greedy at production shapes against the PyTorch code that speculative decoding uses, in one run, inputs rotated.

`S2D2`: two fp32 softmaxes, gathers and a ratio, `.item()` a position, clamp, renormalise and multinomial at the rejection, after its
generate_ssd_policy.py. `loop`: equal windows by `.all()` and `.item()`, a node at a time, as SSD and FreeDave loops are written. Drafts are drawn from
p; q is p with noise on the logits, so most spans end in a rejection. GB/s: every row of p and q once, beside what this machine reads.
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

import report
import timing
from unmask import ops

SPANS = {"1 span of 32, V 126464 (LLaDA)": (1, 32, 126_464), "8 spans of 4, V 151936 (SDAR)": (8, 4, 151_936), "1 span of 4, V 151936": (1, 4, 151_936)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHAINS = {"1 row, 9 nodes x 256 (SSD)": (1, 9, 256), "32 rows, 5 nodes x 32 (FreeDave)": (32, 5, 32)}


def s2d2(p_logits: torch.Tensor, q_logits: torch.Tensor, token: torch.Tensor, batch: int) -> list[tuple[int, int]]:
    p, q = p_logits.float().softmax(-1), q_logits.float().softmax(-1)
    ratio = (q.gather(1, token[:, None]) / p.gather(1, token[:, None]).clamp(min=1e-12)).view(batch, -1)
    u = torch.rand_like(ratio)
    out = []
    for b in range(batch):
        accepted, following = 0, -1
        for j in range(ratio.shape[1]):
            if u[b, j].item() < min(1.0, ratio[b, j].item()):
                accepted += 1
                continue
            n = b * ratio.shape[1] + j
            residual = (q[n] - p[n]).clamp(min=0)
            mass = residual.sum()
            following = int(torch.multinomial(residual / mass if mass > 0 else q[n], 1))
            break
        out.append((accepted, following))
    return out


def ratio_case(name: str, dtype: str, options: dict, read: float) -> dict[str, object]:
    batch, length, vocab = SPANS[name]
    n = batch * length

    def make():
        p = torch.randn(n, vocab) * 3
        return p.to(DTYPES[dtype]), (p + 0.3 * torch.randn(n, vocab)).to(DTYPES[dtype]), torch.multinomial(p.softmax(-1), 1)[:, 0]

    inputs = timing.rotating(make)
    row, cu = torch.arange(n), torch.arange(0, n + 1, length)
    key = row // length, torch.zeros_like(row), row % length
    run = lambda i, **o: ops.verify_ratio(*inputs[i][:2], row, row, inputs[i][2], cu, *key, **o)  # noqa: E731
    fns = {
        "ours": lambda i: run(i),
        "no draw": lambda i: run(i, resample=False),
        "S2D2": lambda i: s2d2(*inputs[i], batch),
    }
    times = timing.measure(fns, **options)
    size = 2 * n * vocab * DTYPES[dtype].itemsize / 1e9
    result = run(0)
    return {
        "shape": name,
        "dtype": dtype,
        "ours": report.seconds(times["ours"]),
        "GB/s": size / times["ours"],
        "% of read": 100 * size / times["ours"] / read,
        "without the draw": report.seconds(times["no draw"]),
        "draws": int((result.next >= 0).sum()),
        "S2D2": report.seconds(times["S2D2"]),
        "x S2D2": times["S2D2"] / times["ours"],
    }


def loop(node: torch.Tensor, after: torch.Tensor, count: list[int], mask_id: int, subset: bool) -> list[int]:
    out = []
    for b, n in enumerate(count):
        at = 0
        if subset:
            while True:
                later = [j for j in range(at + 1, n) if ((node[b, j] == mask_id) | (node[b, j] == after[b, at])).all().item()]
                if not later:
                    break
                at = later[-1]
        else:
            while at + 1 < n and (node[b, at + 1] == after[b, at]).all().item():
                at += 1
        out.append(at)
    return out


def greedy_case(name: str, subset: bool, options: dict) -> dict[str, object]:
    """Every draft stands: the longest walk of a chain; for a fixed point one comparison."""
    batch, nodes, width = CHAINS[name]
    after = torch.randint(0, 1000, (batch, nodes, width))
    node = torch.cat((after[:, :1], after[:, :-1]), 1)
    if subset:
        after[:] = after[:, :1]
        node = torch.where(torch.arange(width) < torch.arange(nodes)[:, None], after, 1001)
    count = torch.full((batch,), nodes)
    listed = count.tolist()
    ours = lambda: ops.verify_greedy(node, after, None, count, 1001, subset)  # noqa: E731
    theirs = lambda: loop(node, after, listed, 1001, subset)  # noqa: E731
    if ours().last.tolist() != theirs():
        raise SystemExit(f"bench_op_verify: the two disagree at {name}")
    times = timing.measure({"ours": ours, "loop": theirs}, **options)
    line = {"shape": name, "rule": "subset" if subset else "chain", "ours": report.seconds(times["ours"])}
    return line | {"loop": report.seconds(times["loop"]), "x loop": times["loop"] / times["ours"]}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    args = parser.parse_args()
    options = {"rounds": 1, "min_time": 0.05, "min_samples": 2} if args.quick else {"rounds": 3, "min_time": 0.2, "min_samples": 3}
    read = timing.bandwidth()["read"]
    cases = [(name, dtype) for name in SPANS for dtype in DTYPES]
    ratio = [ratio_case(*c, options, read) for c in tqdm(cases, desc="verify_ratio")]
    greedy = [greedy_case(name, subset, options) for name in CHAINS for subset in (False, True)]
    notes = [f"This machine reads {read:.1f} GB/s from DRAM with {torch.get_num_threads()} threads (sum over fp32).",
             "A draw reads both rows again and needs the noise of every id that q favours; it runs once a span."]  # fmt: skip
    report.write("op_verify", "verify_ratio and verify_greedy", {"verify_ratio": ratio, "verify_greedy": greedy}, notes, read=read)


if __name__ == "__main__":
    main()
