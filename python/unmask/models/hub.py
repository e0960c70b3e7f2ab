"""Finding a model: a folder, else the Hugging Face cache, else an embedded model. Nothing is fetched unless asked.

The cache holds models--org--name/{refs/<revision>, snapshots/<commit>/..., blobs/...}; refs/main names the commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelNotFound, SettingError, nearest
from .checkpoint import CONFIG_FILE
from .config import shown

EMBEDDED = {"tiny": "model", "tiny-block": "model_block"}
"""Names of the models inside the package -> their folder below tiny/."""

_PACKAGE = Path(__file__).resolve().parent.parent
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PLAIN = re.compile(r"[\w.-]{1,200}")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
"""What a download fetches: never code, never pickle."""


@dataclass(frozen=True)
class SearchPath:
    """A place where models are looked for: what it is, where, and whether it is there."""

    label: str
    path: Path

    @property
    def exists(self) -> bool:
        return self.path.is_dir()


def resolve(source: str | os.PathLike[str], *, revision: str = "main", download: bool = False) -> Path:
    """Folder of a model (holds config.json).

    Args:
        source: a folder, a `models--org--name` folder of the cache, an `org/name` id, or the name of an embedded model.
        revision: branch, tag or commit, for what is found in the cache.
        download: fetch an `org/name` that is not on this machine, with huggingface_hub (`pip install unmask[hub]`).
    Raises:
        ModelNotFound: names the folders searched and the command that would fetch the model.
        SettingError: an unusable source or revision.
    """
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(text, str) or not text or "\0" in text:
        raise SettingError(
            f"a model must be named by a folder, an org/name id or {' or '.join(map(repr, EMBEDDED))}, got {shown(source)}"
        )
    if not isinstance(revision, str) or not all(_is_plain(part) for part in revision.split("/")):
        raise SettingError(f"revision must be a branch, tag or commit, got {shown(revision)}")
    path = _expanded(text)
    is_name = isinstance(source, str) and (text in EMBEDDED or _is_repo_id(text))
    if _is_file(path):
        raise ModelNotFound(f"{path} is a file; give the folder that holds it ({path.parent})")
    if _is_dir(path):
        if path.resolve().name.startswith("models--") and _is_dir(path / "snapshots"):
            return _snapshot(path, revision)
        if _is_file(path / CONFIG_FILE):
            return path
        if not is_name:
            raise ModelNotFound(f"{path} holds no {CONFIG_FILE}, so it is no model folder")
    if not is_name:
        hint = nearest(text, EMBEDDED) if os.sep not in text else ""
        raise ModelNotFound(f"no model {text!r}: there is no such folder, and it is no org/name id{hint}")
    if text in EMBEDDED:
        return _embedded(text)
    return _from_cache(text, revision, download, path)


def search_paths() -> list[SearchPath]:
    """Where `resolve` looks, in order, after an explicit folder: the caches, then the package."""
    env = os.environ.get
    named = [
        ("HF_HUB_CACHE", env("HF_HUB_CACHE")),
        ("HUGGINGFACE_HUB_CACHE", env("HUGGINGFACE_HUB_CACHE")),
        ("HF_HOME", env("HF_HOME") and os.path.join(env("HF_HOME", ""), "hub")),
        (
            "XDG_CACHE_HOME",
            env("XDG_CACHE_HOME") and os.path.join(env("XDG_CACHE_HOME", ""), "huggingface", "hub"),
        ),
        ("default cache", os.path.join("~", ".cache", "huggingface", "hub")),
    ]
    places: dict[Path, SearchPath] = {}
    for label, place in named:
        if place:
            path = _expanded(place)
            places.setdefault(path, SearchPath(label, path))
    return [*places.values(), SearchPath("embedded", _PACKAGE / "tiny")]


def _expanded(text: str) -> Path:
    """Absolute path; `~` is the home folder, where there is one."""
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError):
        return Path(text)


def _embedded(name: str) -> Path:
    folder = _PACKAGE / "tiny" / EMBEDDED[name]
    if not _is_file(folder / CONFIG_FILE):
        raise ModelNotFound(
            f"the embedded model {name!r} is not in this installation: {folder} holds no {CONFIG_FILE}"
        )
    return folder


def _from_cache(repo_id: str, revision: str, download: bool, local: Path) -> Path:
    searched = [str(local)]
    for place in search_paths()[:-1]:
        folder = place.path / ("models--" + repo_id.replace("/", "--"))
        searched.append(f"{folder} ({place.label})")
        if _is_dir(folder) and _commit(folder, revision) is not None:
            return _snapshot(folder, revision)
    if download:
        return _download(repo_id, revision)
    flag = "" if revision == "main" else f" --revision {revision}"
    at = "" if revision == "main" else f" at revision {revision!r}"
    lines = "".join(f"\n  {place}" for place in searched)
    raise ModelNotFound(
        f"model {repo_id!r}{at} is not on this machine. Searched:{lines}\nFetch it with: hf download {repo_id}{flag}"
        "\n(or pass download=True; --download on the command line)"
    )


def _commit(folder: Path, revision: str) -> str | None:
    """Name of the snapshot that a revision means in one model's cache folder: through refs, else a commit as such."""
    ref = folder / "refs" / revision
    if _is_file(ref):
        with open(ref, "rb") as file:
            commit = file.read(256).decode("utf-8", "replace").strip()
        if not _is_plain(commit):
            raise ModelNotFound(f"{ref} must hold a commit, got {shown(commit)}")
        return commit
    if _is_plain(revision) and _is_dir(folder / "snapshots" / revision):
        return revision
    snapshots = _snapshots(folder)
    if revision == "main" and len(snapshots) == 1:  # copied by hand, without refs
        return snapshots[0]
    return None


def _snapshot(folder: Path, revision: str) -> Path:
    commit = _commit(folder, revision)
    if commit is None:
        listed = ", ".join(_snapshots(folder)) or "none"
        raise ModelNotFound(f"{folder} has no revision {revision!r}; snapshots there: {listed}")
    path = folder / "snapshots" / commit
    if not _is_file(path / CONFIG_FILE):
        repo_id = folder.resolve().name.removeprefix("models--").replace("--", "/", 1)
        raise ModelNotFound(
            f"{path} is incomplete: it holds no {CONFIG_FILE}. Fetch it with: hf download {repo_id}"
        )
    return path


def _snapshots(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in (folder / "snapshots").iterdir() if p.is_dir())
    except OSError:
        return []


def _download(repo_id: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelNotFound(
            f"model {repo_id!r} is not on this machine, and downloading needs huggingface_hub: pip install unmask[hub]"
        ) from None
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
    except (
        Exception
    ) as error:  # network, offline mode, no such repository, no permission: many classes, one meaning here
        raise ModelNotFound(f"could not download {repo_id!r}: {type(error).__name__}: {error}") from error
    if not _is_file(folder / CONFIG_FILE):
        raise ModelNotFound(f"{repo_id!r} was downloaded to {folder}, but holds no {CONFIG_FILE}")
    return folder


def _is_plain(name: str) -> bool:
    return _PLAIN.fullmatch(name) is not None and name not in (".", "..")


def _is_repo_id(text: str) -> bool:
    return _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def _quiet(check: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def answer(path: Path) -> bool:
        try:
            return check(path)
        except (OSError, ValueError):  # a name too long, no permission
            return False

    return answer


_is_dir, _is_file = _quiet(Path.is_dir), _quiet(Path.is_file)
