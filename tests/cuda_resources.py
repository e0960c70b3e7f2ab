"""What ptxas said of every CUDA kernel, against the committed table: no spills, no serialised wgmma, and registers, local memory and
shared memory within what the table allows. (Local memory without spills: sine and cosine of large arguments in rope_heads.)

    python tests/cuda_resources.py REPORTS            # REPORTS: the folder that .ci/nvcc-report filled; fails on a regression
    python tests/cuda_resources.py REPORTS --write    # makes the table anew: tests/cuda_resources.tsv
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_suffix(".tsv")
COLUMNS = ("kernel", "arch", "registers", "stack", "spill", "shared")
SLACK = 8  # registers: what another version of ptxas may add
STATIC_SHARED = 48 * 1024  # what a kernel may have without asking


def read_reports(folder: Path) -> tuple[list[tuple], list[str]]:
    """Rows of COLUMNS, sorted, and lines of ptxas about wgmma that it could not run asynchronously."""
    rows, slow = {}, []
    for path in sorted(folder.glob("*.txt")):
        kernel = arch = ""
        stack = spill = 0
        for line in path.read_text(errors="replace").splitlines():
            if "(C75" in line:
                slow.append(f"{path.name}: {line.strip()}")
            if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
                kernel, arch = found.groups()
            elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                stack, spill = int(found[1]), int(found[2]) + int(found[3])
            elif found := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                rows[kernel, arch] = (int(found[1]), stack, spill, int(shared[1]) if shared else 0)
    names = sorted({kernel for kernel, _ in rows})
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    plain = {name: _short(text) for name, text in zip(names, shown, strict=True)}
    return sorted((plain[k], a, *rest) for (k, a), rest in rows.items()), slow


def _short(text: str) -> str:
    """unmask::cuda::f<(unmask::FloatType)1, 64>(unmask::cuda::Job) -> f<1, 64>"""
    text = re.sub(r"^void ", "", text)
    depth, end = 0, len(text)
    for i, c in enumerate(text):  # the parameter list: the first parenthesis outside of <>
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return text[:end].replace("unmask::cuda::", "").replace("(unmask::FloatType)", "")


def faults(rows: list[tuple], slow: list[str], table: dict[tuple[str, str], tuple[int, int, int]]) -> list[str]:
    """table: (kernel, arch) -> registers, stack, static shared memory."""
    out = list(slow)
    for kernel, arch, registers, stack, spill, shared in rows:
        name = f"{kernel} for sm_{arch}"
        if spill:
            out.append(f"{name}: {spill} bytes of spills; there must be none")
        if shared > STATIC_SHARED:
            out.append(f"{name}: {shared} bytes of static shared memory, at most {STATIC_SHARED}")
        if (kernel, arch) not in table:
            out.append(f"{name}: not in {TABLE.name}; add it with --write")
            continue
        most, most_stack, most_shared = table[kernel, arch]
        if registers > most + SLACK or stack > most_stack or shared > most_shared:
            got = f"{registers} registers, {stack} bytes of local and {shared} of shared memory"
            out.append(f"{name}: {got}; the table has {most}, {most_stack} and {most_shared}")
    missing = set(table) - {row[:2] for row in rows}
    return out + [f"{k} for sm_{a}: in {TABLE.name} but not compiled" for k, a in sorted(missing)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows, slow = read_reports(args.reports)
    if not rows:
        print(f"cuda_resources: {args.reports} holds no report of ptxas; was unmask built with .ci/nvcc-report?", file=sys.stderr)
        return 1
    if args.write:
        with TABLE.open("w", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS, *rows])
        table = {row[:2]: (row[2], row[3], row[5]) for row in rows}
    else:
        with TABLE.open() as file:
            table = {(r["kernel"], r["arch"]): (int(r["registers"]), int(r["stack"]), int(r["shared"])) for r in csv.DictReader(file, delimiter="\t")}
    found = faults(rows, slow, table)
    for line in found:
        print(line, file=sys.stderr)
    worst = max(rows, key=lambda row: row[2])
    print(f"{len(rows)} kernels of {len({r[1] for r in rows})} architectures: {len(found)} faults; most registers: {worst[2]} ({worst[0]}, sm_{worst[1]})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
