"""The command line tool: output, exit codes, mistakes, Ctrl-C, the live view (doctor and bench: test_cli_doctor.py)."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

import unmask
from unmask.cli import live, main, options, show
from unmask.result import Commit, Done, Step

WORDS = 40
MASK, EOS = WORDS, WORDS + 1
CONFIG = dict(
    model_type="llada", architectures=["LLaDAModelLM"], block_type="llama", d_model=32, n_layers=2, n_heads=2, n_kv_heads=2,
    mlp_hidden_size=48, vocab_size=WORDS + 2, embedding_size=WORDS + 2, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS,
    rope=True, rope_full_precision=True, rope_theta=10000.0, rms_norm_eps=1e-5, layer_norm_type="rms", activation_type="silu",
    include_bias=False, include_qkv_bias=False, weight_tying=False, max_sequence_length=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with a word-level tokenizer: w0 .. w39."""
    path = tmp_path_factory.mktemp("model")
    g = torch.Generator().manual_seed(3)
    d, ffn, vocab = CONFIG["d_model"], CONFIG["mlp_hidden_size"], CONFIG["vocab_size"]
    tensors = {"model.transformer.wte.weight": (vocab, d), "model.transformer.ff_out.weight": (vocab, d)}
    for i in range(CONFIG["n_layers"]):
        shapes = dict(
            q_proj=(d, d),
            k_proj=(d, d),
            v_proj=(d, d),
            attn_out=(d, d),
            ff_proj=(ffn, d),
            up_proj=(ffn, d),
            ff_out=(d, ffn),
        )
        tensors |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in shapes.items()}
    weights = {name: torch.randn(shape, generator=g) * 2 / shape[1] ** 0.5 for name, shape in tensors.items()}
    norms = [
        f"model.transformer.blocks.{i}.{n}.weight"
        for i in range(CONFIG["n_layers"])
        for n in ("attn_norm", "ff_norm")
    ]
    weights |= {name: torch.ones(d) for name in (*norms, "model.transformer.ln_f.weight")}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    tokens = {f"\u2581w{i}": i for i in range(WORDS)} | {"<mask>": MASK, "<eos>": EOS}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="\u2581w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<mask>", "<eos>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the model is tiny


@pytest.fixture
def cli(capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run(*words: str):
        capsys.readouterr()
        try:
            code = main(list(words))
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def generate(folder, *words):
    return ("generate", "w1 w2 w3", "-m", folder, "--max-new-tokens", "12", *words)


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("genrate",), ("unknown command 'genrate'", "did you mean generate?")),
        (("generate", "x", "--treshold", "0.5"), ("unknown option --treshold", "did you mean --threshold?")),
        (("generate", "x", "--treshold=0.5"), ("unknown option --treshold", "did you mean --threshold?")),
        (("generate", "x", "--block", "8"), ("unknown option --block", "--block-size")),
        (("generate", "x", "y"), ("unexpected argument 'y'", "quotes")),
        (("generate",), ("required: prompt",)),
        (("generate", "x", "--threshold", "high"), ("--threshold", "must be a number", "'high'")),
        (("generate", "x", "--threshold", "nan"), ("--threshold", "must be a number")),
        (("generate", "x", "--seed", "1.5"), ("--seed", "must be an integer")),
        (("generate", "x", "--threads", "0"), ("--threads", "at least 1")),
        (("generate", "x", "--json", "--live"), ("--live", "--json")),
        (("generate", "x", "--policy", "treshold"), ("did you mean 'threshold'?",)),
        (("generate", "x", "--cache", "duel"), ("dual",)),
        (("generate", "x", "--score", "entorpy"), ("entropy",)),
        (("generate", "x", "--threshold", "3"), ("threshold", "[0, 1]", "3")),
        (("generate", "x", "--temperature", "-1"), ("temperature", "-1")),
        (("generate", "x", "--steps", "4"), ("steps", "policy")),
        (("generate", "x", "--dtype", "bfloat61"), ("bfloat16",)),
        (("generate", "x", "--schedule", "adablok"), ("did you mean 'adablock'?",)),
        (("generate", "x", "--delimiter", ","), ("delimiters", "adablock")),
        (("generate", "x", "--top-p", "1.5"), ("top_p", "1.5")),
        (("generate", "x", "--top-k", "0"), ("top_k", ">= 1")),
        (("generate", "x", "--negative-prompt", "y"), ("negative_prompt", "cfg_scale")),
        (("generate", "x", "--set", "gamma"), ("--set", "must be NAME=VALUE", "'gamma'")),
        (("generate", "x", "--set", "=3"), ("--set", "must be NAME=VALUE")),
        (("generate", "x", "--policy", "eb", "--set", "gamm=0.3"), ("unknown setting 'gamm'", "did you mean 'gamma'?")),
        (("generate", "x", "--policy", "eb", "--set", "gamma=much"), ("gamma", "must be a number", "'much'")),
        (("generate", "x", "--set", "gamma=0.3"), ("gamma is for policy='eb'",)),
        (("generate", "x", "--set", "cache=dual", "--cache", "dual"), ("cache is given twice", "--cache")),
        (("generate", "x", "--set", "seed=1", "--set", "seed=2"), ("seed is given twice",)),
        (("generate", "x", "--set", "chat=true"), ("--no-chat",)),
        (("policies", "ebb"), ("unknown policy 'ebb'", "did you mean eb?")),
        (("doctor", "--jsn"), ("unknown option --jsn", "did you mean --json?")),
        (("bench", "--dtype", "fp61"), ("unknown --dtype 'fp61'", "did you mean fp")),
    ],
)
def test_mistakes_exit_2_with_one_line(cli, words, fragments):
    code, out, err = cli(*words)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("unmask")
    for fragment in fragments:
        assert fragment in err


def test_missing_model_says_where_it_looked(cli):
    code, out, err = cli("generate", "x", "-m", "nobody/nothing")
    assert code == 2 and out == "" and "nobody/nothing" in err and "Searched" in err


@given(
    st.lists(
        st.text(max_size=12)
        | st.sampled_from(["generate", "policies", "doctor", "bench", "--json", "--help", "--set", "-m", "--", "-"]),
        max_size=5,
    )
)
def test_any_words_parse_or_exit_cleanly(words):
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = io.StringIO()
    try:
        options.read_arguments(words)
    except SystemExit as e:
        assert e.code in (0, 2)
    finally:
        sys.stdout, sys.stderr = stdout, stderr


# ---- help


@pytest.mark.parametrize("command", [(), ("generate",), ("policies",), ("doctor",), ("bench",)])
def test_help_is_quick_and_loads_no_torch(command):
    words = [
        sys.executable,
        "-c",
        "import sys; from unmask.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*words, *command, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: unmask" in done.stdout and done.stdout.endswith("False\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"unmask {unmask.__version__}\n"


# ---- generate


def test_json_is_one_object_and_equals_the_library(cli, folder):
    code, out, err = cli(
        *generate(folder, "--json", "--block-size", "6", "--threshold", "0.2", "--seed", "5")
    )
    assert code == 0 and err == "" and out.count("\n") == 1
    got = json.loads(out)
    assert list(got) == ["text", "ids", "nfe", "tokens_per_forward", "seconds", "finish_reason", "settings"]
    want = unmask.generate(folder, "w1 w2 w3", max_new_tokens=12, block_size=6, threshold=0.2, seed=5)
    assert (got["text"], got["ids"], got["nfe"]) == (want.text, want.ids, want.nfe)
    assert (
        got["settings"]["threshold"] == 0.2
        and got["settings"]["block_size"] == 6
        and got["settings"]["seed"] == 5
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_text_then_figures(cli, folder, cache):
    code, out, _ = cli(*generate(folder, "--cache", cache))
    text, figures = out.rstrip("\n").rsplit("\n", 1)
    want = unmask.generate(folder, "w1 w2 w3", max_new_tokens=12, cache=cache)
    assert code == 0 and text == want.text
    assert (
        f"{want.nfe} NFE" in figures
        and "tokens/s" in figures
        and f"{want.tokens_per_forward:.2f} tokens per forward" in figures
    )
    assert (f"{cache} cache (approximate)" in figures) == (cache != "none")


def test_prompt_from_standard_input(cli, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3\n"))
    piped = json.loads(cli("generate", "-", "-m", folder, "--json")[1])
    assert piped["ids"] == json.loads(cli("generate", "w1 w2 w3", "-m", folder, "--json")[1])["ids"]


def test_every_decoding_option_reaches_the_settings(cli, folder):
    words = [
        "--policy",
        "quota",
        "--steps",
        "3",
        "--score",
        "margin",
        "--temperature",
        "0.5",
        "--cache",
        "prefix",
        "--stop",
        "zzz",
    ]
    settings = json.loads(cli(*generate(folder, "--json", *words, "--stop", "yyy", "--no-chat"))[1])[
        "settings"
    ]
    expected = dict(
        policy="quota",
        steps=3,
        score="margin",
        temperature=0.5,
        cache="prefix",
        stop=["zzz", "yyy"],
        chat=False,
    )
    assert {name: settings[name] for name in expected} == expected
    settings = json.loads(
        cli(*generate(folder, "--json", "--policy", "factor", "--factor", "0.5", "--dtype", "bf16"))[1]
    )["settings"]
    assert settings["factor"] == 0.5 and settings["dtype"] == "bfloat16"


def test_new_options_and_set_reach_the_settings(cli, folder):
    words = ("--schedule", "adablock", "--delimiter", "w5", "--delimiter", "w6", "--top-p", "0.9", "--top-k", "7", "--cfg-scale", "0.5")
    more = ("--negative-prompt", "w9 w8", "--policy", "eb", "--set", "gamma=0.25", "--set", "score=margin", "--set", "repetition-penalty=1.5")
    code, out, err = cli(*generate(folder, "--json", *words, *more, "--set", "suppress=[3, 4]", "--set", "delimiter_threshold=0.2"))
    assert code == 0, err
    got = json.loads(out)
    expected = dict(
        schedule="adablock", delimiters=["w5", "w6"], top_p=0.9, top_k=7, cfg_scale=0.5, negative_prompt="w9 w8", policy="eb", gamma=0.25,
        score="margin", repetition_penalty=1.5, suppress=[3, 4], delimiter_threshold=0.2,
    )  # fmt: skip
    assert {name: got["settings"][name] for name in expected} == expected
    want = unmask.generate(
        folder, "w1 w2 w3", max_new_tokens=12, **(expected | dict(delimiters=("w5", "w6"), suppress=(3, 4)))
    )
    assert (got["ids"], got["nfe"]) == (want.ids, want.nfe)


def test_set_takes_text_where_it_is_no_json(cli, folder):
    code, out, _ = cli(*generate(folder, "--json", "--policy", "remdm", "--set", "strategy=loop", "--set", "steps=6"))
    settings = json.loads(out)["settings"]
    assert code == 0 and settings["strategy"] == "loop" and settings["steps"] == 6


# ---- policies


def test_policies_lists_every_rule_and_its_settings(cli):
    from unmask.decode.table import RULES

    code, out, err = cli("policies")
    assert code == 0 and err == ""
    lines = out.splitlines()
    for spec in RULES.values():
        assert any(line.startswith(spec.name) and spec.title in line and spec.source in line for line in lines)
        for knob in spec.knobs:
            assert knob.name in out
    assert max(map(len, lines)) <= 140


def test_policies_shows_one_rule(cli):
    code, out, _ = cli("policies", "wino")
    words = " ".join(out.split())
    assert code == 0 and "arXiv 2507.18578" in words and "a model from unmask.load" in words and "cache='none'" in words
    for knob in ("wide_in", "narrow_out", "variant"):
        assert f"\n{knob} " in out


def test_policies_on_a_terminal_is_a_table(cli, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    out = cli("policies", "eb")[1]
    assert "gamma" in out and "\u2502" in out
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were not installed
    plain = cli("policies", "eb")[1]
    assert "gamma" in plain and "\u2502" not in plain


def test_threads(cli, folder, threads):
    cli(*generate(folder, "--threads", "2"))
    assert torch.get_num_threads() == 2


def test_same_seed_same_text(cli, folder):
    outs = [
        json.loads(cli(*generate(folder, "--json", "--temperature", "1", "--seed", s))[1])["ids"]
        for s in ("1", "1", "2")
    ]
    assert outs[0] == outs[1] != outs[2]


def test_invalid_logits_exit_1(cli, folder, monkeypatch):
    from unmask.errors import InvalidLogits

    def broken(*_, **__):
        raise InvalidLogits("row 0, step 3, position 7: a NaN in the logits")
        yield

    monkeypatch.setattr(unmask, "stream", broken, raising=False)
    code, out, err = cli(*generate(folder))
    assert (
        code == 1 and out == "" and err.startswith("unmask generate: row 0, step 3") and err.count("\n") == 1
    )


# ---- Ctrl-C


def interrupted(commits: int):
    """A stream that is interrupted after some commits."""

    def stream(model, prompt, **settings):
        canvas = [1, 2, 3] + [MASK] * 12
        for i in range(commits):
            canvas = [*canvas]
            canvas[3 + i] = 10 + i
            yield Step(i, 0.0, {0: 11 - i})
            yield Commit(0, 0, i, i + 1, [3 + i], [10 + i], [0.5], 11 - i, canvas)
        raise KeyboardInterrupt

    return stream


def test_interrupt_prints_what_is_settled(cli, folder, monkeypatch):
    monkeypatch.setattr(unmask, "stream", interrupted(2), raising=False)
    code, out, err = cli(*generate(folder))
    assert code == 130 and out == "w10 w11" + show.MASK * 10 + "\n" and "interrupted: 2 of 12" in err
    code, out, _ = cli(*generate(folder, "--json"))
    got = json.loads(out)
    assert (
        code == 130
        and got["ids"] == [10, 11] + [None] * 10
        and got["finish_reason"] == "interrupted"
        and got["nfe"] == 2
        and got["settings"]["threshold"] == 0.9
        and got["settings"]["cache"] == "none"
    )


@pytest.mark.parametrize("words", [(), ("--json",), ("--live",)])
def test_interrupt_before_the_first_forward(cli, folder, monkeypatch, words):
    monkeypatch.setattr(unmask, "stream", interrupted(0), raising=False)
    assert cli(*generate(folder, *words))[0] == 130


def test_interrupt_while_loading(cli, folder, monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(unmask, "load", load, raising=False)
    code, out, err = cli(*generate(folder))
    assert code == 130 and out == "" and err == "interrupted\n"


# ---- live


@pytest.mark.parametrize("no_color", ["", "1"])
def test_live_falls_back_to_plain_lines(cli, folder, monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    code, out, _ = cli(*generate(folder, "--live", "--threshold", "0.5"))
    want = unmask.generate(folder, "w1 w2 w3", max_new_tokens=12, threshold=0.5)
    lines = out.splitlines()
    assert code == 0 and "\x1b" not in out
    assert [line.split(",")[0] for line in lines[: want.nfe]] == [f"forward {i + 1}" for i in range(want.nfe)]
    assert lines[-2] == want.text and show.MASK in lines[0] and "0 left" in lines[want.nfe - 1]


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil[red]\n"


def commit_of(canvas, positions=(), scores=()):
    return Commit(0, 0, 0, 1, list(positions), [canvas[p] for p in positions], list(scores), 1, list(canvas))


def test_live_canvas_neutralises_generated_text():
    from rich.console import Console

    pieces = show.Pieces(lambda ids: HOSTILE * len(ids))
    view = live.Canvas(pieces, 1, MASK)
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=200, color_system="truecolor").print(
        view.text(commit_of([0, 5, MASK], [1], [0.95]), 1)
    )
    text = out.getvalue()
    assert "]0;owned" in text and "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text
    assert (
        "\r" not in text
        and "\x9b" not in text
        and "\u202e" not in text
        and "evil[red]" in text
        and show.MASK in text
    )


def test_live_canvas_colours_fresh_tokens_by_score():
    view = live.Canvas(show.id_pieces(), 1, MASK)
    spans = view.text(commit_of([9, 1, 2, 3, 4, MASK], [1, 2, 3], [0.95, 0.5, 0.1]), 1).spans
    assert [str(s.style) for s in spans[:4]] == ["green", "yellow", "red", "bright_black"]


def test_live_lines_stay_lines():
    lines = []
    view = live.Lines(show.Pieces(lambda ids: HOSTILE * len(ids)), 1, MASK, lines.append)
    view.update(commit_of([0, 5, MASK], [1], [0.9]), 1)
    assert len(lines) == 1 and lines[0].isprintable()


@given(st.text())
def test_visible_leaves_no_control_character(text):
    assert all(c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) < 0xA0) for c in show.visible(text))
    plain = "".join(c for c in text if c.isprintable())
    assert show.visible(plain) == plain


def test_pieces_keep_the_space_of_each_token(folder):
    decode = unmask.load(folder).tokenizer.decode
    pieces = show.Pieces(decode)
    ids = [4, 7, 7, 30]
    assert "".join(pieces[i] for i in ids).lstrip(" ") == decode(ids) == "w4 w7 w7 w30"
    assert show.canvas_text([0, 4, MASK, 7], 1, MASK, pieces) == f"w4{show.MASK} w7"


def test_terminal_output_is_made_visible(cli, folder, monkeypatch):
    result = SimpleNamespace(
        text=HOSTILE,
        ids=[1],
        nfe=1,
        tokens_per_forward=1.0,
        seconds=1.0,
        finish_reason="length",
        exact=True,
        settings={"cache": "none"},
    )
    monkeypatch.setattr(unmask, "stream", lambda *_, **__: iter([Done(result)]), raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    _, out, _ = cli(*generate(folder))
    assert "\x1b" not in out and "evil" in out


def test_live_on_a_terminal(folder):
    """The real thing on a pseudo-terminal: redrawn, then the text and the figures."""
    import pty

    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm-256color",
        "COLUMNS": "100",
    }
    words = [sys.executable, "-m", "unmask", *generate(folder, "--live")]
    child = subprocess.Popen(
        words, stdout=follower, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env
    )
    os.close(follower)
    out = b""
    try:
        while chunk := os.read(leader, 65536):
            out += chunk
    except OSError:  # the terminal closes with the child
        pass
    os.close(leader)
    _, err = child.communicate()
    want = unmask.generate(folder, "w1 w2 w3", max_new_tokens=12)
    text = out.decode()
    assert child.returncode == 0, err
    assert show.MASK in text and "\x1b[" in text and want.text in text and f"{want.nfe} NFE" in text
