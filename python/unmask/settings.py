"""Every setting of `generate`, with defaults, ranges and what they resolve to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .decode import daedal_knobs
from .decode.caches import CacheRule, cache_for, read_cache
from .decode.policy import MAX_TEMPERATURE, Policy
from .decode.schedule import AdaBlock, AlignedBlocks, FixedBlocks
from .decode.soft import SoftMasks
from .decode.state import row_seeds
from .decode.table import KNOBS, POLICIES, RULES, RuleSpec
from .errors import SettingError, check_names
from .speculate.methods import MAX_NODES, S2D2, Auto, Method, read_method
from .values import integer, number, plain

if TYPE_CHECKING:
    from .models.config import ModelConfig
    from .models.foreign import Foreign
    from .models.model import Model
    from .prompts import Prompts

SCHEDULES = ("fixed", "adablock", "daedal")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one generation.

    max_new_tokens: positions to fill after the prompt (default 32). block_size: positions denoised together, left to right block by
    block (default 32, or the length that a block-causal model was trained with, of which it must be a divisor or a multiple).
    policy: the decoding rule, "threshold" by default; every rule, its source and its own settings: `unmask.policies()` or docs/policies.md.
    Settings of a rule (threshold, steps, factor, gamma, ...) are given by name beside these ones; one that belongs to another rule raises.
    score: what orders positions, "confidence", "margin", "entropy", "random", "leftmost" (each rule says which it takes), or a function of a
    StepView that returns float [N] on the device. threshold must be given, at most 0, for policy="threshold" with score="entropy".
    position_bias: lambda; -lambda (i - s) is added to the score i - s positions behind the block's start. certainty_sigma: the score is
    multiplied by the Gaussian share of decided neighbours (d2Cache's certainty prior).
    schedule: "fixed" blocks or "adablock" (arXiv 2509.26432): blocks end at a confident delimiter. delimiters: token ids, or texts of one
    token each (default: a line break); delimiter_threshold (default 0.3), delimiter_window (share of the region, default 0.25). "daedal" (arXiv 2508.00819): the answer grows while it is decoded, up to
    max_new_tokens; its own settings (initial_tokens, high_threshold, low_threshold, eos_threshold, expand_threshold, expansion, eos_window)
    are in docs/daedal.md; it brings its own commit rule, so policy, score and settings of policies are refused.
    temperature: 0 = argmax; otherwise Gumbel-max sampling. top_p, top_k: nucleus and top-k filters in Dream's order, or with
    top_k_first=True in SDAR's; confidence_source: "clean" (default: the plain softmax) or "tempered" (after temperature and filters, as in
    Dream; implied by top_p and top_k). repetition_penalty: 1 = off.
    suppress: token ids that are never chosen and take no probability. logits_eos_inf: the model's end tokens are among them.
    confidence_eos_eot_inf: end tokens may be chosen but rank last.
    cfg_scale: classifier-free guidance; cfg_convention "llada": logits u + (w + 1)(c - u), 0 = off; "dream": u + w (c - u), 1 = off.
    negative_prompt: text or ids that stand in the unconditional input instead of the masked prompt.
    soft_masks: an unmask.SoftMasks: masks carry a mix of the embeddings of their likeliest tokens (arXiv 2510.17206).
    cache: by default the exact one: "none", or "block" (finished blocks) for block-causal models. Others are approximate: "prefix", "dual",
    "dllm", "dkv", ... (docs/caches.md), with settings as "dual:refresh=4" or as an object of unmask.caches.
    speculate: lossless self-speculation, "ssd" (arXiv 2510.04147), "freedave" (arXiv 2510.00294) or "auto": the tokens, order and end of the
    plain run in fewer forwards; with settings as "ssd:tree=positions" (docs/speculate.md); or "s2d2" (arXiv 2603.25702), for block-causal
    models, which verifies drafts with the model itself at block size 1 and is not lossless (docs/speculate-s2d2.md). draft: nodes that a forward verifies per row, itself
    among them (default 4, with "auto" at most 8); 1 is the plain run.
    seed: one integer, row i uses hash(seed, i); seeds: one per row instead. eos_stop: end a row, and cut it, at its first EOS;
    "block" ends it only where a block ends.
    stop: a string or up to 16 strings that end and cut the text. chat: the prompt is a user message or a list of messages.
    on_invalid: "raise" or "skip" (end that row only) when a row's logits hold NaN or nothing but -inf. trace: True keeps a record per
    forward; "predictions" also the canvas filled with every prediction, for voting over steps.
    """

    max_new_tokens: int = 32
    block_size: int | None = None
    policy: str = "threshold"
    score: str | Callable[..., Any] | None = None
    position_bias: float = 0.0
    certainty_sigma: float | None = None
    schedule: str = "fixed"
    delimiters: tuple[int | str, ...] | None = None
    delimiter_threshold: float | None = None
    delimiter_window: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    top_k_first: bool = False
    confidence_source: str = "clean"
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    cfg_scale: float | None = None
    cfg_convention: str = "llada"
    negative_prompt: Any = None
    soft_masks: SoftMasks | None = None
    cache: str | CacheRule | None = None
    speculate: str | Method | S2D2 | None = None
    draft: int | None = None
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    eos_stop: bool | str = True
    stop: tuple[str, ...] = ()
    chat: bool = False
    on_invalid: str = "raise"
    trace: bool | str = False
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule_knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], forbidden: Sequence[str] = ()) -> Settings:
        """Builds and validates; an unknown name raises SettingError with the nearest valid one."""
        own = [f.name for f in dataclasses.fields(cls) if f.name not in forbidden and f.name not in ("knobs", "schedule_knobs")]
        check_names("setting", kwargs, [*own, *KNOBS, *daedal_knobs.NAMES])
        values = {name: value for name, value in kwargs.items() if name in own}
        knobs = {name: plain(value) for name, value in kwargs.items() if name not in own}
        growing = daedal_knobs.NAMES if values.get("schedule") == "daedal" else tuple(n for n in daedal_knobs.NAMES if n not in KNOBS)
        schedule_knobs = {name: knobs.pop(name) for name in growing if name in knobs}
        if values.get("schedule") == "daedal" and "max_new_tokens" not in values:
            raise SettingError("schedule='daedal' needs max_new_tokens, the longest that an answer may become (the authors' is 2048)")
        for name in ("stop", "delimiters"):
            if isinstance(values.get(name), str):
                values[name] = (values[name],)
        for name in ("stop", "suppress", "seeds", "delimiters"):
            if values.get(name) is not None and not isinstance(values[name], tuple):
                try:
                    values[name] = tuple(values[name])
                except TypeError as e:
                    raise SettingError(f"{name} must be a list, got {values[name]!r}") from e
        return cls(**{name: plain(value) for name, value in values.items()}, knobs=knobs, schedule_knobs=schedule_knobs)

    def __post_init__(self):
        integer("max_new_tokens", self.max_new_tokens, 0, 1 << 20)
        if self.block_size is not None:
            integer("block_size", self.block_size, 1, 1 << 20)
        check_names("policy", [self.policy], POLICIES)
        check_names("schedule", [self.schedule], SCHEDULES)
        cache = None if self.cache is None else read_cache(self.cache)
        check_names("on_invalid", [self.on_invalid], ("raise", "skip"))
        check_names("confidence_source", [self.confidence_source], ("clean", "tempered"))
        check_names("cfg_convention", [self.cfg_convention], ("llada", "dream"))
        if self.policy == "threshold" and self.score == "entropy" and "threshold" not in self.knobs:
            raise SettingError("threshold must be given for score='entropy': nats, at most 0, for example -0.3")
        for name in ("delimiters", "delimiter_threshold", "delimiter_window"):
            if getattr(self, name) is not None and self.schedule != "adablock":
                raise SettingError(f"{name} is for schedule='adablock', got schedule={self.schedule!r}; leave it out or change the schedule")
        for name in self.schedule_knobs:
            if self.schedule != "daedal":
                raise SettingError(f"{name} is for schedule='daedal', got schedule={self.schedule!r}; leave it out or change the schedule")
        if self.schedule == "daedal":
            daedal_knobs.check_alone(self)
            daedal_knobs.resolve(self.schedule_knobs, self.max_new_tokens)
        if self.schedule == "adablock" and self._spec.uses_steps and self.knobs.get("steps") is not None:
            raise SettingError("steps needs schedule='fixed': with 'adablock' the number of blocks is not known before the run")
        if self.cfg_scale is not None:
            number("cfg_scale", self.cfg_scale, 0.0, 1e30)
        if self.negative_prompt is not None and self.guidance_weight is None:
            raise SettingError("negative_prompt needs guidance: give cfg_scale")
        if self.guidance_weight is not None and cache is not None and cache.name not in ("none", "block"):
            raise SettingError(f"cfg_scale needs cache='none', got cache={str(cache)!r}")
        if self.guidance_weight is not None and "no guidance" in self._spec.needs:
            raise SettingError(f"policy={self.policy!r} does not take guidance; leave cfg_scale out")
        if cache is not None and cache.name not in ("none", "block") and "no cache" in self._spec.needs:
            raise SettingError(f"policy={self.policy!r} needs cache='none', got cache={str(cache)!r}: it changes tokens whose K/V a cache would keep")
        if cache is not None and not cache.every_position and self.schedule != "fixed":
            raise SettingError(f"cache={str(cache)!r} needs schedule='fixed', got {self.schedule!r}: it does not forward every position when a block opens")
        if self.speculate is not None:
            read_method(self.speculate)
        if self.draft is not None:
            if self.method is None or isinstance(self.method, S2D2):
                raise SettingError("draft is for speculate='ssd', 'freedave' or 'auto'; leave it out, or give speculate")
            integer("draft", self.draft, 1, MAX_NODES)
        integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for i, s in enumerate(self.seeds or ()):
            integer(f"seeds[{i}]", s, 0, (1 << 63) - 1)
        for name in ("top_k_first", "logits_eos_inf", "confidence_eos_eot_inf", "chat"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.eos_stop, bool) and self.eos_stop != "block":
            raise SettingError(f"eos_stop must be True, False or 'block', got {self.eos_stop!r}")
        if not isinstance(self.trace, bool) and self.trace != "predictions":
            raise SettingError(f"trace must be True, False or 'predictions', got {self.trace!r}")
        if self.soft_masks is not None and not isinstance(self.soft_masks, SoftMasks):
            raise SettingError(f"soft_masks must be an unmask.SoftMasks, got {type(self.soft_masks).__name__}")
        if len(self.stop) > 16 or not all(isinstance(s, str) and s for s in self.stop):
            raise SettingError(f"stop must be up to 16 non-empty strings, got {list(self.stop)!r}")
        for i, t in enumerate(self.suppress):
            integer(f"suppress[{i}]", t, 0)
        score = self._policy((), ()).score
        if self.confidence_eos_eot_inf and (score not in ("confidence", "pc") or self.policy == "credit"):
            raise SettingError(
                f"confidence_eos_eot_inf takes the probability of end tokens out of the confidence, and policy={self.policy!r} with "
                f"score={score!r} orders by something else; leave it out"
            )

    @property
    def _spec(self) -> RuleSpec:
        return RULES[self.policy]

    @property
    def guidance_weight(self) -> float | None:
        """Factor of (c - u), None where guidance is off."""
        if self.cfg_scale is None:
            return None
        weight = float(self.cfg_scale) + (1.0 if self.cfg_convention == "llada" else 0.0)
        return None if weight == 1.0 else weight

    @property
    def method(self) -> Method | S2D2 | None:
        """The way of speculation, None: none."""
        return None if self.speculate is None else read_method(self.speculate)

    @property
    def nodes(self) -> int:
        """Nodes that a forward verifies per row, at most."""
        return self.draft if self.draft is not None else 8 if isinstance(self.method, Auto) else 4

    def _policy(self, suppress: tuple[int, ...], drops: tuple[int, ...]) -> Policy:
        return Policy(
            rule=self.policy, score=self.score, knobs=self.knobs, position_bias=self.position_bias, certainty_sigma=self.certainty_sigma,
            temperature=float(number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)), top_p=self.top_p, top_k=self.top_k,
            top_k_first=self.top_k_first, tempered=self.confidence_source == "tempered",
            repetition_penalty=self.repetition_penalty, suppress=suppress, confidence_drops=drops,
        )  # fmt: skip

    def policy_for(self, config: ModelConfig) -> Policy:
        """The Policy, its suppressed ids checked against the vocabulary."""
        for i, t in enumerate(self.suppress):
            integer(f"suppress[{i}]", t, 0, config.vocab_size - 1)
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if getattr(self, name) and not config.eos_ids:
                raise SettingError(f"{name} needs an end-of-sequence id, and this model's config names none")
        ends = tuple(config.eos_ids)
        suppress = tuple(dict.fromkeys((*self.suppress, *(ends if self.logits_eos_inf else ()))))
        return self._policy(suppress, ends if self.confidence_eos_eot_inf else ())

    def block_length(self, config: ModelConfig) -> int:
        """block_size as it takes effect; raises SettingError for one that a block-causal model's blocks do not fit."""
        trained = config.block_size if config.visibility == "block_causal" else None
        size = self.block_size if self.block_size is not None else trained or 32
        if trained and size % trained and trained % size:
            raise SettingError(f"block_size must be a divisor or a multiple of the model's {trained}, got {size}")
        return size

    def cache_for(self, config: ModelConfig) -> CacheRule:
        """cache as it takes effect; raises SettingError for one that the model's attention or the policy does not allow."""
        rule = cache_for(self.cache, config)
        rule.check(self.policy_for(config), config)
        return rule

    def check_visibility(self, config: ModelConfig) -> None:
        """What a block-causal model's attention rules out."""
        if config.visibility == "bidirectional":
            return
        for setting, wrong in (("schedule", self.schedule != "fixed"), ("policy", self.policy == "wino"), ("negative_prompt", self.negative_prompt is not None)):
            if wrong:
                raise SettingError(f"{setting}={getattr(self, setting)!r} needs a bidirectional model, got a block-causal one ({config.family})")

    def block_schedule(self, model: Model | Foreign) -> FixedBlocks:
        """Where blocks end; delimiters given as text are looked up in the model's tokenizer."""
        size = self.block_length(model.config)
        if self.schedule != "adablock":
            return AlignedBlocks(size) if model.config.visibility == "block_causal" else FixedBlocks(size)
        given = self.delimiters if self.delimiters is not None else ("\n",)
        ids = [self._delimiter(d, model) for d in given]
        for i, d in enumerate(ids):
            integer(f"delimiters[{i}]", d, 0, model.config.vocab_size - 1)
        threshold = 0.3 if self.delimiter_threshold is None else self.delimiter_threshold
        return AdaBlock(size, tuple(ids), threshold, 0.25 if self.delimiter_window is None else self.delimiter_window)

    @staticmethod
    def _delimiter(given: int | str, model: Model | Foreign) -> int:
        if not isinstance(given, str):
            return given
        if not model.tokenizer.available:
            raise SettingError("delimiters given as text need a tokenizer, and this model has none; give token ids: delimiters=[198]")
        ids = model.tokenizer.encode(given, add_special=False)
        if len(ids) != 1:
            raise SettingError(f"delimiter {given!r} must be one token, its tokens are {ids}; give the ids themselves: delimiters={ids or '[...]'}")
        return ids[0]

    def steps_for_quota(self, prompts: Prompts, schedule: FixedBlocks) -> int | None:
        """Forwards in all for rules with a quota; None = one position per forward. Every block of every row needs at least one."""
        steps = self.knobs.get("steps")
        if steps is None or not self._spec.uses_steps:
            return None
        for given in prompts.given:
            start = given.index(False) if False in given else len(given)
            blocks = schedule.count(start, len(given))
            if steps < blocks:
                raise SettingError(
                    f"steps must be at least the number of blocks, {blocks} here ({len(given) - start} positions in blocks of "
                    f"{schedule.block_size}), got {steps}"
                )
        return steps

    def row_seeds(self, rows: int) -> list[int]:
        if self.seeds is not None and len(self.seeds) != rows:
            raise SettingError(f"seeds must hold one seed per row, {rows} here, got {len(self.seeds)}")
        return row_seeds(self.seed, self.seeds, rows)

    def resolved(self, model: Model | Foreign) -> dict[str, Any]:
        """Every setting as it takes effect, plus what the model brings: the `settings` of a Result."""
        from .ops import isa

        policy = self._policy((), ())
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("knobs", "schedule_knobs")}
        values["score"] = policy.score if isinstance(policy.score, str) else getattr(policy.score, "__name__", "function")
        values["soft_masks"] = None if self.soft_masks is None else repr(self.soft_masks)
        knobs = daedal_knobs.resolve(self.schedule_knobs, self.max_new_tokens) if self.schedule == "daedal" else policy.knobs
        values.update({name: value if isinstance(value, _PLAIN) else repr(type(value)) for name, value in knobs.items()})
        if self.schedule != "adablock":
            for name in ("delimiters", "delimiter_threshold", "delimiter_window"):
                del values[name]
        if self.method is None:
            del values["speculate"], values["draft"]
        else:
            values["speculate"], values["draft"] = str(self.method), self.nodes
            if isinstance(self.method, S2D2):
                del values["draft"]
        cache = self.cache_for(model.config)
        values["block_size"], values["cache"] = self.block_length(model.config), str(cache)
        exact = cache.exact(model.config)
        if self.knobs.get("variant") == "d2cache" and cache.name in ("prefix", "dual", "sprint"):
            # its windows end one position early where logits are shifted, and KLASS watches positions behind dual's: stale in one layer too
            exact = cache.exact(dataclasses.replace(model.config, n_layers=max(2, model.config.n_layers)))
        values.update(
            model=model.name, dtype=str(model.dtype).removeprefix("torch."), device=str(model.device), isa=isa(),
            linear_weights=model.format, exact=exact,
        )  # fmt: skip
        return values


_PLAIN = (int, float, str, bool, type(None))
