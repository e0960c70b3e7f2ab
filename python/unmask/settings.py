"""Every setting of `generate`, with defaults, ranges and what they resolve to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .decode.cache import CACHES, is_exact
from .decode.policy import MAX_TEMPERATURE, POLICIES, SCORES, Policy, integer, number, plain
from .decode.schedule import FixedBlocks
from .decode.state import row_seeds
from .errors import SettingError, check_names

if TYPE_CHECKING:
    from .models.config import ModelConfig
    from .models.foreign import Foreign
    from .models.model import Model
    from .prompts import Prompts


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one generation.

    max_new_tokens: positions to fill after the prompt (default 32). block_size: positions denoised together, left to right block by
    block (default 32; larger than max_new_tokens = one block).
    policy: "threshold" (default), "quota" or "factor"; score: "confidence" (default), "margin", "entropy", "random": see decode.policy.
    threshold: default 0.9 (must be given, at most 0, for score="entropy"). factor, for policy="factor": default 1.0; factor_off_by_one: the
    authors' variant of it.
    steps: for policy="quota": forwards in all, spread over the blocks, the surplus first (default: one token per step).
    temperature: 0 = argmax; otherwise Gumbel-max sampling. cfg_scale: classifier-free guidance, logits u + (w + 1)(c - u), 0 = off.
    cache: "none" (default: exact), "prefix", "dual" (approximate on bidirectional models of more than one layer).
    seed: one integer, row i uses hash(seed, i); seeds: one per row instead. eos_stop: end a row, and cut it, at its first EOS.
    stop: a string or up to 16 strings that end and cut the text. chat: the prompt is a user message or a list of messages.
    on_invalid: "raise" or "skip" (end that row only) when a row's logits hold NaN or nothing but -inf. suppress: token ids that are never
    chosen and take no probability. trace: keep a record per forward.
    """

    max_new_tokens: int = 32
    block_size: int = 32
    policy: str = "threshold"
    score: str = "confidence"
    threshold: float | None = None
    factor: float | None = None
    factor_off_by_one: bool = False
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    cache: str = "none"
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    eos_stop: bool = True
    stop: tuple[str, ...] = ()
    suppress: tuple[int, ...] = ()
    chat: bool = False
    on_invalid: str = "raise"
    trace: bool = False

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], forbidden: Sequence[str] = ()) -> Settings:
        """Builds and validates; an unknown name raises SettingError with the nearest valid one."""
        valid = [f.name for f in dataclasses.fields(cls) if f.name not in forbidden]
        check_names("setting", kwargs, valid)
        values = dict(kwargs)
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        for name in ("stop", "suppress", "seeds"):
            if values.get(name) is not None and not isinstance(values[name], tuple):
                try:
                    values[name] = tuple(values[name])
                except TypeError as e:
                    raise SettingError(f"{name} must be a list, got {values[name]!r}") from e
        return cls(**{name: plain(value) for name, value in values.items()})

    def __post_init__(self):
        integer("max_new_tokens", self.max_new_tokens, 0, 1 << 20)
        integer("block_size", self.block_size, 1, 1 << 20)
        check_names("policy", [self.policy], POLICIES)
        check_names("score", [self.score], SCORES)
        check_names("cache", [self.cache], CACHES)
        check_names("on_invalid", [self.on_invalid], ("raise", "skip"))
        if self.policy == "threshold" and self.score == "entropy" and self.threshold is None:
            raise SettingError("threshold must be given for score='entropy': nats, at most 0, for example -0.3")
        if self.policy != "threshold" and self.threshold is not None:
            raise SettingError(f"threshold is for policy='threshold', got policy={self.policy!r}; leave it out or change the policy")
        if self.policy != "quota" and self.steps is not None:
            raise SettingError(f"steps is for policy='quota', got policy={self.policy!r}; leave it out or change the policy")
        if self.policy != "factor" and (self.factor is not None or self.factor_off_by_one):
            name = "factor" if self.factor is not None else "factor_off_by_one"
            raise SettingError(f"{name} is for policy='factor', got policy={self.policy!r}; leave it out or change the policy")
        if self.steps is not None:
            integer("steps", self.steps, 1, 1 << 20)
        number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        number("cfg_scale", self.cfg_scale, 0.0, 1e30)
        if self.cfg_scale and self.cache != "none":
            raise SettingError(f"cfg_scale needs cache='none', got cache={self.cache!r}")
        integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for i, s in enumerate(self.seeds or ()):
            integer(f"seeds[{i}]", s, 0, (1 << 63) - 1)
        for name in ("factor_off_by_one", "eos_stop", "chat", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if len(self.stop) > 16 or not all(isinstance(s, str) and s for s in self.stop):
            raise SettingError(f"stop must be up to 16 non-empty strings, got {list(self.stop)!r}")
        for i, t in enumerate(self.suppress):
            integer(f"suppress[{i}]", t, 0)
        self._policy(())

    def _policy(self, suppress: tuple[int, ...]) -> Policy:
        return Policy(
            rule=self.policy,
            score=self.score,
            threshold=0.9 if self.threshold is None else self.threshold,
            factor=1.0 if self.factor is None else self.factor,
            off_by_one=self.factor_off_by_one,
            temperature=float(self.temperature),
            suppress=suppress,
        )

    def policy_for(self, config: ModelConfig) -> Policy:
        """The Policy, its suppressed ids checked against the vocabulary."""
        for i, t in enumerate(self.suppress):
            integer(f"suppress[{i}]", t, 0, config.vocab_size - 1)
        return self._policy(tuple(self.suppress))

    def schedule(self) -> FixedBlocks:
        return FixedBlocks(self.block_size)

    def steps_for_quota(self, prompts: Prompts) -> int | None:
        """Forwards in all for policy quota; None = one position per forward. Every block of every row needs at least one."""
        for given in prompts.given if self.steps is not None else ():
            region = len(given) - given.index(False) if False in given else 0
            blocks = self.schedule().count(0, region)
            if self.steps is not None and self.steps < blocks:
                raise SettingError(
                    f"steps must be at least the number of blocks, {blocks} here ({region} positions in blocks of {self.block_size}), "
                    f"got {self.steps}"
                )
        return self.steps

    def row_seeds(self, rows: int) -> list[int]:
        if self.seeds is not None and len(self.seeds) != rows:
            raise SettingError(f"seeds must hold one seed per row, {rows} here, got {len(self.seeds)}")
        return row_seeds(self.seed, self.seeds, rows)

    def resolved(self, model: Model | Foreign) -> dict[str, Any]:
        """Every setting as it takes effect, plus what the model brings: the `settings` of a Result."""
        from .ops import isa

        values = dataclasses.asdict(self)
        if self.policy == "threshold" and self.threshold is None:
            values["threshold"] = 0.9
        if self.policy == "factor" and self.factor is None:
            values["factor"] = 1.0
        if self.policy != "factor":
            del values["factor"], values["factor_off_by_one"]
        exact = is_exact(self.cache, model.config.visibility, model.config.n_layers)
        values.update(
            model=model.name, dtype=str(model.dtype).removeprefix("torch."), device=str(model.device), isa=isa(),
            linear_weights=model.format, exact=exact,
        )  # fmt: skip
        return values
