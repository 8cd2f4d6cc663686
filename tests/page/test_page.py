"""The page in a real Chromium, against a real server with two workers: what a person does with it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.page.browser import KEY, browsing, chromium, serious_faults, visiting
from tests.support.fixtures import free_port
from tests.support.processes import children_of
from tests.support.serving import Running, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHORT = {"max_tokens": 24, "temperature": 0}
WORDS = "Once upon a time"
EXAMPLE = """Walk both lists at once and take the smaller head each time:

```python
def merge(a: list[int], b: list[int]) -> list[int]:
    \"\"\"Merge two sorted lists in one pass.\"\"\"
    i = j = 0
    merged = []
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:  # ties keep the left one first
            merged.append(a[i])
            i += 1
        else:
            merged.append(b[j])
            j += 1
    return merged + a[i:] + b[j:]
```

It is **linear** in time. `heapq.merge` does the same lazily:

| way | time | memory |
|---|---|---|
| two pointers | O(n + m) | O(n + m) |
| `heapq.merge` | O(n + m) | O(1) |

- [x] equal items keep their order
"""
# no answer ends by itself, so that there is one to stop
OPTIONS = ("--workers", "2", "-np", "2", "-c", "16384", "--ignore-eos", "--api-key", KEY)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as started:
        yield started


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    chromium()
    with serving(*OPTIONS) as running:
        yield running.url


def answer(*deltas: dict[str, str], reason: str = "stop") -> str:
    """A stream with text that a model might be led to write."""
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def test_a_conversation_is_streamed_kept_edited_and_answered_again(browser: Browser, url: str) -> None:
    with visiting(browser, url) as v:
        v.settle(**SHORT)
        assert v.page.locator("#empty-model").inner_text() == "stories"
        assert "4 layers on 2 devices" in v.page.locator("#empty").inner_text()
        v.say(WORDS)
        first = v.answered(1)
        assert len(first) > 20 and "24 tokens" in v.page.locator(".facts").last.inner_text()
        assert "of 16,384 tokens" in v.page.locator("#meter").inner_text()
        v.say("And then?")
        second = v.answered(2)
        v.page.reload()
        assert v.answered(2) == second
        assert v.page.locator(".conversation .title").all_inner_texts() == [WORDS]
        v.page.get_by_label("Another answer").last.click()
        v.page.wait_for_selector(".versions >> text=2/2")
        assert v.answered(2) == second  # greedy: the same
        v.page.hover(".from-user")
        v.page.get_by_label("Edit message").first.click()
        v.page.get_by_label("Edited text").fill("A cat")
        v.page.get_by_label("Edited text").press("Control+Enter")
        v.answered(1)
        assert v.page.locator(".from-user .plain").all_inner_texts() == ["A cat"]
        v.page.hover(".from-user")
        v.page.get_by_label("Earlier version").first.click()
        assert v.answered(2) == second


def test_escape_stops_an_answer_and_a_reader_who_scrolls_up_is_left_alone(browser: Browser, url: str) -> None:
    with visiting(browser, url) as v:
        v.settle(temperature=1)
        v.say(WORDS)
        scrolled = "() => document.querySelector('#thread').scrollTop"
        v.page.wait_for_function("() => document.querySelector('#thread').scrollTop > 300")  # it follows
        v.page.hover("#thread")
        v.page.mouse.wheel(0, -200)
        v.page.wait_for_selector("#latest:not([hidden])")
        v.page.wait_for_timeout(300)  # the wheel's own movement is over
        top = v.page.evaluate(scrolled)
        length = v.page.locator(".from-assistant .body").inner_text()
        longer = "n => document.querySelector('.from-assistant .body').innerText.length > n"
        v.page.wait_for_function(longer, arg=len(length) + 200)
        assert v.page.evaluate(scrolled) == top
        v.page.keyboard.press("Escape")
        v.page.wait_for_selector(".facts .end >> text=stopped")
        v.page.wait_for_selector("#send[aria-label=Send]")
        v.page.click("#to-cluster")
        v.page.wait_for_selector(".slot.is-idle >> nth=1")  # both: the slot is free again


def test_what_a_model_writes_cannot_run_load_or_leave(browser: Browser, url: str) -> None:
    text = """<img src=x onerror="document.title='bad'"> <script>document.title='bad'</script><style>*{display:none}</style>

![look](http://192.0.2.1/a.png) [run](javascript:document.title='bad') [data](data:text/html,x)
[fine](https://example.org/) <iframe src="https://example.org"></iframe> <svg onload="document.title='bad'"></svg>
<form action="https://example.org"></form>

```html
<b onclick="document.title='bad'">code</b>
```
"""
    with visiting(browser, url) as v:
        v.page.route("**/v1/chat/completions", lambda r: r.fulfill(content_type="text/event-stream", body=answer(
            {"reasoning_content": text}, *({"content": piece} for piece in text.partition("](java")))))  # fmt: skip
        v.say("show me")
        v.answered(1)
        v.page.click(".reasoning summary")
        v.page.wait_for_selector(".reasoning .code")
        message = v.page.locator(".from-assistant")
        forbidden = "img, script, style, iframe, svg:not(.icon), form, [onclick], [onerror], [style]"
        assert message.locator(forbidden).count() == 0
        assert "<img src=x onerror=" in message.locator("> .body").inner_text()
        facts = "all => all.map(a => [a.getAttribute('href'), a.target, a.rel])"
        links = message.locator("> .body a[href]").evaluate_all(facts)
        assert [href for href, _, _ in links] == ["http://192.0.2.1/a.png", "https://example.org/"]
        assert all(target == "_blank" and "noopener" in rel for _, target, rel in links)
        assert "bad" not in v.page.title()


def test_text_that_grows_looks_as_it_does_when_it_is_whole(browser: Browser, url: str) -> None:
    texts = [
        "# One\n\nfirst *two*\nlines\n\n- a\n- b\n\n  still b\n\n1. x\n\n   ```py\n   def f(): pass\n   ```\n2. y\n\nend",
        "a | b\n---|---\n1 | `2`\n\n> quoted\n> more\n\nsee [this] and [that][x]\n\n"
        '[this]: https://example.org/\n[x]: https://example.com/ "t"',
        "```python\n# not a heading\n\nx = 1\n```\n\ntext\n====\n\n~~~\nopen fence\n\n* not a list",
        "\n\n  lead\r\n\r\n***\n\n<details>\n\n**in**\n\n</details>\n\nend",
    ]  # fmt: skip
    script = """async (texts) => {
      const { Growing } = await import("/web/markdown.js");
      const differ = [];
      for (const text of texts) {
        const made = [1, 3, 7, text.length].map((step) => {
          const growing = new Growing(document.createElement("div"));
          for (let n = step; n < text.length; n += step) growing.show(text.slice(0, n));
          growing.show(text);
          growing.finish();
          return growing.place.innerText + growing.place.querySelectorAll("*").length;
        });
        if (new Set(made).size !== 1) differ.push(made);
      }
      return differ;
    }"""
    with visiting(browser, url) as v:
        assert v.page.evaluate(script, texts) == []


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [(429, {"Retry-After": "1"}, "The server is full"), (503, {}, "The cluster cannot answer"), (400, {}, "Refused (400)"),
     (0, {}, "No connection")],
)  # fmt: skip
def test_a_refusal_is_explained_and_can_be_tried_again(
    browser: Browser, url: str, status: int, headers: dict[str, str], says: str
) -> None:
    with visiting(browser, url) as v:
        v.settle(**SHORT)
        body = json.dumps({"error": {"message": "the reason", "type": "x", "code": "y"}})
        handler = (lambda r: r.fulfill(status=status, headers=headers, body=body)) if status else (lambda r: r.abort())
        v.page.route("**/v1/chat/completions", handler)
        v.say(WORDS)
        problem = v.page.locator(".problem")
        problem.wait_for()
        assert says in problem.inner_text() and (not status or "the reason" in problem.inner_text())
        v.page.unroute("**/v1/chat/completions")
        v.page.click(".problem button:has-text('Try again'):not(:disabled)")
        assert len(v.answered(1)) > 20
        assert problem.count() == 0


def test_an_answer_that_breaks_off_is_kept_and_what_got_none_goes_with_the_next(browser: Browser, url: str) -> None:
    with visiting(browser, url) as v:
        bodies: list[Any] = []

        def broken(route: Any) -> None:
            bodies.append(route.request.post_data_json)
            error = json.dumps({"error": {"message": "worker desk0 is lost", "type": "unavailable_error"}})
            begun = answer({"content": "so far"}).partition('data: {"choices": [{"index": 0, "delta": {}')[0]
            route.fulfill(content_type="text/event-stream", body=begun * (len(bodies) > 1) + f"data: {error}\n\n")

        v.page.route("**/v1/chat/completions", broken)
        v.say("One")
        v.page.wait_for_selector(".problem >> text=worker desk0 is lost")
        assert v.page.locator(".from-assistant").count() == 0
        v.say("Two")
        assert v.answered(1) == "so far"
        v.page.wait_for_selector(".facts .end >> text=broken off")
        assert "The cluster cannot answer now" in v.page.locator(".problem").inner_text()
        assert bodies[1]["messages"] == [{"role": "user", "content": "One\n\nTwo"}]


def test_without_a_key_the_page_asks_for_it(browser: Browser, url: str) -> None:
    with visiting(browser, url, key="") as v:
        v.page.wait_for_selector("#banner >> text=asks for a key")
        v.page.evaluate("localStorage.setItem('ggmq.settings', JSON.stringify({max_tokens: 8}))")
        v.page.reload()
        v.say(WORDS)
        v.page.get_by_placeholder("API key").fill(KEY)
        v.page.get_by_placeholder("API key").press("Enter")
        assert v.answered(1)
        v.page.wait_for_selector("#banner", state="hidden")
        assert v.page.evaluate("[sessionStorage.getItem('ggmq.key'), localStorage.getItem('ggmq.key')]") == [KEY, None]


def test_tabs_do_not_lose_what_the_others_write(browser: Browser, url: str) -> None:
    with visiting(browser, url) as v:
        v.settle(**SHORT)
        v.say(WORDS)
        v.answered(1)
        other = v.open("/" + v.page.evaluate("location.hash"))
        v.answered(1, other)
        v.page.fill("#field", "The first tab")
        other.fill("#field", "The second tab")
        for page in (v.page, other):
            page.press("#field", "Enter", no_wait_after=True)
        v.page.wait_for_function("""async () => {
          const store = await import("/web/store.js");
          const [head] = await store.list();
          const nodes = Object.values((await store.load(head.id)).nodes);
          window.said = nodes.filter((node) => node.role === "user").map((node) => node.content);
          return nodes.filter((node) => node.ended === "length").length === 3;
        }""")
        assert set(v.page.evaluate("said")) == {WORDS, "The first tab", "The second tab"}


def test_conversations_are_found_renamed_deleted_exported_and_imported(browser: Browser, url: str, tmp_path: Path) -> None:
    with visiting(browser, url) as v:
        v.settle(**SHORT)
        v.say("Once a dragon")
        v.answered(1)
        v.page.keyboard.press("Alt+n")
        v.say("Once a <b>bear</b>")
        said = v.answered(1)
        titles = v.page.locator(".conversation .title")
        assert set(titles.all_inner_texts()) == {"Once a dragon", "Once a <b>bear</b>"}
        v.page.fill("#search", "bear once")
        v.page.wait_for_function("() => document.querySelectorAll('.conversation').length === 1")
        v.page.hover(".conversation")
        v.page.get_by_label("Rename Once a <b>bear</b>").click()
        v.page.get_by_label("Title").fill("Grizzly")
        v.page.get_by_label("Title").press("Enter")
        v.page.wait_for_selector(".title >> text=Grizzly")
        v.page.fill("#search", "")
        v.page.wait_for_function("() => document.querySelectorAll('.conversation').length === 2")
        v.page.keyboard.press("Alt+s")
        with v.page.expect_download() as markdown:
            v.page.click("#export-markdown")
        text = Path(markdown.value.path()).read_text()
        assert text.startswith("# Grizzly\n\n## You\n\nOnce a <b>bear</b>\n\n## stories\n\n")
        with v.page.expect_download() as saved:
            v.page.click("#export-all")
        file = tmp_path / "all.json"
        saved.value.save_as(file)
        v.page.click("#remove-all")
        v.page.click("dialog.small .danger")
        v.page.wait_for_function("() => document.querySelectorAll('.conversation').length === 0")
        assert v.page.locator("#empty").is_hidden() is False
        (broken := tmp_path / "broken.json").write_text(file.read_text().replace('"role": "user"', '"role": "root"', 1))
        v.page.set_input_files("#import", broken)
        v.page.wait_for_selector("#imported >> text=role: expected system, user or assistant")
        v.page.set_input_files("#import", file)
        v.page.wait_for_selector("#imported >> text=2 conversations imported")
        v.page.keyboard.press("Escape")
        v.page.click(".title >> text=Grizzly")
        assert v.answered(1) == said


def test_all_of_it_is_reached_by_keys(browser: Browser, url: str) -> None:
    with visiting(browser, url) as v:
        v.settle(**SHORT)
        v.say(WORDS)
        v.answered(1)
        reached, page = set(), v.page
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("(e => e.id || e.getAttribute('aria-label'))(document.activeElement)"))
        assert {"new", "search", "open-settings", "theme", "open-help", "to-chat", "to-cluster", "thread", "field",
                "Copy answer", "Another answer", "Edit answer", "Edit message", f"Delete {WORDS}"} <= reached  # fmt: skip
        page.keyboard.press("Alt+s")
        assert page.locator("#settings").is_visible()
        assert page.evaluate("document.activeElement.closest('dialog').id") == "settings"
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+h")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+c")
        page.wait_for_selector("#cluster:not([hidden])")
        page.keyboard.press("Alt+c")
        page.wait_for_selector("#chat:not([hidden])")
        page.keyboard.press("Alt+e")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edited text"
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+r")
        page.wait_for_selector(".versions >> text=2/2")
        v.answered(1)
        said = page.locator("#announcer")
        page.wait_for_function("() => document.querySelector('#announcer').textContent.startsWith('Answer: ')")
        assert said.get_attribute("aria-live") == "polite" and page.locator("#thread [aria-live]").count() == 0


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_view_has_a_serious_fault_of_accessibility_or_is_wider_than_the_screen(
    browser: Browser, url: str, phone: bool, dark: bool
) -> None:
    with visiting(browser, url, phone=phone, dark=dark) as v:

        def look(view: str) -> None:
            v.page.wait_for_timeout(250)  # a dialog or a list has come in
            assert serious_faults(v.page) == [], view
            wide = "e => e.filter(e => e.scrollWidth > e.clientWidth).length"
            assert v.page.locator("html, #thread, .cluster-scroll").evaluate_all(wide) == 0, view
            if folder := os.environ.get("GGMQ_SHOTS"):
                name = f"{'phone' if phone else 'desktop'}-{'dark' if dark else 'light'}-{view}.png"
                v.page.screenshot(path=Path(folder) / name)

        v.page.wait_for_selector("#empty-cluster .strip")
        look("empty")
        v.page.route("**/v1/chat/completions", lambda r: r.fulfill(content_type="text/event-stream", body=answer(
            {"reasoning_content": "Two pointers, one pass.\n\n- ties keep the left one first"},
            {"content": EXAMPLE})))  # fmt: skip
        v.say("Write a Python function that merges two sorted lists.")
        v.answered(1)
        v.page.click(".reasoning summary")
        v.page.wait_for_selector(".code .hljs-keyword")
        look("conversation")
        v.page.unroute("**/v1/chat/completions")
        v.page.route("**/v1/chat/completions", lambda r: r.fulfill(status=429, headers={"Retry-After": "9"}, body="{}"))
        v.say("again")
        v.page.wait_for_selector(".problem")
        look("problem")
        v.page.keyboard.press("Alt+s")
        look("settings")
        v.page.keyboard.press("Escape")
        v.page.keyboard.press("Alt+h")
        look("help")
        v.page.keyboard.press("Escape")
        if phone:
            v.page.click("#menu")
            look("list")
            v.page.keyboard.press("Escape")
        v.page.click("#to-cluster")
        v.page.wait_for_selector(".slot")
        look("cluster")


def workers_of(running: Running) -> list[int]:
    """Processes of the workers, in the order of their names."""
    found = {}
    for pid in children_of(running.process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--name" in words:
            found[words[words.index("--name") + 1]] = pid
    return [pid for _, pid in sorted(found.items())]


def test_the_cluster_view_follows_a_worker_that_is_killed_and_a_server_that_goes_and_comes_back(
    browser: Browser, record_property: Any
) -> None:
    chromium()
    port = str(free_port())
    with serving(*OPTIONS, "--port", port) as running, visiting(browser, running.url) as v:
        v.settle(**SHORT)
        v.page.click("#to-cluster")
        v.page.wait_for_selector("[data-state=ready] >> nth=1")
        assert "layers 0–1" in v.page.locator("[data-worker=local0]").inner_text()
        v.page.evaluate("""() => {
          new MutationObserver(() => {
            if (document.querySelector('[data-state=lost]')) window.lostAt ??= Date.now();
          }).observe(document.querySelector('#hosts'), {childList: true, subtree: true});
        }""")
        killed = time.time()
        os.kill(workers_of(running)[1], signal.SIGKILL)
        v.page.wait_for_selector("[data-worker=local1][data-state=lost]", timeout=10_000)
        red_after_s = v.page.evaluate("window.lostAt") / 1000 - killed
        record_property("red_after_s", round(red_after_s, 2))
        print(f"a killed worker is red after {red_after_s:.2f} s")
        assert red_after_s < 10
        v.page.wait_for_selector("#banner >> text=local1")
        colour = v.page.locator("[data-worker=local1]").evaluate("e => getComputedStyle(e).borderTopColor")
        assert colour == "rgb(176, 36, 29)"
        if folder := os.environ.get("GGMQ_SHOTS"):
            v.page.screenshot(path=Path(folder) / "killed.png")
        running.process.send_signal(signal.SIGINT)
        running.process.wait(20)
        v.page.wait_for_selector("#banner >> text=No connection to the server")
        assert "as it was at" in v.page.locator("#cluster h1").inner_text()
        assert serious_faults(v.page) == []
        with serving(*OPTIONS, "--port", port):
            v.page.wait_for_selector("#banner", state="hidden")
            v.page.wait_for_selector("html[data-connected=true]")
            v.page.click("#to-chat")
            v.say(WORDS)
            assert v.answered(1)
