"""Unknown and out-of-range arguments: every one raises, names what is allowed and, for names, the nearest valid one."""

from __future__ import annotations

import math

import pytest
import torch

import unmask
from random_models import make
from unmask.decode.osdt import Table
from unmask.decode.policy import quota_schedule
from unmask.decode.state import row_seeds
from unmask.decode.table import RULES

BAD = [
    (dict(tresh=0.5), "unknown setting 'tresh'; did you mean 'threshold'"),
    (dict(policy="treshold"), "unknown policy 'treshold'; did you mean 'threshold'"),
    (dict(score="marginn"), "unknown score 'marginn'; did you mean 'margin'"),
    (dict(cache="duel"), "unknown cache 'duel'; did you mean 'dual'"),
    (dict(cache="dual:"), "cache='dual:': nothing stands behind the colon; give cache='dual', or dual:setting=value,... with settings refresh"),
    (dict(cache="none:"), "cache='none:': nothing stands behind the colon; give cache='none'.* with settings none: it has no settings"),
    (dict(cache="dual:refresh=4,refresh=8"), "cache='dual:refresh=4,refresh=8': refresh is given twice; give it once"),
    (dict(cache="dual:refresh=4,"), "expected dual:setting=value,... with settings refresh; got ''"),
    (dict(cache="dual:,refresh=4"), "expected dual:setting=value,... with settings refresh; got ''"),
    (dict(cache="dual:refresh"), "expected dual:setting=value,... with settings refresh; got 'refresh'"),
    (dict(cache="dual:refresh="), "refresh must be an integer, got ''"),
    (dict(cache=":refresh=4"), "unknown cache ''"),
    (dict(speculate="ssd:"), "speculate='ssd:': nothing stands behind the colon; give speculate='ssd', or ssd:setting=value,... with settings attention, tree"),
    (dict(speculate="s2d2:"), "speculate='s2d2:': nothing stands behind the colon; give speculate='s2d2'"),
    (dict(speculate="ssd:tree=chain,tree=tokens"), "speculate='ssd:tree=chain,tree=tokens': tree is given twice; give it once"),
    (dict(speculate="s2d2:min_span=2,min_span=3"), "speculate='s2d2:min_span=2,min_span=3': min_span is given twice; give it once"),
    (dict(speculate="ssd:tree=chain,"), "expected ssd:setting=value,... with settings attention, tree; got ''"),
    (dict(speculate=":"), "unknown speculate ''"),
    (dict(on_invalid="ignore"), "unknown on_invalid 'ignore'"),
    (dict(threshold=1.5), r"threshold must be a number in \[0, 1\], got 1.5"),
    (dict(threshold=-0.1), r"threshold must be a number in \[0, 1\], got -0.1"),
    (dict(threshold=math.nan), "threshold must be a number"),
    (dict(threshold="high"), "threshold must be a number"),
    (dict(score="entropy"), "threshold must be given for score='entropy'"),
    (dict(score="entropy", threshold=0.5), r"threshold \(for score='entropy', in nats\) must be a number in"),
    (dict(policy="factor", score="entropy"), r"needs a score in \[0, 1\]"),
    (dict(policy="factor", factor=0), r"factor must be a number in \(0, inf\), got 0"),
    (dict(policy="factor", factor=math.inf), "factor must be a number"),
    (dict(policy="quota", threshold=0.5), "threshold is for policy='threshold', 'klass', .*, got policy='quota'; leave it out or change the policy"),
    (dict(policy="quota", steps=0), "steps must be an integer in 1"),
    (dict(steps=5), "steps is for policy='quota', 'pc', .*, got policy='threshold'"),
    (dict(factor=2.0), "factor is for policy='factor', got policy='threshold'"),
    (dict(factor="abc"), "factor is for policy='factor'"),
    (dict(factor_off_by_one=True), "factor_off_by_one is for policy='factor'"),
    (dict(temperature=-1), r"temperature must be a number in \[0, 1e\+30\], got -1"),
    (dict(temperature=1e308), "temperature must be a number"),
    (dict(policy=["a"]), "unknown policy"),
    (dict(score={}), "unknown score"),
    (dict(cache=[]), "cache must be a name"),
    (dict(temperature=math.inf), "temperature must be a number"),
    (dict(temperature=True), "temperature must be a number"),
    (dict(cfg_scale=-0.5), "cfg_scale must be a number"),
    (dict(cfg_scale=1.0, cache="dual"), "cfg_scale needs cache='none', got cache='dual'"),
    (dict(max_new_tokens=-1), "max_new_tokens must be an integer in 0"),
    (dict(max_new_tokens=2.5), "max_new_tokens must be an integer"),
    (dict(max_new_tokens=10**9), "max_new_tokens must be an integer"),
    (dict(max_new_tokens=1000), "but the model takes at most 256"),
    (dict(block_size=0), "block_size must be an integer in 1"),
    (dict(seed=1.5), "seed must be an integer"),
    (dict(seeds=[1, 2]), "seeds must hold one seed per row, 1 here, got 2"),
    (dict(seeds=[-1]), r"seeds\[0\] must be an integer"),
    (dict(stop=["", "a"]), "stop must be up to 16 non-empty strings"),
    (dict(stop=["a"] * 17), "stop must be up to 16"),
    (dict(stop="x"), "stop needs a tokenizer"),
    (dict(suppress=[99]), r"suppress\[0\] must be an integer in 0..60, got 99"),
    (dict(suppress=5), "suppress must be a list"),
    (dict(eos_stop="no"), "eos_stop must be True, False or 'block', got 'no'"),
    (dict(chat=1), "chat must be True or False"),
    (dict(trace="all"), "trace must be True, False or 'predictions', got 'all'"),
    (dict(position_bias=-1), r"position_bias must be a number in \[0, inf\)"),
    (dict(certainty_sigma=0), r"certainty_sigma must be a number in \(0, inf\)"),
    (dict(certainty_sigma=2.0, policy="quota", score="entropy"), "certainty_sigma multiplies the score, so it needs one that is not negative"),
    (dict(certainty_sigma=2.0, policy="dream"), "certainty_sigma multiplies the score"),
    (dict(top_p=0.0), r"top_p must be a number in \(0, 1\]"),
    (dict(top_p=1.1), "top_p must be a number"),
    (dict(top_k=0), "top_k must be an integer >= 1"),
    (dict(top_k=2.5), "top_k must be an integer"),
    (dict(top_k_first=1), "top_k_first must be True or False"),
    (dict(confidence_source="noisy"), "unknown confidence_source 'noisy'"),
    (dict(repetition_penalty=0), r"repetition_penalty must be a number in \(0, 1e\+06\]"),
    (dict(logits_eos_inf="yes"), "logits_eos_inf must be True or False"),
    (dict(confidence_eos_eot_inf=True, policy="quota", score="margin"), "confidence_eos_eot_inf takes the probability of end tokens out of the confidence"),
    (dict(confidence_eos_eot_inf=True, policy="credit"), "policy='credit' with score='confidence' orders by something else"),
    (dict(cfg_convention="llda"), "unknown cfg_convention 'llda'; did you mean 'llada'"),
    (dict(cfg_scale=math.nan), "cfg_scale must be a number"),
    (dict(cfg_scale=2.0, cfg_convention="dream", cache="prefix"), "cfg_scale needs cache='none'"),
    (dict(negative_prompt=[1]), "negative_prompt needs guidance: give cfg_scale"),
    (dict(negative_prompt=[1], cfg_scale=0.0), "negative_prompt needs guidance"),
    (dict(negative_prompt=[[1], [2]], cfg_scale=1.0), "negative_prompt must be one prompt or one per row, 1 here, got 2"),
    (dict(negative_prompt=[99], cfg_scale=1.0), r"must be in 0\.\.60, got 99"),
    (dict(soft_masks=0.5), "soft_masks must be an unmask.SoftMasks, got float"),
    (dict(schedule="adablok"), "unknown schedule 'adablok'; did you mean 'adablock'"),
    (dict(delimiters=[1]), "delimiters is for schedule='adablock', got schedule='fixed'"),
    (dict(delimiter_threshold=0.5), "delimiter_threshold is for schedule='adablock'"),
    (dict(delimiter_window=0.5), "delimiter_window is for schedule='adablock'"),
    (dict(schedule="adablock"), "delimiters given as text need a tokenizer"),
    (dict(schedule="adablock", delimiters=[]), "AdaBlock needs delimiters"),
    (dict(schedule="adablock", delimiters=5), "delimiters must be a list"),
    (dict(schedule="adablock", delimiters=[61]), r"delimiters\[0\] must be an integer in 0..60, got 61"),
    (dict(schedule="adablock", delimiters=[1], delimiter_window=1.5), r"delimiter_window must be a number in \[0, 1\]"),
    (dict(schedule="adablock", delimiters=[1], delimiter_threshold=math.nan), "delimiter_threshold must be a number"),
    (dict(schedule="adablock", delimiters=[1], policy="quota", steps=8), "steps needs schedule='fixed'"),
    (dict(policy="quota", steps=2, block_size=8), "steps must be at least the number of blocks, 4 here"),
    (dict(policy="sdar_dynamic", steps=2, block_size=8), "steps must be at least the number of blocks, 4 here"),
    (dict(policy="plackett_luce", steps=2, block_size=8, order_logits=lambda s: s.pos.double()), "steps must be at least the number of blocks"),
    (dict(policy="pc"), "policy='pc' needs frequencies"),
    (dict(policy="pc", frequencies=[0.5]), "frequencies must be a float tensor"),
    (dict(policy="pc", frequencies=torch.ones(61, dtype=torch.int64)), "frequencies must be a float tensor"),
    (dict(policy="pc", frequencies=torch.full((61,), math.nan)), "frequencies must be finite and not negative"),
    (dict(policy="pc", frequencies=-torch.ones(61)), "frequencies must be finite and not negative"),
    (dict(policy="pc", frequencies=torch.ones(60)), "frequencies"),
    (dict(policy="pc", frequencies="/nowhere/f.safetensors"), "frequencies: cannot read /nowhere/f.safetensors"),
    (dict(policy="osdt"), "policy='osdt' needs table"),
    (dict(policy="osdt", table="/nowhere/t.json"), "table: cannot read an OSDT table from /nowhere/t.json"),
    (dict(policy="osdt", table=5), "table: cannot read an OSDT table"),
    (dict(policy="plackett_luce"), "policy='plackett_luce' needs order_logits"),
    (dict(policy="plackett_luce", order_logits=torch.ones(3)), "policy='plackett_luce' needs order_logits"),
    (dict(policy="credit", temperature=0.5), "policy='credit' needs temperature=0"),
    (dict(policy="credit", top_p=0.5), "policy='credit' needs temperature=0 and no top_p"),
    (dict(policy="wino", cache="dual"), "policy='wino' needs cache='none', got cache='dual'"),
    (dict(policy="wino", cfg_scale=1.0), "policy='wino' does not take guidance"),
    (dict(policy="remdm", cache="prefix"), "policy='remdm' needs cache='none'"),
    (dict(policy="remask", cache="dual"), "policy='remask' needs cache='none'"),
    (dict(policy="remdm", t_on=0.2, t_off=0.5), "t_off must be at most t_on"),
    (dict(policy="eb", score="random"), "policy='eb' needs a score: entropy, confidence, margin; got score='random'"),
    (dict(policy="pc", score="confidence", frequencies=torch.ones(61)), "policy='pc' needs a score: pc"),
    (dict(policy="quota", score="pc"), "policy='quota' needs a score"),
    (dict(policy="quota", score="dream"), "unknown score 'dream'"),
    (dict(skip_below=0.5), "skip_below is for policy='dus', got policy='threshold'"),
    (dict(policy="quota", gamma=0.5), "gamma is for policy='eb', got policy='quota'"),
]


def of_knobs():
    """Every knob of every rule: what lies outside its range, and what is not of its kind."""
    own = {"pc": dict(frequencies=torch.ones(61)), "osdt": dict(table=Table(((0.5,),))), "plackett_luce": dict(order_logits=lambda s: s.pos.double())}
    for spec in RULES.values():
        for knob in spec.knobs:
            wrong = []
            if knob.kind in ("number", "integer"):
                wrong = ["a", True, [1], math.nan, knob.low - 1, *([knob.low] if knob.open_low else []), *([] if math.isinf(knob.high) else [knob.high * 2 + 1])]
                wrong += [2.5] if knob.kind == "integer" else [math.inf]
            elif knob.kind == "flag":
                wrong = [1, "yes", None]
            elif knob.kind == "choice":
                wrong = ["nonsense", 3]
            elif knob.name == "threshold":
                wrong = ["a", True, math.nan, -0.5, 1.5, None]
            for value in wrong:
                settings = {"policy": spec.name, **own.get(spec.name, {}), knob.name: value}
                yield pytest.param(settings, knob.name, id=f"{spec.name}-{knob.name}={value!r}")


BAD_PROMPTS = [
    (5, "prompt must be a string, token ids, or a list"),
    (None, "prompt must be a string"),
    ([1, 2.5], "token id 1 must be an integer, got 2.5"),
    ([True], "must be a string or token ids"),
    ([1, 61], r"must be in 0\.\.60, got 61"),
    ([1, -1], r"must be in 0\.\.60, got -1"),
    ([1, 10**30], "must be in 0"),
    ("text", "tokenizer.json"),
    (torch.zeros(1, 1, 1, dtype=torch.int64), r"must be \[P\] or \[B, P\]"),
    (torch.zeros(3), "prompt 0 must be int64"),
    ([{"role": "user", "content": "x"}], "needs chat=True"),
    ([[1], "a", 3], "tokenizer.json"),
]


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def forwards(model):
    """How often the model was called; none is what every test here wants."""
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("settings, text", BAD, ids=[str(b[0])[:80] for b in BAD])
def test_bad_settings(model, forwards, settings, text):
    with pytest.raises(unmask.SettingError, match=text):
        unmask.generate(model, [1, 2], **settings)
    with pytest.raises(unmask.SettingError, match=text):
        unmask.stream(model, [1, 2], **settings).__next__()
    assert not forwards


@pytest.mark.parametrize("settings, name", list(of_knobs()))
def test_bad_knobs(model, forwards, settings, name):
    """The message names the knob and what was given."""
    with pytest.raises(unmask.SettingError, match=rf"(unknown )?{name}.*"):
        unmask.generate(model, [1, 2], **settings)
    assert not forwards


def test_every_knob_takes_its_default(model):
    given = {"pc": dict(frequencies=torch.ones(61)), "osdt": dict(table=Table(((0.5,),))), "plackett_luce": dict(order_logits=lambda s: s.pos.double())}
    for name, spec in RULES.items():
        defaults = {k.name: k.default for k in spec.knobs if k.name not in given.get(name, {})}
        a = unmask.generate(model, [1, 2], max_new_tokens=6, policy=name, **given.get(name, {}))
        b = unmask.generate(model, [1, 2], max_new_tokens=6, policy=name, **given.get(name, {}), **defaults)
        assert a.canvas == b.canvas and a.settings == b.settings
        assert all(a.settings[k] == v for k, v in defaults.items())


def test_what_a_module_lacks():
    import types

    class Theirs(torch.nn.Module):
        config = types.SimpleNamespace(mask_token_id=60, vocab_size=61, shifted=False)

        def forward(self, *_, **__):
            raise AssertionError("a forward ran")

    for settings, text in (
        (dict(policy="wino"), "policy='wino' needs a model from unmask.load"),
        (dict(soft_masks=unmask.SoftMasks()), "soft_masks needs a model from unmask.load"),
        (dict(cache="prefix"), "needs a model from unmask.load"),
        (dict(logits_eos_inf=True), "logits_eos_inf needs an end-of-sequence id"),
        (dict(schedule="adablock"), "delimiters given as text need a tokenizer"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.generate(Theirs(), [1, 2], **settings)


@pytest.mark.parametrize("arguments", [dict(scale=1.5), dict(scale=-0.1), dict(steepness=0), dict(centre=0.5), dict(k=0), dict(k=9), dict(schedule="cosine"), dict(scale=math.nan)], ids=str)
def test_bad_soft_masks(tmp_path, arguments):
    with pytest.raises(unmask.SettingError, match=f"soft_masks.{next(iter(arguments))}"):
        unmask.SoftMasks(**arguments)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for path in (tmp_path / "x.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(unmask.SettingError, match="soft_masks: cannot read"):
            unmask.SoftMasks.load(path)


def test_soft_masks_are_loaded(tmp_path):
    from safetensors.torch import save_file

    values = dict(scale=torch.tensor(0.25), steepness=torch.tensor([5.0]), centre=torch.tensor(-0.5))
    save_file(values, tmp_path / "s.safetensors")
    assert unmask.SoftMasks.load(tmp_path / "s.safetensors", k=2) == unmask.SoftMasks(scale=0.25, steepness=5.0, centre=-0.5, k=2)
    save_file({n: values[n] for n in ("scale", "centre")}, tmp_path / "t.safetensors")
    with pytest.raises(unmask.SettingError, match="missing or larger: steepness"):
        unmask.SoftMasks.load(tmp_path / "t.safetensors")


@pytest.mark.parametrize("prompt, text", BAD_PROMPTS, ids=[str(i) for i in range(len(BAD_PROMPTS))])
def test_bad_prompts(model, prompt, text):
    with pytest.raises((unmask.SettingError, unmask.CheckpointError), match=text):
        unmask.generate(model, prompt)


def test_errors_are_value_errors():
    assert issubclass(unmask.SettingError, ValueError) and issubclass(unmask.SettingError, unmask.UnmaskError)


def test_prompt_forms(model):
    one = unmask.generate(model, [1, 2, 3], max_new_tokens=4)
    assert unmask.generate(model, torch.tensor([1, 2, 3]), max_new_tokens=4).canvas == one.canvas
    assert unmask.generate(model, (1, 2, 3), max_new_tokens=4).canvas == one.canvas
    for batch in ([[1, 2, 3]], torch.tensor([[1, 2, 3]]), [torch.tensor([1, 2, 3])]):
        result = unmask.generate(model, batch, max_new_tokens=4)
        assert isinstance(result, list) and result[0].canvas == one.canvas


def test_resolved_settings(model):
    settings = unmask.generate(model, [1], max_new_tokens=2).settings
    assert settings["threshold"] == 0.9 and settings["cache"] == "none" and settings["exact"] is True
    assert settings["dtype"] == "float32" and settings["isa"] in ("portable", "avx2", "avx512", "avx512bf16")
    assert "factor" not in settings and unmask.generate(model, [1], max_new_tokens=2, policy="factor").settings["factor"] == 1.0


def test_load_arguments(tmp_path):
    for kwargs, text in ((dict(dtype="float31"), "unknown dtype 'float31'; did you mean 'float32'"), (dict(device="tpu"), "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"), (dict(device="meta"), "device must be 'cpu', 'cuda' or 'cuda:N', got 'meta'"), (dict(device="cuda:99"), "device")):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.load("tiny", **kwargs)
    with pytest.raises(unmask.ModelNotFound):
        unmask.load(tmp_path / "nothing-here")


def test_quota_schedule():
    assert quota_schedule(10, 4) == [3, 3, 2, 2] and quota_schedule(3, 5) == [1, 1, 1, 0, 0]
    for n in range(20):
        for s in range(1, 12):
            q = quota_schedule(n, s)
            assert sum(q) == n and max(q) - min(q) <= 1 and q == sorted(q, reverse=True)


def test_row_seeds():
    a = row_seeds(7, None, 1000)
    assert len(set(a)) == 1000 and all(0 <= s < 1 << 63 for s in a) and a[:5] == row_seeds(7, None, 5)
    assert a != row_seeds(8, None, 1000) and row_seeds(None, [3, 4], 2) == [3, 4]


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, unmask; assert 'torch' not in sys.modules; dir(unmask); print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "ok\n"
    with pytest.raises(AttributeError):
        _ = unmask.nonsense
