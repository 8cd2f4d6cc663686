"""Models of the Hugging Face hub, through huggingface_hub and its cache: what is in the cache needs no network."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError, Unavailable

BUNDLED = Path(__file__).resolve().parent / "data" / "stories.gguf"
"""The model that is used where none is named."""
PREFERRED = ("Q4_K_M", "Q4_0", "Q8_0")
ASK_S = 15.0
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_TYPE = re.compile(r"(?:^|[-_./])((?:I?Q\d\w*|TQ\d_\d|B?F16|F32|MXFP4\w*))(?=[-./]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubName:
    """`USER/REPO[:QUANT]`, as it was given after an option or command."""

    repo: str
    quant: str | None
    where: str

    @classmethod
    def parse(cls, text: str, option: str = "") -> HubName:
        """Errors: ConfigError for a name that cannot be one."""
        match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?", text)
        where = f"{option} {text}".strip()
        if match is None:
            raise ConfigError(f"{where}: expected USER/REPO or USER/REPO:QUANT")
        return cls(match[1], match[2], where)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A GGUF file in the cache, or the parts of a split one.

    Attributes:
        file: its name in the repository, of a split file the name that the parts share.
        kind: its type, if the name tells it.
        revision: the beginning of the commit, if the repository has moved on since.
        n_missing: parts of a split file that are not there.
        used_s: when it was last used, in seconds since the epoch.
    """

    repo: str
    file: str
    kind: str
    revision: str
    n_bytes: int
    n_missing: int
    used_s: float


# -- files and their parts --------------------------------------------------------------------------------------------


def choose_file(files: Collection[str], quant: str | None) -> str:
    """The GGUF file of a repository to use: the one of `quant`, else Q4_K_M, Q4_0, Q8_0, else the first.

    Of split files the first part. Errors: ConfigError lists what there is.
    """
    found = sorted(f for f in files if f.lower().endswith(".gguf") and not _is_projector(f))
    found = [f for f in found if (match := _PART.search(f)) is None or int(match[1]) == 1]
    if not found:
        raise ConfigError("the repository has no GGUF file; choose one whose name ends in -GGUF")
    for wanted in (quant,) if quant else PREFERRED:
        for f in found:
            if _is_of(f, wanted):
                return f
    if quant:
        raise ConfigError(f"the repository has no file of type {quant}; it has {', '.join(found)}")
    return found[0]


def parts_of(file: str) -> list[str]:
    """The names of all parts of a split file, given one of them; of another file its own."""
    match = _PART.search(file)
    if match is None:
        return [file]
    return [f"{file[: match.start(1)]}{i + 1:05d}{file[match.end(1) :]}" for i in range(int(match[2]))]


def type_of(file: str) -> str:
    """The type that a file's name tells, or nothing."""
    found = _TYPE.findall(file)
    return str(found[-1]).upper() if found else ""


def _is_of(file: str, quant: str) -> bool:
    return re.search(rf"(^|[-_./]){re.escape(quant)}([-_./]|$)", file, re.IGNORECASE) is not None


def _is_projector(file: str) -> bool:
    return "mmproj" in file.lower()


# -- getting them -----------------------------------------------------------------------------------------------------


def download(repo: str) -> Path:
    """The (first) file of `user/repo[:quant]`: from the cache if it is there, else fetched.

    Errors: ConfigError for a name that cannot be one, Unavailable when the hub cannot be reached or refuses.
    """
    name = HubName.parse(repo, "-hf")
    found = find_cached(name)
    if not found:
        return fetch(name)[0]
    for path in found:
        with contextlib.suppress(OSError):  # somebody else's cache; many disks note by themselves what is read, but not all
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return found[0]


def find_cached(name: HubName) -> list[Path]:
    """All parts of the file in the cache, of the newest revision that has it whole; nothing if none has."""
    for snapshot in _snapshots(name.repo):
        files = {p.relative_to(snapshot).as_posix(): p for p in snapshot.rglob("*") if p.is_file()}
        whole = [f for f in files if all(part in files for part in parts_of(f))]
        with contextlib.suppress(ConfigError):
            return [files[part] for part in parts_of(choose_file(whole, name.quant))]
    return []


def _snapshots(repo: str) -> Iterator[Path]:
    """The folders of a repository's revisions: the one that is current first, then from the newest on."""
    from huggingface_hub.file_download import repo_folder_name

    folder = cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")
    current = ""
    with contextlib.suppress(OSError):
        current = (folder / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
    with contextlib.suppress(OSError):
        found = [p for p in (folder / "snapshots").iterdir() if p.is_dir()]
        yield from sorted(found, key=lambda p: (p.name == current, p.stat().st_mtime), reverse=True)


def fetch(name: HubName) -> list[Path]:
    """Ask the hub for the file and download what the cache lacks of it, with a progress bar at a terminal.

    Errors: ConfigError when the repository has no such file, Unavailable when the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # one request, which tells soon that nobody answers; a listing of the tree is tried again for half a minute
        info = HfApi().model_info(name.repo, timeout=ASK_S)
        chosen = choose_file([f.rfilename for f in info.siblings or ()], name.quant)
        return [Path(hf_hub_download(name.repo, f)) for f in parts_of(chosen)]
    except ConfigError as e:
        raise ConfigError(f"{name.where}: {e}") from None
    except Exception as e:  # the hub's HTTP library has errors of its own, which it does not wrap
        raise Unavailable(f"{name.where}: {_why(e)}") from None


def _why(e: Exception) -> str:
    """What kept the hub from giving a file, in one line, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    line = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    story = f"{type(e).__name__}: {line}" if line else type(e).__name__
    if isinstance(e, OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE keeps the hub from being asked; unset it, or see `ggmq list`"
    if isinstance(e, GatedRepoError):
        return "its terms have to be accepted on the hub's page of it; then set HF_TOKEN to a token of yours"
    if isinstance(e, RepositoryNotFoundError):
        return "the hub has no repository of that name that you may read; check the name, or set HF_TOKEN if it is private"
    if isinstance(e, HfHubHTTPError):
        return f"the hub did not give it: {line}; try again later"
    if isinstance(e, OSError) and e.errno is not None and e.filename is not None:
        return f"{e.filename}: {e.strerror}; HF_HOME says where the cache lies"
    if isinstance(e, OSError) and e.errno is not None and not isinstance(e, (ConnectionError, LocalEntryNotFoundError)):
        return f"the cache cannot take it: {e.strerror}; HF_HOME says where it lies"
    return f"not in the cache, and the hub cannot be reached: {story}; check the network, or see `ggmq list`"


# -- what the cache has -----------------------------------------------------------------------------------------------


def cached_models() -> tuple[list[CachedModel], list[str]]:
    """The GGUF files in the cache, those used last first, and what of the cache cannot be read and why."""
    info = _scan()
    if info is None:
        return [], []
    models: dict[tuple[Any, ...], CachedModel] = {}
    for repo in info.repos:
        for revision in sorted(repo.revisions, key=lambda r: "main" not in r.refs):
            split: dict[str, list[Any]] = {}
            for f in revision.files:
                if f.file_name.lower().endswith(".gguf"):
                    split.setdefault(parts_of(_name(f, revision))[0], []).append(f)
            for first, files in split.items():
                key = (repo.repo_id, first, frozenset(f.blob_path for f in files))
                if repo.repo_type == "model" and key not in models:
                    models[key] = CachedModel(
                        repo.repo_id, _PART.sub(".gguf", first), type_of(first),
                        "" if "main" in revision.refs else revision.commit_hash[:7],
                        sum({f.blob_path: f.size_on_disk for f in files}.values()), len(parts_of(first)) - len(files),
                        max(max(f.blob_last_accessed, f.blob_last_modified) for f in files),
                    )  # fmt: skip
    return sorted(models.values(), key=lambda m: (-m.used_s, m.repo, m.file)), [str(w) for w in info.warnings]


class Removal:
    """What of a repository is to be removed: all of its GGUF files, or those of one type, in every revision.

    Attributes:
        files: their names. n_bytes: what is freed; what other files share stays.
    Errors: ConfigError when the cache has none of them.
    """

    def __init__(self, name: HubName) -> None:
        info = _scan()
        self._repo = name.repo
        selected = [(_name(f, revision), f) for revision in _revisions(info, name.repo) for f in revision.files
                    if _is_meant(_name(f, revision), name.quant)]  # fmt: skip
        if info is None or not selected:
            raise ConfigError(f"{name.where}: the cache has no such model; see `ggmq list` for what it has")
        self.files: Sequence[str] = sorted({f for f, _ in selected})
        self._strategy = info.delete_files(*(f for _, f in selected))
        self.n_bytes = int(self._strategy.expected_freed_size)

    def carry_out(self) -> None:
        """Remove the files, and the repository's folder when nothing is left in it. Errors: OSError."""
        self._strategy.execute()
        info = _scan()
        revisions = _revisions(info, self._repo)
        if info is not None and not any(r.files for r in revisions):
            info.delete_revisions(*(r.commit_hash for r in revisions)).execute()


def cache_folder() -> Path:
    """Where the hub's files lie."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _scan() -> Any:
    """huggingface_hub's record of the whole cache; None when there is no cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(cache_folder())
    except CacheNotFound:
        return None
    except ValueError:
        raise ConfigError(f"{cache_folder()}: expected a folder; HF_HOME says where the cache lies") from None


def _revisions(info: Any, repo: str) -> list[Any]:
    repos = info.repos if info is not None else ()
    return [revision for r in repos if (r.repo_type, r.repo_id) == ("model", repo) for revision in r.revisions]


def _name(file: Any, revision: Any) -> str:
    """A file's name in its repository, with its folders."""
    return str(file.file_path.relative_to(revision.snapshot_path).as_posix())


def _is_meant(file: str, quant: str | None) -> bool:
    if not file.lower().endswith(".gguf"):
        return False
    return quant is None or (_is_of(file, quant) and not _is_projector(file))
