"""`info`: run-time facts of the op library, and the status bits that ops report."""

from __future__ import annotations

import enum

import torch

ISA_NAMES = ("portable", "avx2", "avx512", "avx512bf16")


class Status(enum.IntFlag):
    """Bits of the int32 status words (csrc/common/status.h). An entry with a bit set reads and writes nothing."""

    OK = 0
    NAN = 1  # logits: a NaN in the row
    ALL_INF = 2  # logits: no candidate above -inf
    BAD_ROW = 4  # row index outside the tensor it points into
    BAD_ID = 8  # token id outside [0, V)
    BAD_SLOT = 16  # K/V slot or canvas position outside its tensor
    BAD_SEGMENT = 32  # segment, length or offset out of range or not monotone
    NAN_SCORE = 64  # commit: NaN score, position skipped

    def describe(self) -> str:
        words = {
            Status.NAN: "a NaN in the logits",
            Status.ALL_INF: "no candidate token above -inf",
            Status.BAD_ROW: "a row index out of range",
            Status.BAD_ID: "a token id outside the vocabulary",
            Status.BAD_SLOT: "a K/V slot or position out of range",
            Status.BAD_SEGMENT: "a segment, length or offset out of range",
            Status.NAN_SCORE: "a NaN score",
        }
        return ", ".join(text for bit, text in words.items() if self & bit) or "ok"


def raise_on_status(status: torch.Tensor, where: str) -> None:
    """Raises ValueError naming `where`, the first bad entry and its reason, if any word of `status` is non-zero (one device read)."""
    bad = torch.nonzero(status)
    if bad.numel():
        index = int(bad[0, 0])
        raise ValueError(f"{where}: entry {index}: {Status(int(status.flatten()[index])).describe()}")


def isa() -> str:
    """Instruction set that the CPU kernels use in this process."""
    return ISA_NAMES[torch.ops.unmask.info(1)]


def best_isa() -> str:
    """Best instruction set of this CPU that the library has kernels for."""
    return ISA_NAMES[torch.ops.unmask.info(2)]


def has_hopper_kernels() -> bool:
    """True if the library has the kernels that only sm_90a runs (TMA and wgmma)."""
    return torch.ops.unmask.info(-1) == 1


def cuda_archs() -> list[int]:
    """CUDA architectures compiled into the library (90 stands for 90a); empty for a CPU-only build."""
    return [torch.ops.unmask.info(5 + i) for i in range(torch.ops.unmask.info(4))]
