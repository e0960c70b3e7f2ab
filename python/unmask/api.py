"""The public functions: load, generate, infill, stream. The one file a newcomer reads first; the loop itself is decode/engine.py."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops
from .decode import daedal_knobs
from .decode.backend import Guidance, NativeBackend
from .decode.by_length import ByLengthBackend
from .decode.caches import read_cache
from .decode.daedal import Daedal, Lengthening
from .decode.engine import Commit as EngineCommit
from .decode.engine import Engine, StepRecord
from .decode.module_backend import ModuleBackend
from .decode.policy import Policy
from .decode.scores import check_vocabulary, read_frequencies
from .decode.shadow import shadow_slots
from .decode.state import DecodeState, Row
from .decode.table import RuleSpec
from .errors import SettingError, check_names
from .models import checkpoint, hub
from .models.config import ModelConfig
from .models.foreign import UNLIMITED, Foreign
from .models.model import Model, build
from .models.tokenizer import Tokenizer
from .ops.info import cuda_archs
from .ops.int8 import int8_available
from .ops.linear import Format
from .prompts import Fields, Prompts, read_negative, read_prompts, read_templates
from .result import Commit, Done, Result, Step
from .settings import Settings
from .speculate.auto import Chooser
from .speculate.engine import Speculative
from .speculate.methods import S2D2, Auto, Method
from .speculate.methods import check as check_speculation
from .speculate.nodes import NodeState, scratch_slots
from .speculate.s2d2 import S2D2Backend, S2D2Engine
from .speculate.s2d2 import check as check_s2d2


def load(
    source: str | Path = "tiny",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    revision: str = "main",
    family: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Loads a checkpoint: a folder, a Hugging Face id or cache path that is already on disk, or an embedded model:
    "tiny" (bidirectional, LLaDA's layout) or "tiny-block" (block-causal, SDAR's).

    source: looked for in that order (folder, Hugging Face cache, embedded); nothing is ever downloaded unless download=True.
    dtype: torch.float32 or torch.bfloat16 (or their names); default: as stored. device: "cpu", "cuda" or "cuda:N" (float16 too on CUDA; no GPU has run it yet, see the README's table).
    revision: which snapshot of a Hugging Face id. family, overrides: read the config as this family, replace fields of it, for example
    overrides={"mask_id": 126336}, where a checkpoint's own config lacks them.
    weights: "int8" keeps the weights of all linear layers in a byte each (one scale a row; quantised tensor by tensor while loading), for
    half the memory of bf16 at about its speed from width 2048 on (bench/bench_int8.py); activations and embedding keep their dtype. Needs
    a CPU with AVX-512 VNNI. "bf16" is dtype="bfloat16".
    batch_invariant: on CUDA, products of 32 rows at a time and attention cut at fixed places, so that a row's bits do not depend on its batch or
    on speculation (slower; no GPU has run it yet). On the CPU that is so anyway.
    Raises ModelNotFound (naming the folders searched), CheckpointError (listing every problem of the files; nothing is partly loaded)
    or SettingError. Only safetensors weights are read; no code of the checkpoint is run.
    """
    kind, target = _dtype(dtype), _device(device)
    kind, format = _weights(weights, kind, target)
    if not isinstance(batch_invariant, bool):
        raise SettingError(f"batch_invariant must be True or False, got {batch_invariant!r}")
    if batch_invariant and target.type != "cpu":
        format = "tiled"
    folder = hub.resolve(source, revision=revision, download=download)
    info = checkpoint.inspect(folder, family, overrides)
    _check_decodable(info.config, overrides or {})
    tokenizer = Tokenizer.load(folder, info.config)
    return build(info, tokenizer, str(source), kind, target, format)


def generate(model: Model | Foreign | torch.nn.Module | str | Path, prompt: Any, **settings: Any) -> Result | list[Result]:
    """Generates text after a prompt by denoising blocks of masks.

    model: what `load` returned, anything `load` takes, or any nn.Module that maps ids [B, L] to logits [B, L, V] (or an object with
    `.logits`): that one runs without a cache, on rows of one length; what its `config` does not tell (mask id, shifted logits, ...) is given
    with `unmask.wrap`. prompt: a string, token ids (list or 1-D tensor) or, with chat=True, a list of
    {"role", "content"} messages: returns one Result; a list of those (or a 2-D tensor): returns a list, decoded as one batch with one
    forward per step; rows may differ in length and every row gets the tokens it gets alone. Settings: see `Settings`.
    Raises SettingError for unknown or out-of-range settings (naming the nearest valid one) and InvalidLogits for NaN logits.
    """
    return _prepare(model, prompt, settings, quiet=True).result()


def stream(model: Model | Foreign | torch.nn.Module | str | Path, prompt: Any, **settings: Any) -> Iterator[Step | Commit | Done]:
    """`generate`, as it happens: after every forward a Step and, for each row that settled something, a Commit; at the end one Done.

    Arguments and errors as in `generate`. Arguments are checked at the call, before the first event.
    """
    return _prepare(model, prompt, settings, quiet=False).events()


def _prepare(model: Model | Foreign | torch.nn.Module | str | Path, prompt: Any, settings: Mapping[str, Any], quiet: bool) -> _Run:
    chosen = Settings.from_kwargs(settings)
    loaded = _model(model)
    return _Run(loaded, read_prompts(prompt, loaded, chosen), chosen, quiet)


def infill(model: Model | Foreign | torch.nn.Module | str | Path, canvas: Any, *, prompt: Any = None, **settings: Any) -> Result | list[Result]:
    """Fills the holes of a canvas; every given token stays as it is.

    canvas: token ids with None for each hole (a list), text with `[[MASK*n]]` for n holes, an `unmask.templates.Scaffold` (a JSON object
    whose values are to fill; a decided null ends its field), or a list of these for a batch. prompt: what stands before it, text, ids or,
    with chat=True, messages; one for all rows or a list. Settings and errors as in `generate`, except that max_new_tokens does not apply
    and eos_stop defaults to False. Result.ids holds the tokens put into the holes, in order; `Scaffold.read` takes a Result.
    """
    if settings.get("schedule") == "daedal":
        raise SettingError("schedule='daedal' writes an answer of its own length behind a prompt; a canvas has its length: use generate, or another schedule")
    chosen = Settings.from_kwargs({"eos_stop": False, **settings}, forbidden=("max_new_tokens",))
    loaded = _model(model)
    prompts, fields = read_templates(canvas, prompt, loaded, chosen)
    return _Run(loaded, prompts, chosen, quiet=True, fields=fields, whole=True).result()


def policies() -> str:
    """The policy table as text: every decoding rule with its source, what it needs and its settings."""
    from .decode.tabulate import policy_table

    return policy_table()


def _model(model: Model | Foreign | torch.nn.Module | str | Path) -> Model | Foreign:
    if isinstance(model, (Model, Foreign)):
        return model
    return Foreign(model) if isinstance(model, torch.nn.Module) else load(model)


class _Run:
    """One generation. Everything is checked when it is built; `events` then decodes. whole: canvases are as long as they should be."""

    def __init__(self, model: Model | Foreign, prompts: Prompts, settings: Settings, quiet: bool, fields: Fields | None = None, whole: bool = False):
        self.began = time.perf_counter()
        config = model.config
        settings.check_visibility(config)
        if isinstance(model, Foreign) and settings.cache is None:  # the default of a block-causal model is a cache
            settings = dataclasses.replace(settings, cache="none")
        self.cache = settings.cache_for(config) if isinstance(model, Model) else read_cache(settings.cache or "none")
        if config.visibility == "block_causal" and not whole:
            prompts = prompts.filled_up(config.block_size, config.mask_id)
        self.model, self.prompts, self.settings, self.quiet = model, prompts, settings, quiet
        self.resolved = settings.resolved(model)
        seeds = settings.row_seeds(len(prompts.canvases))
        policy = settings.policy_for(config)
        _check_needs(policy.spec, model)
        if policy.rule == "pc" and config.vocab_size < UNLIMITED:  # a module may not say how many tokens it has
            check_vocabulary(read_frequencies(policy.knobs["frequencies"], model.device), config.vocab_size)
        schedule = settings.block_schedule(model)
        self.state = DecodeState(
            prompts.canvases, prompts.given, config.mask_id, schedule, settings.steps_for_quota(prompts, schedule), seeds, model.device
        )
        eos_ids = config.eos_ids if settings.eos_stop else ()
        self.stop = _StopStrings(self.state, model.tokenizer, settings.stop, eos_ids) if settings.stop else None
        shared: dict[str, Any] = dict(
            cache=self.cache, eos_ids=eos_ids, eos_at_block_end=settings.eos_stop == "block", on_invalid=settings.on_invalid, settled=self.stop,
            record=bool(settings.trace) or not quiet,
        )  # fmt: skip
        if isinstance(settings.method, S2D2):
            self.engine = self._s2d2(policy, settings.method, fields, shared)
        elif settings.method is not None:
            self.engine = self._speculative(policy, settings.method, fields, shared)
        elif settings.schedule == "daedal":
            self.engine = self._daedal(policy)
        else:
            after = fields.bind(self.state) if fields is not None else None
            self.engine = Engine(self.state, self._backend(policy), policy, predictions=settings.trace == "predictions", after_commit=after, **shared)

    def _speculative(self, policy: Policy, method: Method, fields: Fields | None, shared: dict[str, Any]) -> Speculative:
        settings, model = self.settings, self.model
        check_speculation(
            method, policy, self.cache, native=isinstance(model, Model), model=model.name, soft_masks=settings.soft_masks is not None,
            negative_prompt=settings.negative_prompt is not None, fields=fields is not None, predictions=settings.trace == "predictions",
            schedule=settings.schedule,
        )  # fmt: skip
        nodes = NodeState(self.state, settings.nodes)
        weight = settings.guidance_weight
        block = model.config.block_size if model.config.visibility == "block_causal" else None
        backend = NativeBackend(
            model, nodes, model.config.mask_id, None if weight is None else Guidance(weight),  # type: ignore[arg-type]
            extra_slots=scratch_slots(nodes, self.cache, block, settings.nodes), kv_rows=nodes.batch,
        )  # fmt: skip
        chooser = Chooser(settings.nodes) if isinstance(method, Auto) else None
        return Speculative(nodes, backend, policy, method=method, draft=settings.nodes, chooser=chooser, **shared)

    def _s2d2(self, policy: Policy, method: S2D2, fields: Fields | None, shared: dict[str, Any]) -> S2D2Engine:
        model, settings, state = self.model, self.settings, self.state
        if not isinstance(model, Model):
            raise SettingError(f"speculate='s2d2' needs a model from unmask.load, got {model.name}: a module cannot be read with block size 1")
        check_s2d2(
            model.config, policy, self.cache.name, guidance=settings.guidance_weight is not None, soft_masks=settings.soft_masks is not None
        )
        after = fields.bind(state) if fields is not None else None
        backend = S2D2Backend(model, state, model.config.mask_id, method.options)
        return S2D2Engine(
            state, backend, policy, options=method.options, predictions=settings.trace == "predictions", after_commit=after, **shared
        )

    def _daedal(self, policy: Policy) -> Daedal:
        settings, eos_ids = self.settings, tuple(self.model.config.eos_ids)
        daedal_knobs.check_model(self.model.name, eos_ids, policy.suppress)
        return Daedal(
            self.state, self._backend(policy), policy, daedal_knobs.resolve(settings.schedule_knobs, settings.max_new_tokens), eos_ids,
            stops=bool(settings.eos_stop), on_invalid=settings.on_invalid, settled=self.stop, record=bool(settings.trace) or not self.quiet,
        )  # fmt: skip

    def _backend(self, policy: Policy) -> NativeBackend | ModuleBackend:
        model, settings, mask_id = self.model, self.settings, self.model.config.mask_id
        weight, guidance = settings.guidance_weight, None
        if weight is not None:
            guidance = Guidance(weight, read_negative(settings.negative_prompt, model, settings, len(self.prompts.canvases)))
        if isinstance(model, Model):
            shadow = shadow_slots(policy, self.state)
            soft = settings.soft_masks.start(self.state, mask_id) if settings.soft_masks is not None else None
            return NativeBackend(model, self.state, mask_id, guidance, shadow, soft)
        if self.cache.name != "none":
            raise SettingError(f"cache={str(self.cache)!r} needs a model from unmask.load; {model.name} can only run with cache='none'")
        if settings.soft_masks is not None:
            raise SettingError(f"soft_masks needs a model from unmask.load; {model.name} takes token ids, not embeddings")
        lengths = sorted({len(c) for c in self.prompts.canvases})
        growing, causal = settings.schedule == "daedal", model.config.visibility == "block_causal"
        if len(lengths) > 1 and not growing:
            raise SettingError(f"rows must be equally long for {model.name}, which is not from unmask.load; got lengths {lengths}")
        if not (growing or causal):
            return ModuleBackend(model, self.state, mask_id, guidance, shifted=model.config.shifted)
        backend = ByLengthBackend(model, self.state, mask_id, guidance, shifted=model.config.shifted)
        backend.attention_block = model.config.block_size  # rows are called up to the end of their blocks
        return backend

    def result(self) -> Result | list[Result]:
        """Decodes to the end."""
        *_, done = self.events()
        return done.result

    def events(self) -> Iterator[Step | Commit | Done]:
        state, settings = self.state, self.settings
        ended = {row.index: 0.0 for row in state.rows}
        traces: dict[int, list[dict[str, Any]]] = {row.index: [] for row in state.rows}
        running = {row.index for row in state.active}
        for record in self.engine.run():
            now = time.perf_counter() - self.began
            for row in state.rows:
                if row.index in running and not row.active:
                    running.discard(row.index)
                    ended[row.index] = now
            shown = [self._shown(c) for c in record.commits]
            if settings.trace:
                for commit in shown:
                    traces[commit.row].append(_trace_record(commit, record))
            if not self.quiet:
                yield Step(record.forward, record.seconds, {c.row: c.masks_left for c in record.commits})
                for i, c in enumerate(shown):
                    canvas = _canvas(state, c.row)[: self._end(state.rows[c.row])]
                    for later in shown[i + 1 :]:  # of the same forward: speculation
                        for p in later.positions if later.row == c.row else ():
                            canvas[p] = self.model.config.mask_id
                    yield Commit(c.row, c.block, c.step, c.nfe, c.positions, c.ids, c.scores, c.masks_left, canvas)
        results = [self._row_result(row, ended[row.index], traces[row.index] if settings.trace else None) for row in state.rows]
        yield Done(results[0] if self.prompts.single else results)

    def _end(self, row: Row) -> int:
        """Where the row's canvas ends for the caller: before the positions that only fill the last attention block up."""
        return row.end - (self.prompts.surplus[row.index] if self.prompts.surplus else 0)

    def _shown(self, c: EngineCommit) -> EngineCommit:
        """A commit without those positions."""
        if not self.prompts.surplus or not self.prompts.surplus[c.row]:
            return c
        end = self._end(self.state.rows[c.row])
        kept = [i for i, p in enumerate(c.positions) if p < end]
        return dataclasses.replace(
            c, positions=[c.positions[i] for i in kept], ids=[c.ids[i] for i in kept], scores=[c.scores[i] for i in kept],
            edited=[e for e in c.edited if e[0] < end], remasked=[r for r in c.remasked if r[0] < end],
            filled=None if c.filled is None else c.filled[:end],
        )  # fmt: skip

    def _log_prob(self, row: Row) -> float | None:
        """Log-probability of the row's order and tokens, for rules that keep one (plackett_luce)."""
        log_prob = getattr(self.engine.rule, "log_prob", None)
        return None if log_prob is None else float(log_prob[row.index])

    def _row_result(self, row: Row, seconds: float, trace: list[dict[str, Any]] | None) -> Result:
        config, settings, tokenizer = self.model.config, self.settings, self.model.tokenizer
        end = self._end(row)
        canvas = _canvas(self.state, row.index)[:end]
        masked = self.state.masked[row.index, :end].tolist()
        given = self.prompts.given[row.index]
        made = [i for i in range(end) if not given[i]]
        first_eos = next((i for i in made if canvas[i] in config.eos_ids and not masked[i]), None)
        decided = [i for i in made if not masked[i]]
        if settings.eos_stop and first_eos is not None and row.finish_reason != "invalid":
            # what lies behind the end of the sequence is of no interest: it reads as end of sequence, decided or not
            for i in made:
                if i > first_eos and (settings.eos_stop is True or masked[i]):
                    canvas[i] = canvas[first_eos]
        before_eos = [canvas[i] for i in decided if first_eos is None or i < first_eos]
        ids = before_eos if settings.eos_stop else [canvas[i] for i in decided]
        counted = len(before_eos)
        text, stopped = None, False
        if tokenizer.available:
            text = tokenizer.decode(ids)
            if self.stop is not None:
                stopped = self.stop.found(text)
                ids, text = self.stop.cut(ids, text)
                counted = min(counted, len(ids))
        counts = self.engine.counts[row.index] if isinstance(self.engine, S2D2Engine) else row
        reason = row.finish_reason or "length"
        if (reason == "eos" and first_eos is None) or (reason == "stop" and not stopped):
            reason = "length"  # what ended the row stands behind the end of its canvas
        return Result(
            text=text,
            ids=ids,
            canvas=canvas,
            prompt_ids=self.prompts.prompt_ids[row.index],
            nfe=row.nfe,
            rows_forwarded=row.forwarded,
            tokens_per_forward=counted / row.nfe if row.nfe else 0.0,
            seconds=seconds,
            finish_reason=reason,
            exact=self.resolved["exact"],
            settings=self.resolved,
            trace=trace,
            log_prob=self._log_prob(row),
            drafted=counts.drafted,
            accepted=counts.accepted,
        )


def _canvas(state: DecodeState, index: int) -> list[int]:
    return state.canvas[index, : state.rows[index].end].tolist()


def _trace_record(commit: EngineCommit, record: StepRecord) -> dict[str, Any]:
    committed = [list(t) for t in zip(commit.positions, commit.ids, commit.scores, strict=True)]
    return {
        "row": commit.row, "block": commit.block, "step": commit.step, "nfe": commit.nfe, "committed": committed,
        "edited": [list(t) for t in commit.edited],
        "remasked": [list(t) for t in commit.remasked], "masks_left": commit.masks_left, "rows": commit.rows, "ms": record.seconds * 1e3,
        **({} if commit.filled is None else {"filled": commit.filled}),
        **({} if commit.drafted is None else {"drafted": commit.drafted, "accepted": commit.accepted}),
        **({"inserted": [list(t) for t in commit.inserted], "length": commit.length} if isinstance(commit, Lengthening) else {}),
    }  # fmt: skip


class _StopStrings:
    """Ends a row when its settled text (no undecided position before it) holds a stop string."""

    def __init__(self, state: DecodeState, tokenizer: Tokenizer, stop: Sequence[str], eos_ids: tuple[int, ...]):
        if not tokenizer.available:
            raise SettingError("stop needs a tokenizer, and this model's folder has no tokenizer.json; stop on token ids is eos_stop")
        self.state, self.tokenizer, self.stop, self.eos_ids = state, tokenizer, tuple(stop), eos_ids
        self._seen: dict[int, int] = {}

    def __call__(self, row: Row) -> str | None:
        masked = self.state.masked[row.index, row.start : row.end]
        holes = torch.nonzero(masked)
        settled = int(holes[0]) if holes.numel() else row.end - row.start
        if settled == self._seen.get(row.index):
            return None
        self._seen[row.index] = settled
        given = self.state.given[row.index, row.start : row.start + settled]
        ids = self.state.canvas[row.index, row.start : row.start + settled][~given].tolist()
        end = next((i for i, t in enumerate(ids) if t in self.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end])
        return "stop" if self.found(text) else None

    def found(self, text: str) -> bool:
        return any(s in text for s in self.stop)

    def cut(self, ids: list[int], text: str) -> tuple[list[int], str]:
        """The text before the first stop string, and the tokens that end before it."""
        at = min((text.find(s) for s in self.stop if s in text), default=-1)
        if at < 0:
            return ids, text
        kept = text[:at]
        n = max(n for n in range(len(ids) + 1) if len(self.tokenizer.decode(ids[:n])) <= at)
        return ids[:n], kept


def _check_needs(spec: RuleSpec, model: Model | Foreign) -> None:
    """A rule that a model cannot serve is refused before the first forward."""
    if "model" in spec.needs and not isinstance(model, Model):
        raise SettingError(f"policy={spec.name!r} needs a model from unmask.load (it forwards rows that a plain module does not take), got {model.name}")


def _check_decodable(config: ModelConfig, overrides: Mapping[str, Any]) -> None:
    """What this release's loop cannot do must not look as if it did."""
    if config.visibility == "bidirectional" and overrides.get("block_size") is not None:
        raise SettingError("block_size is a setting of generate, not of the model, for this family: generate(..., block_size=...)")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or dtype in names.values():
        return dtype  # type: ignore[return-value]
    aliases = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if isinstance(dtype, str) and aliases.get(dtype, dtype) in names:
        return names[aliases.get(dtype, dtype)]
    check_names("dtype", [dtype], names)
    raise AssertionError("check_names has raised")


def _weights(weights: str | None, dtype: torch.dtype | None, device: torch.device) -> tuple[torch.dtype | None, Format | None]:
    """(dtype, format of the linear weights) that `weights` asks for."""
    if weights is None:
        return dtype, None
    check_names("weights", [weights], ("int8", "bf16"))
    if weights == "bf16":
        if dtype not in (None, torch.bfloat16):
            raise SettingError(f"weights='bf16' is dtype='bfloat16', got dtype={dtype}; leave one of them out")
        return torch.bfloat16, None
    if device.type != "cpu":
        raise SettingError(f"weights='int8' is for device='cpu' in this release, got {device}; leave it out or use weights='bf16'")
    if not int8_available():
        raise SettingError(
            "weights='int8' needs a torch with FBGEMM and a CPU with AVX-512 VNNI: on this one torch's int8 product is missing or saturates; use weights='bf16'"
        )
    return dtype, "int8"


def _device(device: torch.device | str) -> torch.device:
    """The device named, if this torch and this build of the ops have it."""
    allowed = "device must be 'cpu', 'cuda' or 'cuda:N'"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise SettingError(f"{allowed}, got {device!r}") from e
    if target.type == "cpu":
        return target
    if target.type != "cuda":
        raise SettingError(f"{allowed}, got {device!r}")
    if not torch.cuda.is_available():
        raise SettingError(f"device {device!r} needs a GPU and a CUDA build of torch; this torch ({torch.__version__}) sees none")
    if not cuda_archs():
        raise SettingError(f"device {device!r} needs CUDA kernels, and this unmask was built without nvcc (`unmask doctor`); build it again with nvcc on PATH")
    count = torch.cuda.device_count()
    if target.index is not None and target.index >= count:
        raise SettingError(f"device must be below cuda:{count} on this machine, got {device!r}")
    return torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)


__all__ = ["Commit", "Done", "Model", "ModelConfig", "Result", "Step", "generate", "infill", "load", "ops", "policies", "stream"]
