"""Models of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ConfigError, Unavailable

PREFERRED = ("Q4_K_M", "Q4_0", "Q8_0")
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def choose_file(files: Sequence[str], quant: str | None) -> str:
    """The GGUF file of a repository to use: the one of `quant`, else Q4_K_M, Q4_0, Q8_0, else the first.

    Of split files the first part. Errors: ConfigError lists what there is.
    """
    found = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    found = [f for f in found if (match := _PART.search(f)) is None or int(match[1]) == 1]
    if not found:
        raise ConfigError("the repository has no GGUF file; choose one whose name ends in -GGUF")
    for wanted in (quant,) if quant else PREFERRED:
        for f in found:
            if re.search(rf"(^|[-_.]){re.escape(wanted)}([-_.]|$)", Path(f).name, re.IGNORECASE):
                return f
    if quant:
        raise ConfigError(f"the repository has no file of type {quant}; it has {', '.join(found)}")
    return found[0]


def download(repo: str) -> Path:
    """Fetch `user/repo[:quant]` once; returns the path of the (first) file.

    Errors: ConfigError for a name that cannot be one, Unavailable when the hub cannot be reached or refuses.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", repo)
    if match is None:
        raise ConfigError(f"-hf {repo}: expected USER/REPO or USER/REPO:QUANT")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, quant = match[1], match[2]
    try:
        files = HfApi().list_repo_files(name)
        chosen = choose_file(files, quant)
        part = _PART.search(chosen)
        parts = [f for f in files if part and f.startswith(chosen[: part.start()])] or [chosen]
        paths = [Path(hf_hub_download(name, f)) for f in sorted(parts)]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise Unavailable(f"-hf {repo}: the hub did not give it: {line}; check the name, the network, HF_TOKEN") from None
    except Exception as e:  # the hub's HTTP library has errors of its own, which it does not wrap
        raise Unavailable(f"-hf {repo}: the hub cannot be reached: {type(e).__name__}: {e}; check the network") from None
    return paths[0]
