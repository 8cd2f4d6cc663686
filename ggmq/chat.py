"""Chat templates: the model's own Jinja2 template in a sandbox and in a process of its own, ChatML where it has none."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError, Unavailable

Message = dict[str, Any]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 4_000_000
MAX_MEMORY_BYTES = 512 << 20
MAX_RENDER_S = 5.0
START_S = 60.0
_ANSWER_BYTES = 12 * MAX_OUTPUT_CHARS + 4096
"""What an answer may have in JSON, where a character has up to twelve."""


class ChatTemplate:
    """The template of a model, or that for conversations with tools where a model has one of its own.

    It is parsed and rendered within MAX_RENDER_S, MAX_OUTPUT_CHARS and MAX_MEMORY_BYTES, by a process that is
    kept for the next conversation, started again after a failure, and ended with this object.

    Errors: FormatError when the model's template cannot be parsed, refuses the messages, or leaves those bounds.
    Threads: use from one.
    """

    def __init__(self, vocabulary: Vocabulary, source: str | None = None) -> None:
        self._tokens = {name: vocabulary.decode([i], special=True) if i is not None else ""
                        for name, i in (("bos_token", vocabulary.bos), ("eos_token", vocabulary.eos))}  # fmt: skip
        self._added = {"add_bos": vocabulary.add_bos, "add_eos": vocabulary.add_eos}
        self._where = f"{vocabulary.name}: tokenizer.chat_template"
        self._vocabulary = vocabulary
        self._source = source or vocabulary.chat_template or CHATML
        self._with_tools: ChatTemplate | None = None
        if len(self._source) > MAX_TEMPLATE_CHARS:
            raise FormatError(f"{self._where}: expected at most {MAX_TEMPLATE_CHARS} characters, got {len(self._source)}")
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._unread = bytearray()
        self._start()

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The prompt for a conversation, without the tokens that the vocabulary puts around a text itself.

        `messages`: as OpenAI has them. `content` is a text, a list of parts such as {"type": "text", "text": ...}, or
        None; an answer may have `reasoning_content` and `tool_calls`, and a message with role tool is a call's result.
        `tools`: what may be called, as OpenAI has it; a template that knows of none gets them in the system message.
        `extra`: more variables for the template; those of its own names take the place of ours.
        `continue_final`: the prompt ends within the last message, so that the model goes on with that answer.
        """
        source = self._vocabulary.tool_template if tools else ""
        if source and source != self._source:
            if self._with_tools is None:
                self._with_tools = ChatTemplate(self._vocabulary, source)
            return self._with_tools.render(messages, add_generation_prompt, enable_thinking, tools, extra, continue_final)
        if self._process is None:
            self._start()
        request = {"messages": list(messages), "add_generation_prompt": add_generation_prompt,
                   "enable_thinking": enable_thinking, "tools": list(tools or ()), "extra": dict(extra or {}),
                   "continue_final": continue_final}  # fmt: skip
        return self._ask(request, "refuses the conversation")

    def _start(self) -> None:
        """Start the process and have it parse the template."""
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rendering.py"))]
        # a session of its own: Ctrl-C comes to us, and we end it
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   bufsize=0, start_new_session=True)  # fmt: skip
        self._process, self._end, self._unread = process, weakref.finalize(self, _end, process), bytearray()
        path = [str(Path(__file__).parents[1]), *(p for p in sys.path if p)]
        setup = {"path": path, "template": self._source, "max_output_chars": MAX_OUTPUT_CHARS,
                 "max_memory_bytes": MAX_MEMORY_BYTES, "max_cpu_s": int(MAX_RENDER_S) + 1,
                 **self._tokens, **self._added}  # fmt: skip
        try:
            _send(process, setup)
            ready = "ready" in _receive(process, self._unread, START_S)
        except (BrokenPipeError, TimeoutError, ValueError):
            ready = False
        except BaseException:
            self._stop()
            raise
        if not ready:
            self._stop()
            raise Unavailable(f"{self._where}: the process that renders it did not start: {' '.join(command)}")
        self._ask(None, "cannot be parsed")

    def _ask(self, request: dict[str, Any] | None, refused: str) -> str:
        """The answer to a request, or, for None, to the one that the process began with. After a failure it is gone."""
        process = self._process
        assert process is not None  # _start comes first
        try:
            if request is not None:
                _send(process, request)
            answer = _receive(process, self._unread, MAX_RENDER_S)
        except TimeoutError:
            answer = {"failed": "time"}
        except (BrokenPipeError, ValueError):  # it ended without a word, or with half of one
            answer = {"failed": _cause(process)}
        except BaseException:  # Ctrl-C ends the template, not just the waiting
            self._stop()
            raise
        failed, text = answer.get("failed"), answer.get("text", "")
        if failed is None:
            return str(text)
        if failed != "refused" or request is None:
            self._stop()
        story = {
            "time": f"took longer than {MAX_RENDER_S:g} s",
            "output": f"made more than {MAX_OUTPUT_CHARS} characters",
            "memory": f"needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory",
            "depth": "nests too deep",
            "refused": f"{refused}: {text}",
        }.get(failed, f"ended the process that rendered it: {failed}")
        raise FormatError(f"{self._where} {story}; use no template with --raw, or a model with another one")

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None  # both were asked for
        pipe.close()
    process.wait()


def _cause(process: subprocess.Popen[bytes]) -> str:
    """What ended the process: the bound of processor time, or something else."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it answered with something else"
    return "time" if code == -signal.SIGXCPU else f"code {code}"


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    """Between two answers the process does nothing but read, so this does not wait for a template."""
    assert process.stdin is not None  # a pipe was asked for
    left = memoryview(json.dumps(request).encode("ascii") + b"\n")
    while left:
        left = left[process.stdin.write(left) :]


def _receive(process: subprocess.Popen[bytes], unread: bytearray, within_s: float) -> dict[str, Any]:
    """The next answer; what came after it stays in `unread`.

    Errors: TimeoutError; ValueError when the process ended, or said something that is no answer.
    """
    assert process.stdout is not None  # a pipe was asked for
    due, end = time.monotonic() + within_s, unread.find(b"\n")
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while end < 0:
        if not poll.poll(max(0.0, due - time.monotonic()) * 1000):
            raise TimeoutError
        piece, n = os.read(process.stdout.fileno(), 1 << 16), len(unread)
        unread += piece
        if not piece or len(unread) > _ANSWER_BYTES:
            raise ValueError("no answer")
        end = unread.find(b"\n", n)
    line = bytes(unread[:end])
    del unread[: end + 1]
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("no answer")
    return answer
