"""Unknown and out-of-range arguments: every one raises, names what is allowed and, for names, the nearest valid one."""

from __future__ import annotations

import math

import pytest
import torch

import unmask
from random_models import make
from unmask.decode.policy import quota_schedule
from unmask.decode.state import row_seeds

BAD = [
    (dict(tresh=0.5), "unknown setting 'tresh'; did you mean 'threshold'"),
    (dict(policy="treshold"), "unknown policy 'treshold'; did you mean 'threshold'"),
    (dict(score="marginn"), "unknown score 'marginn'; did you mean 'margin'"),
    (dict(cache="duel"), "unknown cache 'duel'; did you mean 'dual'"),
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
    (dict(policy="quota", threshold=0.5), "threshold is for policy='threshold', got policy='quota'"),
    (dict(policy="quota", steps=0), "steps must be an integer in 1"),
    (dict(steps=5), "steps is for policy='quota', got policy='threshold'"),
    (dict(factor=2.0), "factor is for policy='factor', got policy='threshold'"),
    (dict(factor="abc"), "factor is for policy='factor'"),
    (dict(factor_off_by_one=True), "factor_off_by_one is for policy='factor'"),
    (dict(temperature=-1), r"temperature must be a number in \[0, 1e\+30\], got -1"),
    (dict(temperature=1e308), "temperature must be a number"),
    (dict(policy=["a"]), "unknown policy"),
    (dict(score={}), "unknown score"),
    (dict(cache=[]), "unknown cache"),
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
    (dict(eos_stop="no"), "eos_stop must be True or False"),
    (dict(chat=1), "chat must be True or False"),
]
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


@pytest.mark.parametrize("settings, text", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_settings(model, settings, text):
    with pytest.raises(unmask.SettingError, match=text):
        unmask.generate(model, [1, 2], **settings)
    with pytest.raises(unmask.SettingError, match=text):
        unmask.stream(model, [1, 2], **settings).__next__()


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
