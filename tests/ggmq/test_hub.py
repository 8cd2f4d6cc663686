"""Models of the hub: which file is chosen, the cache before the network, and pull, list and rm over a real cache folder."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from ggmq.cli.models import shown_age, shown_size
from ggmq.hub import choose_file, download, parts_of, type_of
from protocol.errors import ConfigError, Unavailable
from tests.support.fixtures import BUNDLED, ROOT
from tests.support.hub import add_to_cache, commit_of, stand_in
from tests.support.processes import GGMQ
from tests.support.terminal import ENTER, Terminal

FILES = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_NL.gguf", "mmproj-m-F16.gguf", "big-F16-00001-of-00002.gguf",
         "big-F16-00002-of-00002.gguf", "big-F16-notes.gguf", "Q2_K/m-00001-of-00001.gguf"]  # fmt: skip
REPO = "some-body/stories-GGUF"
MODEL = BUNDLED.read_bytes()
NOWHERE = "http://127.0.0.1:9"
RUN = ["run", "-p", "Once upon a time", "-n", "3", "--temp", "0", "--workers", "1", "-hf"]


@pytest.mark.parametrize(("quant", "file"), [
    (None, "m-Q4_K_M.gguf"), ("Q8_0", "m-Q8_0.gguf"), ("iq4_nl", "m-IQ4_NL.gguf"), ("F16", "big-F16-00001-of-00002.gguf"),
    ("Q2_K", "Q2_K/m-00001-of-00001.gguf"),
])  # fmt: skip
def test_a_file_is_chosen(quant: str | None, file: str) -> None:
    assert choose_file(FILES, quant) == file


def test_what_is_not_there_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"no file of type Q3_K; it has Q2_K/m-00001"):
        choose_file(FILES, "Q3_K")
    with pytest.raises(ConfigError, match="no GGUF file"):
        choose_file(["README.md"], None)


def test_parts_and_types_are_told_by_names() -> None:
    assert parts_of("a/big-F16-00002-of-00003.gguf") == [f"a/big-F16-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts_of("m-Q8_0.gguf") == ["m-Q8_0.gguf"]
    names = [*FILES, "Qwen2.5-0.5B-Instruct-q4_k_m.gguf", "gpt-oss-MXFP4_MOE.gguf", "bf16/m.gguf", "stories.gguf",
             "m-UD-IQ2_XXS.gguf"]  # fmt: skip
    assert [type_of(n) for n in names] == ["", "Q8_0", "Q4_K_M", "IQ4_NL", "F16", "F16", "F16", "F16", "Q2_K", "Q4_K_M",
                                           "MXFP4_MOE", "BF16", "", "IQ2_XXS"]  # fmt: skip


def test_sizes_and_ages_are_for_people() -> None:
    assert [shown_size(n) for n in (12, 2048, 3 << 20, 5 << 29)] == ["12 B", "2.0 KiB", "3.0 MiB", "2.5 GiB"]
    assert [shown_age(s) for s in (-5, 59, 60, 7200, 86400 * 45)] == ["just now", "just now", "1 minute ago", "2 hours ago",
                                                                     "1 month ago"]  # fmt: skip


def test_an_unreachable_hub_is_an_ordinary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    with pytest.raises(Unavailable, match="hub"):
        download("somebody/something-GGUF")
    for name in ("nonsense", "../a", "a/..", "a/b:", "a/b/c", "/a"):
        with pytest.raises(ConfigError, match="USER/REPO"):
            download(name)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """The folder of a cache that is empty so far."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def env(hub: Path, **more: str) -> Mapping[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**inherited, "HF_HUB_CACHE": str(hub), "HF_HOME": str(hub.parent / "home"), "HF_ENDPOINT": NOWHERE, **more}


def ggmq(hub: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GGMQ, *args], cwd=ROOT, env=env(hub, **more), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_a_cached_model_runs_without_the_network_or_asking_for_it(hub: Path) -> None:
    files = {"README.md": b"#", "m-Q8_0.gguf": MODEL, "m-Q4_0.gguf": b"GGUF", "b-F16-00001-of-00002.gguf": b"GGUF"}
    snapshot = add_to_cache(hub, REPO, files)
    add_to_cache(hub, REPO, {"m-Q5_0.gguf": MODEL}, commit_of(2), current=False)
    (snapshot / "m-Q4_0.gguf").resolve().unlink()  # a link to nothing is no file
    blob = (snapshot / "m-Q8_0.gguf").resolve()
    asked: list[str] = []
    with stand_in(REPO, {}, asked) as endpoint:
        for quant, more in (("", {"HF_ENDPOINT": endpoint}), (":q8_0", {"HF_HUB_OFFLINE": "1"}), (":Q5_0", {})):
            os.utime(blob, (1, 1))
            r = ggmq(hub, *RUN, REPO + quant, **more)
            assert r.returncode == 0 and r.stdout.startswith("Once upon a time"), r.stderr
            assert blob.stat().st_mtime == 1 and blob.stat().st_atime > 1  # when it was used, not when it was made
    assert not asked


def test_what_is_not_cached_is_one_line_of_what_to_do(hub: Path) -> None:
    add_to_cache(hub, REPO, {"b-F16-00001-of-00002.gguf": b"GGUF"})
    with stand_in("another/repo", {"m-Q8_0.gguf": MODEL}, []) as endpoint:
        for name, more, code, words in (
            (f"{REPO}:F16", {"HF_HUB_OFFLINE": "1"}, 1, "not in the cache, and HF_HUB_OFFLINE keeps .*; unset"),
            (f"{REPO}:F16", {}, 1, "not in the cache, and the hub cannot be reached: .*; check the network"),
            (REPO, {"HF_ENDPOINT": endpoint}, 1, "no repository of that name .* check the name, or set HF_TOKEN"),
            ("another/repo:Q4_0", {"HF_ENDPOINT": endpoint}, 2, "has no file of type Q4_0; it has m-Q8_0.gguf"),
        ):  # fmt: skip
            for command, prefix in ((RUN, "-hf "), (["pull"], "")):
                r = ggmq(hub, *command, name, **more)
                assert r.returncode == code and re.fullmatch(rf"ggmq: {prefix}{name}: .*{words}.*\n", r.stderr), r.stderr


@pytest.mark.parametrize(("refusal", "words"), [
    ((403, "GatedRepo"), "its terms have to be accepted on the hub's page of it; then set HF_TOKEN"),
    ((404, "EntryNotFound"), "the hub did not give it: .*404"),
], ids=["gated", "gone"])  # fmt: skip
def test_a_hub_that_refuses_is_told_in_a_line(hub: Path, refusal: tuple[int, str], words: str) -> None:
    with stand_in(REPO, {"m-Q8_0.gguf": MODEL}, [], refusal) as endpoint:
        r = ggmq(hub, "pull", REPO, HF_ENDPOINT=endpoint)
    assert r.returncode == 1 and re.fullmatch(f"ggmq: {REPO}: {words}.*\n", r.stderr), r.stderr


def test_a_cache_that_cannot_be_written_is_told_in_a_line(hub: Path) -> None:
    (hub / "file").write_text("")
    with stand_in(REPO, {"m-Q8_0.gguf": MODEL}, []) as endpoint:
        r = ggmq(hub / "file", "pull", REPO, HF_ENDPOINT=endpoint)
    assert r.returncode == 1, r.stderr
    assert re.fullmatch(f"ggmq: {REPO}: .*file.*: .*; HF_HOME says where the cache lies\n", r.stderr), r.stderr


def test_pull_downloads_list_shows_and_rm_removes(hub: Path) -> None:
    half = len(MODEL) // 2
    files = {"README.md": b"#", "m-Q8_0.gguf": MODEL, "big-F16-00001-of-00002.gguf": MODEL[:half],
             "big-F16-00002-of-00002.gguf": MODEL[half:]}  # fmt: skip
    asked: list[str] = []
    with stand_in(REPO, files, asked) as endpoint:  # a stand-in for the hub: no test asks the hub itself
        for quant, first in (("Q8_0", "m-Q8_0.gguf"), ("F16", "big-F16-00001-of-00002.gguf")):
            r = ggmq(hub, "pull", f"{REPO}:{quant}", HF_ENDPOINT=endpoint)
            assert r.returncode == 0, r.stderr
            assert Path(r.stdout.strip()).read_bytes() == files[first] and Path(r.stdout.strip()).name == first
            assert f"{shown_size(len(MODEL))}; run it with: ggmq run -hf {REPO}:{quant}" in r.stderr
        n = sum(line.startswith("GET /some") for line in asked)
        assert ggmq(hub, "pull", f"{REPO}:F16", HF_ENDPOINT=endpoint).returncode == 0
        assert n == 3 == sum(line.startswith("GET /some") for line in asked)  # nothing is fetched twice
    r = ggmq(hub, *RUN, f"{REPO}:Q8_0")
    assert r.returncode == 0 and r.stdout.startswith("Once upon a time"), r.stderr
    head, *rows = ggmq(hub, "list").stdout.splitlines()
    assert re.split("  +", head) == ["REPOSITORY", "FILE", "TYPE", "SIZE", "USED"]
    size = shown_size(len(MODEL))
    assert sorted(re.split("  +", row) for row in rows) == [[REPO, "big-F16.gguf", "F16", size, "just now"],
                                                            [REPO, "m-Q8_0.gguf", "Q8_0", size, "just now"]]  # fmt: skip
    r = ggmq(hub, "rm", f"{REPO}:F16")
    assert r.returncode == 2 and "say -y" in r.stderr
    r = ggmq(hub, "rm", "-y", f"{REPO}:F16")
    assert r.returncode == 0 and r.stdout == ("removed big-F16-00001-of-00002.gguf, big-F16-00002-of-00002.gguf; "
                                              f"freed {size}\n")  # fmt: skip
    assert "big" not in (left := ggmq(hub, "list").stdout) and "m-Q8_0" in left
    assert ggmq(hub, "rm", "-y", REPO).stdout == f"removed m-Q8_0.gguf; freed {size}\n"
    r = ggmq(hub, "list")
    assert r.returncode == 0 and not r.stdout and "get one with: ggmq pull" in r.stderr
    assert not list(hub.glob("models--*"))


def test_rm_takes_every_revision_and_leaves_what_other_files_need(hub: Path) -> None:
    shared, old = b"GGUF" + b"s" * 4000, b"GGUF" + b"o" * 2000
    add_to_cache(hub, REPO, {"m-Q8_0.gguf": old, "config.json": b"{}"}, commit_of(1), current=False)
    files = {"m-Q8_0.gguf": shared, "m-Q4_0.gguf": shared, "mmproj-Q8_0.gguf": b"GGUF"}
    snapshot = add_to_cache(hub, REPO, files, commit_of(2))
    other = add_to_cache(hub, "other/repo", {"n-Q8_0.gguf": b"GGUF", "n.safetensors": b"n"}, commit_of(3))
    add_to_cache(hub, "broken/repo", {"x.gguf": b"x"}, commit_of(4))
    (hub / "models--broken--repo" / "refs" / "main").write_text(commit_of(5))
    (hub / "models--some" / "note.txt").parent.mkdir()
    r = ggmq(hub, "list")
    assert r.returncode == 0 and r.stderr.count("left out: ") == 2 and "broken" in r.stderr
    assert sorted(line.split("  ")[1].strip() for line in r.stdout.splitlines()[1:] if REPO in line) == [
        "m-Q4_0.gguf", "m-Q8_0.gguf", f"m-Q8_0.gguf (revision {commit_of(1)[:7]})", "mmproj-Q8_0.gguf"]
    assert ggmq(hub, "rm", "-y", f"{REPO}:Q8_0").stdout == "removed m-Q8_0.gguf; freed 2.0 KiB\n"
    assert sorted(p.name for p in snapshot.iterdir()) == ["m-Q4_0.gguf", "mmproj-Q8_0.gguf"]
    assert (snapshot / "m-Q4_0.gguf").read_bytes() == shared
    for name in (f"{REPO}:Q8_0", "no/such"):
        r = ggmq(hub, "rm", "-y", name)
        assert r.returncode == 2 and f"{name}: the cache has no such model; see `ggmq list`" in r.stderr
    assert ggmq(hub, "rm", "-y", "other/repo").returncode == 0
    assert [p.name for p in other.iterdir()] == ["n.safetensors"] and (other / "n.safetensors").read_bytes() == b"n"


def test_missing_parts_and_no_cache_are_told(hub: Path) -> None:
    add_to_cache(hub, REPO, {"b-F16-00002-of-00003.gguf": b"GGUF" * 256})
    assert "b-F16.gguf (2 parts missing)  F16   1.0 KiB" in ggmq(hub, "list").stdout
    r = ggmq(hub / "nowhere", "list")
    assert r.returncode == 0 and f"no models in {hub}/nowhere" in r.stderr
    assert ggmq(hub / "nowhere", "rm", "-y", REPO).returncode == 2
    (hub / "file").write_text("")
    r = ggmq(hub / "file", "list")
    assert r.returncode == 2 and "expected a folder" in r.stderr and "Traceback" not in r.stderr


def test_rm_asks_at_a_terminal(hub: Path) -> None:
    snapshot = add_to_cache(hub, REPO, {"m-Q8_0.gguf": b"GGUF" * 256})
    for answer, code in (("", 1), ("n", 1), ("y", 0)):
        with Terminal([*GGMQ, "rm", REPO], env=env(hub)) as t:
            t.until(r"m-Q8_0.gguf\nRemove it and free 1.0 KiB\? \[y/N\] ")
            t.type(answer + ENTER)
            assert t.ended() == code
            assert ("freed 1.0 KiB" if code == 0 else "nothing was removed") in t.text
        assert snapshot.exists() is (code == 1)


def test_a_download_shows_its_progress_at_a_terminal(hub: Path) -> None:
    with stand_in(REPO, {"m-Q8_0.gguf": MODEL}, []) as endpoint, \
            Terminal([*GGMQ, "pull", REPO], env=env(hub, HF_ENDPOINT=endpoint)) as t:
        assert t.ended() == 0
        assert re.search(r"m-Q8_0.gguf: +100%", t.text), t.text
