"""The recorded runs of the authors' code, and how each one's arguments read as a call of ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import unmask
from unmask.compat import adablock, dream, fast_dllm, fast_dllm_v2, llada, llada2, sdar

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llada", "dream")
BLOCK_FAMILIES = ("sdar", "llada2", "fast_dllm_v2")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: family, file it stands in, its record."""

    family: str
    file: str
    data: dict

    @property
    def args(self) -> dict:
        return self.data["args"]

    @property
    def replays(self) -> bool:
        """Whether it is a run of a function in unmask.compat, which a user's own module can take too; the others are unmask.generate's."""
        return not self.file.startswith(("d2cache", "dinfer"))

    def __str__(self) -> str:
        return f"{self.family}-{self.file}-{self.data['id']}"


@dataclasses.dataclass
class Outcome:
    """ids: rows of tokens, with the prompt. nfe: what the function reported, None where it reports nothing. histories: of AdaBlock.
    order: what each forward settled, of block-causal models."""

    ids: list[list[int]]
    nfe: int | None = None
    histories: tuple[list, list] | None = None
    order: list | None = None


def files(family: str) -> list[Path]:
    return sorted((GOLDEN / family / "runs").glob("*.json"))


def runs(families: tuple[str, ...]) -> list[Run]:
    return [Run(family, path.stem, data) for family in families for path in files(family) for data in json.loads(path.read_text())["runs"]]


RUNS, BLOCK_RUNS = runs(FAMILIES), runs(BLOCK_FAMILIES)


def load(family: str, device: str = "cpu") -> unmask.Model:
    """The family's golden checkpoint; LLaDA2's and Fast-dLLM v2's config.json name no mask token of this small vocabulary."""
    ids = {"llada2": dict(mask_id=383, block_size=8), "fast_dllm_v2": dict(mask_id=383)}
    return unmask.load(GOLDEN / family / "checkpoint", overrides=ids.get(family), device=device)


def replay(run: Run, model: torch.nn.Module) -> Outcome:
    """Our call with the run's arguments."""
    if run.file.startswith("d2cache"):
        return _d2cache(run, model)
    if run.file.startswith("dinfer"):
        return _dinfer(run, model)
    prompt = torch.tensor(run.data["prompt_ids"], device=getattr(model, "device", "cpu"))
    return _REPLAY[run.family](run, model, prompt)


def _llada(run: Run, model, prompt) -> Outcome:
    args = dict(run.args)
    if run.file == "llada_generate":
        if args["attention_mask"] == "ones":
            args["attention_mask"] = torch.ones_like(prompt)
        return Outcome(llada.generate(model, prompt, **args).tolist())
    cache = {"plain": "", "prefix": "_prefix_cache", "dual": "_dual_cache"}[run.file.rsplit("_", 1)[1]]
    if run.file.startswith("adablock_") and "baseline" not in run.file:
        args["delimiter_threshold"] = float(args["delimiter_threshold"])
        x, nfe, blocks = getattr(adablock, f"generate_adablock{cache}")(model, prompt, **args)
        return Outcome(x.tolist(), sum(nfe), (nfe, blocks))
    x, nfe = getattr(fast_dllm, f"generate_with{cache}" if cache else "generate")(model, prompt, **args)
    return Outcome(x.tolist(), nfe)


def _dream(run: Run, model, prompt) -> Outcome:
    args = {k: v for k, v in run.args.items() if k not in ("delimiter_ids", "delimiter_ids_note")}  # the default ids are the authors'
    function = dream.diffusion_generate
    if run.file == "adablock_repo_parallel":
        function = adablock.dream_generate_parallel
    elif run.file.startswith("adablock"):
        function = adablock.dream_generate
    if run.file == "dream_origin":
        args["uniforms"] = run.data["uniforms_per_step"]
    out = function(model, prompt, return_dict_in_generate=True, **args)
    histories = (out.nfe_history, out.block_history) if run.file in ("adablock_plain", "adablock_dual") else None
    return Outcome(out.sequences.tolist(), sum(out.nfe_history) if prompt.shape[0] == 1 else None, histories)


_ALGS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def _d2cache(run: Run, model) -> Outcome:
    a, prompts = run.args, run.data["prompt_ids"]
    ragged = [[t for t in p if t != a["pad_token_id"]] for p in prompts] if run.file == "d2cache_padded_batch" else prompts
    settings = dict(block_size=a["block_length"], max_new_tokens=a["gen_length"], eos_stop=False, variant="d2cache", score=_ALGS[a["alg"]])
    steps = a["gen_length"] // a["num_transfer_tokens"]
    if "wide_in_thres" in a:
        settings.update(policy="wino", wide_in=a["wide_in_thres"], narrow_out=a["narrow_out_thres"])
    elif "kl_threshold" in a:
        settings.update(policy="klass", threshold=a["threshold"], kl_threshold=a["kl_threshold"], history=a["kl_history_length"])
    elif "gamma" in a:
        settings.update(policy="eb", gamma=a["gamma"])
    elif a.get("debias"):
        table = next(iter(load_file(GOLDEN / run.family / "d2cache_token_freq.safetensors").values())).float()
        settings.update(policy="pc", frequencies=table, clip=a["clip_alpha"], steps=steps)
        del settings["score"]
    elif a.get("threshold"):
        settings.update(policy="threshold", threshold=a["threshold"])
    elif a.get("factor"):
        settings.update(policy="factor", factor=a["factor"])
    else:
        settings.update(policy="quota", steps=steps)
    if a.get("sigma"):
        settings.update(certainty_sigma=a["sigma"])
    if a.get("cache"):
        settings.update(cache=_d2cache_cache(a["cache"]))
    results = unmask.generate(model, ragged, **settings)
    pads = [p[: len(p) - len(r)] for p, r in zip(prompts, ragged, strict=True)]
    return Outcome([pad + r.canvas for pad, r in zip(pads, results, strict=True)], max(r.nfe for r in results))


def _d2cache_cache(given: dict) -> unmask.caches.CacheRule:
    """A cache of that repository, as ours."""
    kind, settings = given.get("cls"), {k: v for k, v in given.items() if k not in ("cls", "use_dual")}
    if kind == "d2Cache":
        return unmask.caches.D2(**settings)
    if kind == "dLLMCache":
        return unmask.caches.DLLM(prompt_every=settings["kp"], response_every=settings["kr"], ratio=settings["rou"])
    assert not settings
    return unmask.caches.Dual() if given.get("use_dual") else unmask.caches.Prefix()


def _dinfer(run: Run, model) -> Outcome:
    a = run.args
    settings = dict(threshold=a["threshold"], block_size=a["block_length"], max_new_tokens=a["gen_length"])
    settings["eos_stop"] = "block" if a["early_stop"] else False
    if "credit_alpha" in a:
        settings.update(policy="credit", credit_alpha=a["credit_alpha"], boost_gamma=a["boost_gamma"], decay_beta=a["decay_beta"])
    elif "low_threshold" in a:
        settings.update(policy="hierarchy", low_threshold=a["low_threshold"])
    else:
        settings.update(variant="dinfer")
    result = unmask.generate(model, run.data["prompt_ids"][0], **settings)
    return Outcome([result.canvas], result.nfe)


def _sdar(run: Run, model, prompt) -> Outcome:
    args = dict(run.args)
    if run.file == "sdar_generate_sampled":
        args["sampled_tokens"] = run.data["sampled_tokens_per_denoise_forward"]
    x, stats = sdar.block_diffusion_generate(model, {"input_ids": prompt}, return_forward_stats=True, **args)
    return Outcome(x.tolist(), stats["total_forward_steps"], order=stats["decoding_order"])


def _llada2(run: Run, model, prompt) -> Outcome:
    function = llada2.generate_cached if run.file == "llada2_cached" else llada2.generate
    x, stats = function(model, prompt, record_decoding_order=True, **run.args)
    return Outcome(x.tolist(), stats["nfe"], order=stats["decoding_order"])


def _fast_dllm_v2(run: Run, model, prompt) -> Outcome:
    x, stats = fast_dllm_v2.generate(model, prompt, return_decoding_order=True, **run.args)
    return Outcome(x.tolist(), stats["total_forward_steps"], order=stats["decoding_order"])


_REPLAY = {"llada": _llada, "dream": _dream, "sdar": _sdar, "llada2": _llada2, "fast_dllm_v2": _fast_dllm_v2}
