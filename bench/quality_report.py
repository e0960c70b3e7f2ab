"""The report of bench/quality.py: tables, CSV, the plot, and what they must show."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from quality_configs import DELIMITERS, Config, one_per_step
from unmask.tiny.tasks import TASKS

WANTED_TOKENS = 2.5
WITHIN = 1.0  # points of accuracy
LOWEST_DRAWN = 62.0  # percent; what lies below is written in words


def row_of(config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """One configuration's numbers. accuracy: percent of all prompts, the mean over the tasks weighted by their prompts."""
    right, prompts, tokens, nfe = (sum(t[i] for t in result["tasks"].values()) for i in range(4))
    return {
        "group": config.group, "rule": config.rule, "line": config.line, "knob": config.knob, "value": "" if config.value is None else config.value,
        "accuracy": 100.0 * right / prompts, "tokens_per_forward": tokens / max(nfe, 1), "nfe": nfe / prompts, "prompts": prompts,
        **{task: 100.0 * t[0] / t[1] for task, t in result["tasks"].items()},
    }  # fmt: skip


def write(configs: Sequence[Config], results: Sequence[dict[str, Any]], run: dict[str, Any], quick: bool) -> Path:
    rows = [row_of(c, r) for c, r in zip(configs, results, strict=True)]
    base = rows[[c.key for c in configs].index(one_per_step().key)]
    sections = {}
    for group, title in (("rules", "Rules"), ("orders", "Orders"), ("schedules", "Schedules"), ("caches", "Caches")):
        sections[title] = [_line(r, base) for r in rows if r["group"] == group]
    sections["AdaBlock against fixed blocks at equal NFE"] = against_fixed(rows)
    name = "quality-quick" if quick else "quality"
    path = report.write(name, "Accuracy against tokens per forward of every rule", sections, notes(rows, base), run=run, rows=rows)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, base, path.with_suffix(".png"))
    return path


def _line(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return {
        "policy": row["rule"], "settings": ", ".join(x for x in (row["line"], f"{row['knob']} {row['value']}") if x),
        "accuracy %": f"{row['accuracy']:.1f}", "to one per step": f"{row['accuracy'] - base['accuracy']:+.1f}",
        "tokens per forward": f"{row['tokens_per_forward']:.2f}", "forwards": f"{row['nfe']:.2f}",
        **{task: f"{row[task]:.0f}" for task in TASKS},
    }  # fmt: skip


def notes(rows: list[dict[str, Any]], base: dict[str, Any]) -> list[str]:
    """What must be reached, and how to read the tables."""
    exact = [r for r in rows if r["group"] != "caches" or r["value"] == "none"]
    close = [r for r in exact if r["accuracy"] >= base["accuracy"] - WITHIN]
    best = max(close, key=lambda r: r["tokens_per_forward"])
    by_rule: dict[str, dict[str, Any]] = {}
    for r in close:
        if r["tokens_per_forward"] > by_rule.get(r["rule"], {"tokens_per_forward": 0.0})["tokens_per_forward"]:
            by_rule[r["rule"]] = r
    reach = sorted(by_rule.values(), key=lambda r: -r["tokens_per_forward"])
    verdict = "reached" if best["tokens_per_forward"] >= WANTED_TOKENS else "NOT REACHED"
    return [
        f"one token per step: {base['accuracy']:.1f}% of {base['prompts']} held-out prompts ({len(TASKS)} tasks); one prompt is "
        f"{100.0 / base['prompts']:.2f} points. Tokens count before the first EOS; the canvas is 32 positions, one block unless said.",
        f"most tokens per forward within {WITHIN:g} point of one token per step: {best['tokens_per_forward']:.2f} at {best['accuracy']:.1f}%, "
        f"{_name(best)} (wanted: at least {WANTED_TOKENS}; {verdict})",
        "the same for every rule that stays within it: " + ", ".join(f"{_short(r)} {r['tokens_per_forward']:.2f}" for r in reach),
        _verdict(rows),
        f"delimiters for AdaBlock: {' '.join(f'`{d}`' for d in DELIMITERS)} (json, function and pair hold them; its window is a quarter of the canvas).",
        "pc: frequencies of answers drawn as for training. osdt: each task calibrated on one sequence of its own. plackett_luce: orders given by "
        "confidence or left to right, as there is no learned head. edit replaces decided tokens by what the model predicts on top of them, which "
        "a model must have been trained for (LLaDA2.1): this one saw masks only, as LLaDA did, so editing ruins it.",
    ]


def _short(row: dict[str, Any]) -> str:
    return f"{row['rule']} ({row['line']})" if row["rule"] == "edit" and row["line"] else row["rule"]


def _name(row: dict[str, Any]) -> str:
    return " ".join(str(x) for x in (row["rule"], f"({row['line']})" if row["line"] else "", row["knob"], row["value"]) if x != "")


def against_fixed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each AdaBlock point beside the fixed blocks of the same size, whose accuracy is read off at the same NFE (linear between its points)."""
    found = []
    for r in (r for r in rows if r["group"] == "schedules" and r["line"].startswith("adablock")):
        size = r["line"].rsplit(" ", 1)[1]
        curve = [(x["nfe"], x["accuracy"]) for x in rows if x["group"] == "schedules" and x["line"] == f"fixed, block {size}"]
        fixed = at(curve, r["nfe"])
        found.append({
            "block": int(size), "threshold": r["value"], "NFE": f"{r['nfe']:.2f}", "AdaBlock %": f"{r['accuracy']:.1f}",
            "fixed % at this NFE": "beyond its points" if fixed is None else f"{fixed:.1f}",
            "difference": "" if fixed is None else f"{r['accuracy'] - fixed:+.1f}",
        })  # fmt: skip
    return found


def at(curve: list[tuple[float, float]], x: float) -> float | None:
    """The curve's value at x, linear between its points; None outside them."""
    points = sorted(curve)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return max(y0, y1) if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _verdict(rows: list[dict[str, Any]]) -> str:
    found = [float(r["difference"]) for r in against_fixed(rows) if r["difference"]]
    if not found:
        return "AdaBlock against fixed blocks at equal NFE: no two curves overlap here"
    mean = sum(found) / len(found)
    prompts = next(r["prompts"] for r in rows)
    noise = 100.0 * (2 * 0.04 / prompts) ** 0.5  # standard error of a difference of two accuracies near 96%, as if drawn apart
    verdict = "not behind" if mean >= 0 else f"behind by less than the noise of these prompts ({noise:.1f} points)" if -mean < noise else "BEHIND"
    better, more, pairs = at_same_threshold(rows)
    return (
        f"AdaBlock against fixed blocks at equal NFE: {mean:+.2f} points on average over {len(found)} points ({min(found):+.1f} to {max(found):+.1f}): "
        f"{verdict}. At the same block size and threshold its accuracy is {better:+.2f} points, with {more:+.1f}% forwards (means of {pairs} pairs)."
    )


def at_same_threshold(rows: list[dict[str, Any]]) -> tuple[float, float, int]:
    """AdaBlock against fixed blocks of one size and threshold: mean difference of accuracy in points, surplus of forwards in percent, pairs."""
    points = {(r["line"], r["value"]): r for r in rows if r["group"] == "schedules"}
    pairs = [(r, points[line.replace("adablock", "fixed"), value]) for (line, value), r in points.items() if line.startswith("adablock")]
    better = sum(a["accuracy"] - b["accuracy"] for a, b in pairs) / len(pairs)
    return better, 100.0 * (sum(a["nfe"] for a, _ in pairs) / sum(b["nfe"] for _, b in pairs) - 1.0), len(pairs)


def plot(rows: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """Left: rules, one line each. Right: schedules."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install 'unmask[plot]' (the numbers are written)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(15, 8), sharey=True)
    colours = plt.get_cmap("tab20").colors
    rules = list(dict.fromkeys(r["rule"] for r in rows if r["group"] == "rules"))
    for i, rule in enumerate(rules):
        mine = sorted((r for r in rows if r["group"] == "rules" and r["rule"] == rule), key=lambda r: r["tokens_per_forward"])
        style = dict(color=colours[i % len(colours)], marker="osD^v"[i % 5], linestyle="-" if len(mine) > 1 else "", linewidth=0.8, label=rule)
        panels[0].plot([r["tokens_per_forward"] for r in mine], [r["accuracy"] for r in mine], **style)
    lines = list(dict.fromkeys(r["line"] for r in rows if r["group"] == "schedules"))
    for i, line in enumerate(lines):
        mine = sorted((r for r in rows if r["group"] == "schedules" and r["line"] == line), key=lambda r: r["tokens_per_forward"])
        dashed = line.startswith("adablock")
        panels[1].plot(
            [r["tokens_per_forward"] for r in mine], [r["accuracy"] for r in mine], color=colours[2 * (i // 2)], marker="s" if dashed else "o",
            linestyle="--" if dashed else "-", label=line,
        )  # fmt: skip
    titles = {"rules": "every rule, one block of 32", "schedules": "schedules, threshold rule"}
    for panel, (group, title) in zip(panels, titles.items(), strict=True):
        panel.axhline(base["accuracy"] - WITHIN, color="grey", linewidth=0.8, linestyle=":")
        panel.axvline(WANTED_TOKENS, color="grey", linewidth=0.8, linestyle=":")
        below = [r for r in rows if r["group"] == group and r["accuracy"] < LOWEST_DRAWN]
        if below:
            words = ", ".join(f"{r['rule']} {r['accuracy']:.0f}% at {r['tokens_per_forward']:.2f}" for r in below)
            panel.text(0.99, 0.01, f"below: {words}", transform=panel.transAxes, fontsize=8, ha="right")
        panel.set(title=title, xlabel="tokens per forward, before EOS", ylim=(LOWEST_DRAWN, 100))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, ncols=5 if group == "rules" else 2, loc="lower center", bbox_to_anchor=(0.5, -0.27 if group == "rules" else -0.24))
    panels[0].set_ylabel("held-out accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
