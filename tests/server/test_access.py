"""Who may ask: keys, names of the host, pages of other origins; and what is counted and logged of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from ggmq.cli import main
from ggmq.server.options import is_loopback
from tests.support.fixtures import ROOT
from tests.support.serving import Running, serving

SECRET, OTHER = "sk-first-0123", "sk-other-4567"
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Asks for a key, and lets a page in."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(f"# two of us\n{OTHER}\n")
    with (folder / "log").open("w+b") as log:
        options = ("--api-key", SECRET, "--api-key-file", str(folder / "keys"), "--cors-origin", PAGE, "--temp", "0")
        with serving(*options, log="debug", stderr=log) as running:
            yield running
        written = (folder / "log").read_text()
    assert "route=other status=401 error=invalid_api_key" in written
    assert re.search(r"event=answered \S+ route=/v1/chat/completions request=1,2 status=200", written)
    assert not re.search("sk-|never to be logged|Once", written), written


def test_a_key_is_asked_for(keyed: Running) -> None:
    for headers, code in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": f"Basic {SECRET}"}, 401),
                          ({"Authorization": f"Bearer {SECRET}x"}, 401), ({"x-api-key": ""}, 401),
                          ({"Authorization": f"Bearer {SECRET}"}, 200), ({"x-api-key": OTHER}, 200)):  # fmt: skip
        r = httpx.get(keyed.url + "/v1/models", headers=headers)
        assert r.status_code == code, headers
        assert code == 200 or (r.json()["error"]["type"] == "authentication_error" and r.headers["www-authenticate"])
    assert httpx.post(keyed.url + "/v1/messages", json={}).json()["type"] == "error"  # in Anthropic's shape
    for path in ("/health", "/", "/web/app.js"):
        assert httpx.get(keyed.url + path).status_code == 200
    for path in ("/slots", "/metrics", "/cluster", "/cluster/events", "/props", "/nothing", "/web", "//health"):
        assert httpx.get(keyed.url + path).status_code == 401, path
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key="no", max_retries=0) as client, pytest.raises(
        openai.AuthenticationError
    ):
        client.models.list()


def test_a_request_is_in_the_log_with_the_numbers_of_its_answers(keyed: Running) -> None:
    body = {"messages": [{"role": "user", "content": "Once, never to be logged"}], "max_tokens": 2, "n": 2}
    r = httpx.post(keyed.url + "/v1/chat/completions", json=body, headers={"x-api-key": OTHER}, timeout=60)
    assert r.status_code == 200 and len(r.json()["choices"]) == 2


def test_pages_of_other_origins_are_let_in_by_name(keyed: Running) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    r = httpx.options(keyed.url + "/v1/chat/completions", headers={"Origin": PAGE, **asked})
    assert r.status_code == 204 and r.headers["access-control-allow-origin"] == PAGE and r.headers["vary"] == "Origin"
    assert "Authorization" in r.headers["access-control-allow-headers"]
    for origin in ("https://evil.example", "null", PAGE + ".evil.example", PAGE.upper()):
        r = httpx.options(keyed.url + "/v1/chat/completions", headers={"Origin": origin, **asked})
        assert r.status_code == 403 and "access-control-allow-origin" not in r.headers
    r = httpx.get(keyed.url + "/v1/models", headers={"Origin": PAGE, "Authorization": f"Bearer {SECRET}"})
    assert r.headers["access-control-allow-origin"] == PAGE and "access-control-allow-credentials" not in r.headers


def test_without_a_key_only_this_host_and_its_pages_ask(server: Running) -> None:
    for host, code in ((f"127.0.0.1:{server.port}", 200), ("localhost", 200), (f"[::1]:{server.port}", 200),
                       ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("localhost.evil.example", 403),
                       ("2130706433.example", 403), ("", 403)):  # fmt: skip
        assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == code, host
    ours = server.url
    for origin, code in ((ours, 200), ("https://evil.example", 403), ("null", 403), (ours + "0", 403)):
        r = httpx.post(server.url + "/tokenize", json={"content": "a"}, headers={"Origin": origin})
        assert r.status_code == code and "access-control-allow-origin" not in r.headers, origin


def test_answers_say_what_a_browser_may_do_with_them(server: Running) -> None:
    for path in ("/v1/models", "/nothing", "/health"):
        h = httpx.get(server.url + path).headers
        assert h["x-content-type-options"] == "nosniff" and h["x-frame-options"] == "DENY" and "server" not in h
        assert "default-src 'none'" in h["content-security-policy"] and h["cache-control"] == "no-store"
        assert h["x-request-id"] == h["request-id"] and h["request-id"].startswith("req_")
    policy = httpx.get(server.url + "/").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy


def test_what_happens_is_counted(server: Running) -> None:
    def figures() -> dict[str, float]:
        text = server.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(ggmq_\S+) (\S+)$", text, re.M)}

    before = figures()
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 7}
    assert server.post("/v1/chat/completions", **body).status_code == 200
    server.post("/v1/chat/completions")
    httpx.get(server.url + "/nothing/at/all")
    after = figures()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('ggmq_made_tokens_total{model="stories"}') == 7 and grown('ggmq_answers_total{model="stories"}') == 1
    assert grown('ggmq_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert grown('ggmq_requests_total{route="/v1/chat/completions",status="400"}') == 1
    assert grown('ggmq_requests_total{route="other",status="404"}') == 1
    assert grown('ggmq_first_token_seconds_count{model="stories"}') == 1 and after['ggmq_slots{model="stories"}'] == 4
    assert after['ggmq_device_ready{device="CPU",worker="local0"}'] == 1 and after['ggmq_up{model="stories"}'] == 1


@pytest.mark.parametrize(("words", "story"), [
    ("--host 0.0.0.0", "--api-key"), ("--host ::", "--api-key"), ("--host 192.0.2.7", "--api-key"),
    ("--api-key ,", "at least one"),
    ("--cors-origin example.com", "https://example.com"), ("--host 127.0.0.1 --port 1 --api-key-file /none", "no such file"),
    ("-a x -a y", "at most one"), ("-m /none.gguf", "/none.gguf"), ("--port 70000", "65535"),
    ("--host nowhere.invalid", "--host"),
])  # fmt: skip
def test_what_would_be_unsafe_or_cannot_be_is_refused_at_the_start(
    capsys: pytest.CaptureFixture[str], words: str, story: str
) -> None:
    code = main(["serve", *words.split()])
    out, err = capsys.readouterr()
    assert code in (1, 2) and story in err and len(err.splitlines()) == 1 and not out, err


def test_an_address_that_is_taken_is_said_at_once(capsys: pytest.CaptureFixture[str], server: Running) -> None:
    assert main(["serve", "--port", str(server.port)]) == 2
    err = capsys.readouterr().err
    assert "Address already in use" in err and len(err.splitlines()) == 1


def test_several_models_have_names(tmp_path: Path) -> None:
    model = ROOT / "ggmq" / "data" / "stories.gguf"
    with serving("-m", str(model), "-m", str(model), "-a", "first", "--temp", "0", "-np", "1") as running:
        assert [m["id"] for m in running.get("/v1/models").json()["data"]] == ["first", "stories"]
        body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 5}
        answers = [running.post("/v1/chat/completions", model=name, **body) for name in ("first", "stories", "third", "")]
        assert [r.status_code for r in answers] == [200, 200, 404, 404]
        assert answers[0].json()["model"] == "first" and "first, stories" in answers[2].json()["error"]["message"]
        assert answers[2].json()["error"]["code"] == "model_not_found"


def test_names_of_this_host() -> None:
    for name in ("localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost."):
        assert is_loopback(name), name
    for name in ("", "0.0.0.0", "::", "localhost.example", "10.0.0.1", "127.0.0.1.example", "0x7f000001", "127.1"):
        assert not is_loopback(name), name
