"""Timing and reports of the scripts that run on a GPU (gpu_ops.py, gpu_step.py): CUDA events around replays of graphs, rivals interleaved,
and the rates of this machine's copy and product, measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

import machine
import report

ROUNDS = 9
IN_GRAPH = 20  # calls
Call = Callable[[int], object]  # of a rotation index


def time_call(fn: Call, calls: int) -> float:
    """Seconds per call, by events on the current stream: where the host is slower than the GPU they see the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(calls):
        fn(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def graphed(fn: Call, calls: int) -> Call | None:
    """A graph of `calls` calls, which leaves the host's share out; None for what a graph cannot capture (host reads)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                fn(i)
    except Exception:
        torch.cuda.synchronize()
        return None
    return lambda _: graph.replay()


def measure(calls: Mapping[str, Call], in_graph: int = IN_GRAPH) -> tuple[dict[str, float], list[str]]:
    """Median seconds per call of every rival, interleaved, as replays of a graph; and which were called eagerly instead. Eager calls of
    a few microseconds measure the host. in_graph: calls in a graph; 0 = call every rival as it is."""
    counts, runs, eager, per_run = {}, {}, [], {}
    for label, fn in calls.items():
        time_call(fn, 3)
        graph = graphed(fn, in_graph) if in_graph else None
        if graph is None:
            eager.append(label)
        runs[label], per_run[label] = graph or fn, in_graph if graph else 1
        counts[label] = max(5, min(200, int(5e-3 / time_call(runs[label], 3))))
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for r in range(ROUNDS):
        for label in list(calls)[:: 1 if r % 2 == 0 else -1]:
            samples[label].append(time_call(runs[label], counts[label]) / per_run[label])
    return {label: statistics.median(s) for label, s in samples.items()}, eager


def copy_rate() -> float:
    """Bytes read plus written per second of a large copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / min(time_call(lambda _: b.copy_(a), 10) for _ in range(5))


def matmul_rate() -> float:
    """FLOP per second of a large bf16 product, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / min(time_call(lambda _: a @ b, 10) for _ in range(5))


def gpu_facts() -> dict[str, str]:
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    line = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    return dict(zip(fields.split(","), (x.strip() for x in line.splitlines()[0].split(",")), strict=True))


class Run:
    """Facts and ceilings of one run: taken before the cases, written beside them. copy: bytes/s; products: FLOP/s."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --dry-run checks the cases on the CPU")
        self.copy, self.products, self.facts, self.origin = copy_rate(), matmul_rate(), gpu_facts(), machine.origin()

    def write(self, folder: Path, name: str, title: str, sections: Mapping[str, Iterable[Mapping]], notes: Iterable[str] = ()) -> None:
        """Prints and writes <name>-<gpu>-<date>.md and .json. sections: heading (may be empty) -> table rows. notes: lines under the tables."""
        f = self.facts
        head = f"{f['name']}, driver {f['driver_version']}, SM {f['clocks.sm']} of {f['clocks.max.sm']}, memory {f['clocks.mem']}, "
        head += f"torch {torch.__version__}, CUDA {torch.version.cuda}, commit {self.origin['commit']}; `{self.origin['command']}`; "
        head += f"copy {self.copy / 1e12:.2f} TB/s, bf16 matmul {self.products / 1e12:.0f} TFLOP/s"
        tables = {heading: [dict(row) for row in rows] for heading, rows in sections.items()}
        text = [f"# {title}", head]
        for heading, rows in tables.items():
            text += [f"## {heading}"] if heading else []
            text.append(report.table(rows))
        text += ["\n".join(f"- {note}" for note in notes)] if notes else []
        stem = folder / f"{name}-{f['name'].lower().replace(' ', '-')}-{self.origin['date']}"
        rows = tables[""] if list(tables) == [""] else tables
        data = {"gpu": f, "origin": self.origin, "copy_rate": self.copy, "matmul_rate": self.products, "rows": rows}
        stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1, default=str) + "\n")
        print(stem.with_suffix(".md").read_text())
