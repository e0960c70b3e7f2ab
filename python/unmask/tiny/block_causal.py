"""Training of the block-causal sibling: what a row's blocks are, what sees what, and the loss.

A row is run as [noised part | clean copy] in one forward (BD3-LM, arXiv 2503.09573): a noised block sees itself and the
clean blocks before it, a clean block sees itself and the clean blocks before it. So every noised position is computed
exactly as decoding computes it, with the finished blocks' keys and values, and all blocks of a row are learned at once.
Only the blocks that hold the answer are noised: a prompt's blocks are never decoded.

Blocks of 4 positions, counted from the row's start, as SDAR's. Some of them are split into single positions, which makes
the model an autoregressive one there (a lone mask sees the clean tokens before it): a decoder that drafts with blocks and
verifies with block size 1 (S2D2, arXiv 2603.25702) asks the same weights for both, and its verifier meets finished blocks
of 4 before a block of singles. Hence a third of the rows keep all blocks whole, a third split all, a third split half.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .sdar_network import BlockNetwork
from .tasks import training_examples
from .tokenizer import EOS, MASK

BLOCK = 4
TAIL_WEIGHT = 0.1
"""Loss weight of the EOS tokens after the first, as in train.py."""
LEAST_RATIO = 0.4
"""The weight 1/t of a block of which a share t is masked is bounded here, as in train.py."""

KINDS: tuple[tuple[int, int, dict[str, float]], ...] = (
    (0, 62, {"add": 0.28, "sort": 0.38, "reverse": 0.14, "pair": 0.2}),
    (0, 21, {"close": 0.22, "function": 0.4, "finish": 0.38}),
    (0, 13, {"json": 0.7, "function": 0.1, "sort": 0.1, "pair": 0.1}),
    (48, 4, {"add": 0.1, "sort": 0.2, "reverse": 0.1, "close": 0.1, "json": 0.2, "function": 0.1, "pair": 0.1, "finish": 0.1}),
)
"""(least row length, how often in 100 steps, shares of the tasks). Tasks of like lengths go together: rows are no longer
than their longest needs. The last kind has the EOS tail of a long canvas, which decoding reaches only where it is told not to stop."""


@dataclass
class BlockBatch:
    """One step's rows, packed: N = W + L positions, the first W noised (a range of each row's positions), then all L clean.

    ids, positions: int64 [B, N]; mask: bool [B, N, N], True where row sees column; target: int64 [B, W], the clean ids of
    the noised part; weight: fp32 [B, W], 0 where not masked.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    target: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> BlockBatch:
        return BlockBatch(*(t.to(device) for t in vars(self).values()))

    def loss(self, network: BlockNetwork) -> Tensor:
        """Weighted cross entropy over the masked positions; the head runs on those only."""
        width = self.target.shape[1]
        chosen = self.weight > 0
        states = network.hidden(self.ids, self.positions, self.mask)[:, :width]
        weight = self.weight[chosen]
        losses = F.cross_entropy(network.head(states[chosen]).float(), self.target[chosen], reduction="none")
        return (losses * weight).sum() / weight.sum()


def block_ids(split: Tensor) -> Tensor:
    """Which block each position is in: split bool [B, L / 4] (True: four blocks of one position) -> int64 [B, L].

    Numbers grow along the row; equal numbers are one block.
    """
    position = torch.arange(split.shape[1] * BLOCK)
    return torch.where(split.repeat_interleave(BLOCK, 1), position, position // BLOCK * BLOCK)


def packed_mask(noised: Tensor, clean: Tensor) -> Tensor:
    """What sees what: block numbers of the noised part [B, W] and the clean copy [B, L] -> bool [B, W + L, W + L]."""
    b, width = noised.shape
    own, before = noised[:, :, None] == noised[:, None], noised[:, :, None] > clean[:, None]
    nothing = torch.zeros(b, clean.shape[1], width, dtype=torch.bool)
    return torch.cat((torch.cat((own, before), 2), torch.cat((nothing, clean[:, :, None] >= clean[:, None]), 2)), 1)


def draw_masks(split: Tensor, eligible: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks and loss weights per position: split bool [B, L / 4], eligible bool [B, L] -> bool [B, L], fp32 [B, L].

    A whole block with n eligible positions has 1 to n of them masked, each count equally often (a share t ~ U(0, 1) with
    the draws that mask nothing left out), weighted by n / count, bounded. A split block is masked where it is eligible:
    a block of one position is either masked or says nothing.
    """
    b, chunks = split.shape
    inside = eligible.view(b, chunks, BLOCK)
    n = inside.sum(-1, keepdim=True)
    count = 1 + (torch.rand(b, chunks, 1, generator=generator) * n).long()
    count = torch.where(split[..., None], n, count.minimum(n))
    order = torch.rand(b, chunks, BLOCK, generator=generator).masked_fill(~inside, 2.0)
    masked = inside & (order.argsort(-1).argsort(-1) < count)
    weight = torch.where(split[..., None], 1.0, 1.0 / (count / n.clamp(min=1)).clamp(min=LEAST_RATIO))
    return masked.view(b, -1), (weight * masked).view(b, -1)


def make_block_batch(tokenizer: Tokenizer, seed: int, step: int, rows: int) -> BlockBatch:
    """Draw examples, split some blocks, mask, and pack; everything depends on (seed, step, rows) only."""
    rng = random.Random(f"{seed} block step {step}")
    least, _, shares = rng.choices(KINDS, [often for _, often, _ in KINDS])[0]
    examples = training_examples(rows, rng, shares)
    mask_id, eos_id = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    prompts = tokenizer.encode_batch_fast([e.prompt for e in examples])
    wholes = tokenizer.encode_batch_fast([f"{e.prompt} {e.answer}" for e in examples])
    begin = torch.tensor([len(p.ids) for p in prompts])
    end = torch.tensor([len(w.ids) for w in wholes])  # where the first EOS stands
    length = max(least, (int(end.max()) // BLOCK + 1) * BLOCK)
    clean = torch.full((rows, length), eos_id)
    for row, whole in enumerate(wholes):
        clean[row, : len(whole.ids)] = torch.tensor(whole.ids)

    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    chance = torch.rand(rows, 1, generator=generator)
    split_chance = torch.where(chance < 1 / 3, 0.0, torch.where(chance < 2 / 3, 1.0, 0.5))
    split = torch.rand(rows, length // BLOCK, generator=generator) < split_chance
    position = torch.arange(length)[None]
    masked, weight = draw_masks(split, position >= begin[:, None], generator)
    weight = torch.where(position > end[:, None], TAIL_WEIGHT, 1.0) * weight
    noisy = torch.where(masked, mask_id, clean)

    first = begin // BLOCK * BLOCK  # where the first block with an answer token starts
    needed = length - first if least else (end // BLOCK + 1) * BLOCK - first
    width = int(needed.max())
    place = first.clamp(max=length - width)[:, None] + torch.arange(width)[None]
    blocks = block_ids(split)
    return BlockBatch(
        ids=torch.cat((noisy.gather(1, place), clean), 1),
        positions=torch.cat((place, position.expand(rows, -1)), 1),
        mask=packed_mask(blocks.gather(1, place), blocks),
        target=clean.gather(1, place),
        weight=weight.gather(1, place),
    )
