"""Lossless self-speculation: what cannot be verified exactly is refused, and what took effect is said."""

from __future__ import annotations

import pytest
import torch

import unmask
from speculate_kit import model, rows_cost_little  # noqa: F401 (rows_cost_little: for every test here)
from unmask.decode.table import RULES
from unmask.speculate.methods import (
    REFUSED_RULES,
    S2D2,
    SERVED_RULES,
    SSD,
    FreeDave,
    Method,
    read_method,
)


def test_every_rule_is_served_or_refused_with_a_reason():
    assert set(SERVED_RULES) | set(REFUSED_RULES) == set(RULES) and not set(SERVED_RULES) & set(REFUSED_RULES)
    needed = dict(plackett_luce=dict(order_logits=lambda step: step.pos.double()))
    for rule, reason in REFUSED_RULES.items():
        with pytest.raises(unmask.SettingError, match=f"does not serve policy='{rule}'") as caught:
            unmask.generate(model("llada"), [1], policy=rule, speculate="ssd", **needed.get(rule, {}))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(speculate="sdd"), "unknown speculate 'sdd'; did you mean 'ssd'"),
        (dict(speculate=3), "speculate must be a name"),
        (dict(speculate=Method()), "speculate must be a name"),
        (dict(speculate="ssd:tree=wide"), "unknown speculate: tree 'wide'"),
        (dict(speculate="ssd:trees=chain"), "expected ssd:setting=value,... with settings attention, tree; got 'trees=chain'"),
        (dict(speculate="freedave:tree=chain"), "with settings attention; got"),
        (dict(draft=3), "draft is for speculate="),
        (dict(speculate="ssd", draft=0), "draft must be an integer in 1..64, got 0"),
        (dict(speculate="ssd", draft=2.5), "draft must be an integer"),
        (dict(speculate="freedave"), "lossless for rules that commit a fixed number of positions a step .* got policy='threshold'.*use speculate='ssd'"),
        (dict(speculate="ssd", score=lambda step: step.pos.double()), "does not serve a score function"),
        (dict(speculate="ssd", soft_masks=unmask.SoftMasks()), "does not serve soft_masks: a mask's embedding"),
        (dict(speculate="ssd", trace="predictions"), "does not serve trace='predictions'"),
        (dict(speculate="ssd", cfg_scale=1.0, negative_prompt=[1]), "does not serve negative_prompt: its null input"),
        (dict(speculate="ssd", schedule="daedal", max_new_tokens=8), "does not serve schedule='daedal'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(unmask.SettingError, match=message):
        unmask.generate(model("llada"), [1, 2], **settings)


def test_s2d2_reads_its_options_when_made():
    assert str(S2D2({"mode": "greedy"})) == "s2d2:mode=greedy" and str(S2D2(None)) == "s2d2"  # type: ignore[arg-type]
    with pytest.raises(unmask.SettingError, match="must be a mapping or an Options, got str"):
        S2D2("greedy")  # type: ignore[arg-type]


def test_a_module_is_refused():
    class Module(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros((*ids.shape, 61))

    with pytest.raises(unmask.SettingError, match="needs a model from unmask.load, got .*: a module's logits may change in their last bits"):
        unmask.generate(unmask.wrap(Module(), mask_id=60, shifted=False), [1, 2], speculate="ssd")


def test_settings_say_what_took_effect():
    (result,) = unmask.generate(model("llada"), [[1]], speculate="ssd:tree=positions", policy="quota")
    assert result.settings["speculate"] == "ssd:tree=positions" and result.settings["draft"] == 4
    (result,) = unmask.generate(model("llada"), [[1]], speculate="auto")
    assert result.settings["speculate"] == "auto" and result.settings["draft"] == 8
    (result,) = unmask.generate(model("llada"), [[1]])
    assert "speculate" not in result.settings and result.drafted == result.accepted == 0
    assert read_method(SSD()) == read_method("ssd") and str(FreeDave("tree")) == "freedave:attention=tree"
