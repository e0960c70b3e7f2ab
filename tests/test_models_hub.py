"""Finding models: folders, the Hugging Face cache, the embedded model; nothing is fetched unless asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_kit import GOLDEN, write_cache, write_checkpoint
from unmask.errors import ModelNotFound, SettingError
from unmask.models import hub, inspect, resolve, search_paths

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of our own as the only one, an empty home and working folder, and no network."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("home", "work", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "cache"


def missing(source, **arguments) -> str:
    with pytest.raises(ModelNotFound) as caught:
        resolve(source, **arguments)
    return str(caught.value)


def test_a_folder(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model")
    assert resolve(folder) == resolve(str(folder)) == resolve(str(folder) + "/") == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == resolve("./model") == folder
    write_checkpoint(tmp_path / "home" / "mine")
    assert resolve("~/mine") == tmp_path / "home" / "mine"


def test_what_is_no_folder(tmp_path):
    assert "is a file; give the folder" in missing(GOLDEN / "config.json")
    assert "holds no config.json" in missing(tmp_path)
    assert "there is no such folder" in missing("/nowhere/at/all")
    assert "there is no such folder" in missing(Path("org/model"))  # a Path is never an id
    assert "did you mean 'tiny'" in missing("tinny")
    assert isinstance(pytest.raises(ModelNotFound, resolve, "x").value, FileNotFoundError)


@pytest.mark.parametrize("source", ["", "a\0b", b"x", 3, None, ["x"]])
def test_unusable_sources(source):
    with pytest.raises(SettingError, match="a model must be named by"):
        resolve(source)


@pytest.mark.parametrize("revision", ["", "..", "../x", "a/../b", "/abs", "a\0", "a b", 3, None, "x" * 500])
def test_unusable_revisions(revision):
    with pytest.raises(SettingError, match="revision"):
        resolve("org/model", revision=revision)


def test_an_id_in_the_cache(cache):
    snapshot = write_cache(cache)
    assert resolve("org/model") == snapshot
    assert inspect(resolve("org/model")).config.n_layers == 3
    assert resolve(cache / "models--org--model") == snapshot
    assert resolve(snapshot) == snapshot


def test_revisions(cache):
    one = write_cache(cache, commit="1111")
    two = write_cache(cache, commit="2222", main=False)
    root = cache / "models--org--model"
    assert resolve("org/model") == one
    assert resolve("org/model", revision="2222") == two
    (root / "refs" / "dev").mkdir()
    (root / "refs" / "dev" / "x").write_text("2222\n")
    assert resolve("org/model", revision="dev/x") == two
    message = missing("org/model", revision="v2")
    assert "at revision 'v2'" in message and "hf download org/model --revision v2" in message
    assert "snapshots there: 1111, 2222" in missing(root, revision="v2")


def test_a_snapshot_without_refs(cache):
    snapshot = write_cache(cache, main=False)
    assert resolve("org/model") == snapshot
    write_cache(cache, commit="other", main=False)
    assert "is not on this machine" in missing("org/model")  # two, and nothing says which


@pytest.mark.parametrize(
    "ref", ["../../../../etc", "/etc", "", "..", "a/b", "\0", "x" * 5000, b"\xff\xfe".decode("latin1")]
)
def test_hostile_refs(cache, ref):
    write_cache(cache)
    write_cache(cache, commit="other", main=False)
    (cache / "models--org--model" / "refs" / "main").write_text(ref)
    assert "must hold a commit" in missing("org/model") or "incomplete" in missing("org/model")


def test_incomplete_snapshots(cache):
    snapshot = write_cache(cache)
    (snapshot / "config.json").unlink()
    message = missing("org/model")
    assert "is incomplete" in message and "hf download org/model" in message
    (snapshot / "config.json").symlink_to("../../blobs/gone")
    assert "is incomplete" in missing("org/model")


def test_caches_in_order(tmp_path, monkeypatch):
    """HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, then the default in the home folder."""
    places = {
        "XDG_CACHE_HOME": tmp_path / "xdg" / "huggingface" / "hub",
        "HF_HOME": tmp_path / "hf" / "hub",
        "HF_HUB_CACHE": tmp_path / "cache",
    }
    default = write_cache(tmp_path / "home" / ".cache" / "huggingface" / "hub")
    assert resolve("org/model") == default
    for name, place in places.items():
        monkeypatch.setenv(
            name, str({"XDG_CACHE_HOME": tmp_path / "xdg", "HF_HOME": tmp_path / "hf"}.get(name, place))
        )
        snapshot = write_cache(place)
        assert resolve("org/model") == snapshot
    labels = [place.label for place in search_paths()]
    assert labels == ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "default cache", "embedded"]
    assert all(place.exists for place in search_paths()[:4])


def test_not_found_names_folders_and_command(tmp_path, cache):
    message = missing("GSAI-ML/LLaDA-8B-Instruct")
    for part in (
        str(tmp_path / "work" / "GSAI-ML" / "LLaDA-8B-Instruct"),
        str(cache / "models--GSAI-ML--LLaDA-8B-Instruct"),
        str(tmp_path / "home" / ".cache" / "huggingface" / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct"),
        "hf download GSAI-ML/LLaDA-8B-Instruct",
        "download=True",
    ):
        assert part in message


def test_a_folder_comes_before_the_cache(tmp_path, cache):
    write_cache(cache)
    local = write_checkpoint(tmp_path / "work" / "org" / "model")
    assert resolve("org/model") == local
    (local / "config.json").unlink()  # no model folder any more
    assert resolve("org/model") == cache / "models--org--model" / "snapshots" / "a1b2c3"


@pytest.mark.parametrize(
    "text", ["../x/y", "a/../b", "a/b/c", "a//b", "/a", "a/", "a/..", "--a/b", "a--b/c", "a b/c", "a/b\n"]
)
def test_ids_cannot_leave_the_cache(text):
    assert "no such folder" in missing(text)


def test_embedded_model(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "package" / "tiny" / "model")
    monkeypatch.setattr(hub, "_PACKAGE", tmp_path / "package")
    assert resolve("tiny") == folder
    (tmp_path / "work" / "tiny").mkdir()  # no model folder: does not hide it
    assert resolve("tiny") == folder
    assert resolve(write_checkpoint(tmp_path / "work" / "tiny")) == tmp_path / "work" / "tiny"
    assert resolve("tiny") == tmp_path / "work" / "tiny"
    (folder / "config.json").unlink()
    (tmp_path / "work" / "tiny" / "config.json").unlink()
    assert "is not in this installation" in missing("tiny")


@given(text=st.text(max_size=60) | st.sampled_from(["a/b", "~", "~nobody/x", ".", "..", "a" * 300 + "/b"]))
def test_any_text_is_found_or_refused(text):
    try:
        resolve(text)
    except (ModelNotFound, SettingError):
        pass


# --- downloads: with a stand-in for huggingface_hub, as tests use no network -------------------------------------


def stand_in(monkeypatch, answer) -> list:
    calls = []

    def snapshot_download(repo_id, **arguments):
        calls.append((repo_id, arguments))
        return answer() if callable(answer) else answer

    import types

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_download_only_when_asked_and_only_when_missing(tmp_path, cache, monkeypatch):
    folder = write_checkpoint(tmp_path / "fetched")
    calls = stand_in(monkeypatch, str(folder))
    missing("org/model")
    assert calls == []
    assert resolve("org/model", download=True) == folder
    assert calls == [
        ("org/model", {"revision": "main", "allow_patterns": ["*.safetensors", "*.json", "*.jinja"]})
    ]
    write_cache(cache)
    assert resolve("org/model", download=True) == cache / "models--org--model" / "snapshots" / "a1b2c3"
    assert len(calls) == 1


def test_download_problems(tmp_path, monkeypatch):
    def fail():
        raise OSError("no route")

    stand_in(monkeypatch, fail)
    assert "could not download 'org/model': OSError: no route" in missing("org/model", download=True)
    stand_in(monkeypatch, str(tmp_path))
    assert "holds no config.json" in missing("org/model", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install unmask[hub]" in missing("org/model", download=True)


def test_offline_mode_of_the_real_library(tmp_path, cache):
    script = "import unmask.models as m; m.resolve('org/model', download=True)"
    source = str(Path(hub.__file__).resolve().parents[2])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": source, "HF_HUB_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (
        "ModelNotFound: could not download 'org/model'" in done.stderr
        or "pip install unmask[hub]" in done.stderr
    )


def test_looking_up_imports_no_torch():
    script = (
        "import sys, unmask.models as m; m.search_paths()\n"
        "try: m.resolve('org/model')\n"
        "except FileNotFoundError: pass\n"
        "assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules and 'jinja2' not in sys.modules"
    )
    source = str(Path(hub.__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": source}, check=True)
