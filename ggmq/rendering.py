"""The process that renders a chat template: `python -I -S rendering.py`, started and ended by `ggmq.chat`.

A template is a program of whoever made the model, so it runs where it can be stopped: memory and processor time are
bounded here, output as it comes, and whoever started the process kills it when it is late. Of ggmq it imports `messages`
alone, and no `site`, so that it is there within a few hundredths of a second.

Standard input and output carry one JSON object a line. The first says the limits, the template and where to import from;
`{"ready": true}` answers it as soon as Jinja is there. Then comes an answer for the template and one for each conversation:
`{"text": ...}`, or `{"failed": ..., "text": ...}` where `failed` is refused, output, memory or depth.
"""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import threading
import time
from functools import partial
from typing import Any, NoReturn

MAX_REASON_CHARS = 1000


def main() -> NoReturn:
    setup = json.loads(sys.stdin.buffer.readline())
    sys.path += setup["path"]
    environment = _environment()
    _answer({"ready": True})
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_AS", setup["max_memory_bytes"])
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    model = None
    while True:
        request = setup if model is None else json.loads(requests.get())
        _limit("RLIMIT_CPU", int(time.process_time()) + setup["max_cpu_s"])
        try:
            if model is None:
                model, text = _Model(environment, setup), ""
            else:
                text = model.render(request)
            _answer({"text": text})
        except MemoryError:
            os.write(1, b'{"failed": "memory", "text": ""}\n')
            os._exit(1)  # what is left of the memory is no place to go on
        except RecursionError:
            _answer({"failed": "depth", "text": ""})
        except _TooLong:
            _answer({"failed": "output", "text": ""})
        except SyntaxError as e:  # of the Python that Jinja made: it bounds how deep blocks nest
            _answer({"failed": "depth" if "nested" in str(e) else "refused", "text": str(e)[:MAX_REASON_CHARS]})
        except Exception as e:
            _answer({"failed": "refused", "text": str(e)[:MAX_REASON_CHARS] or type(e).__name__})
        if model is None:
            os._exit(1)


class _TooLong(Exception):
    pass


# -- what a template may use -------------------------------------------------------------------------------------------


def _environment() -> Any:
    """Jinja as llama.cpp's own engine has it, where the two differ and templates depend on it."""
    import jinja2
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import SandboxedEnvironment

    from ggmq.messages import SPACES, WatchedParts, WatchedText

    strips = {"strip": lambda s, chars=None: str(s).strip(SPACES if chars is None else chars),
              "lstrip": lambda s, chars=None: str(s).lstrip(SPACES if chars is None else chars),
              "rstrip": lambda s, chars=None: str(s).rstrip(SPACES if chars is None else chars)}  # fmt: skip

    class Generation(Extension):
        """`{% generation %}`: what a model is trained on. It means nothing here, and opens no scope."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    class Generator(CodeGenerator):
        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
            self.write("environment.joined((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Environment(SandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset({"+"})
        joined = staticmethod(_joined)

        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, str) and attribute in strips:
                return partial(strips[attribute], str(obj))
            if isinstance(obj, jinja2.Undefined) and attribute == "items":
                return tuple
            return super().getattr(obj, attribute)

        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
        missing = value is None or isinstance(value, jinja2.Undefined)
        return default_value if missing or (boolean and not value) else value

    def items(value: Any) -> Any:
        return () if value is None or isinstance(value, jinja2.Undefined) else value.items()

    def plus(left: Any, right: Any) -> Any:
        """A text plus something else is as if they were joined."""
        plain = (str, int, float, list, tuple, dict, type(None), jinja2.Undefined)
        if isinstance(left, str) != isinstance(right, str) and isinstance(left, plain) and isinstance(right, plain):
            return _joined((left, right))
        return left + right

    def is_string(value: Any) -> bool:
        if isinstance(value, (WatchedText, WatchedParts)):
            value.tested = True
        return isinstance(value, str)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation],
                              undefined=jinja2.ChainableUndefined, finalize=_printed)  # fmt: skip
    environment.binop_table = environment.binop_table | {"+": plus}
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda f: time.strftime(f, time.localtime())}
    environment.filters |= {"tojson": _to_json, "default": default, "d": default, "trim": strips["strip"],
                            "items": items, "safe": lambda value: value}  # fmt: skip
    # Jinja's own test would begin to iterate, which in a trial says that a text is taken for a list
    environment.tests |= {"string": is_string, "iterable": lambda value: hasattr(value, "__iter__")}
    return environment


def _printed(value: Any) -> str:
    """What `{{ value }}` prints. None, mappings and functions print nothing, lists and the like what is in them."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        text = f"{value:.6f}".rstrip("0")
        return text + "0" if text.endswith(".") else text
    if isinstance(value, (bool, int)):
        return str(value)
    return "" if isinstance(value, dict) or not hasattr(value, "__iter__") else "".join(map(_printed, value))


def _joined(parts: Any) -> str:
    """What `~` makes: None is nothing."""
    return "".join("" if x is None else _printed(x) if isinstance(x, float) else str(x) for x in parts)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """JSON for a prompt: nothing is escaped for HTML, keys keep their order, numbers have six digits."""
    comma, colon = separators or (", " if indent is None else ",", ": ")

    def write(value: Any, outer: str) -> str:
        if isinstance(value, str):
            return json.dumps(str(value), ensure_ascii=ensure_ascii)
        if isinstance(value, (bool, int)):
            return json.dumps(value)
        if isinstance(value, float):
            return f"{value:g}"
        inner = outer + " " * (indent or 0)
        first, between, last = ("", comma, "") if indent is None else ("\n" + inner, comma + "\n" + inner, "\n" + outer)
        if isinstance(value, dict):
            pairs = sorted(value.items()) if sort_keys else value.items()
            parts = [write(str(k), inner) + colon + write(v, inner) for k, v in pairs]
            return "{" + first + between.join(parts) + last + "}" if parts else "{}"
        if isinstance(value, (list, tuple)):
            parts = [write(v, inner) for v in value[:]]
            return "[" + first + between.join(parts) + last + "]" if parts else "[]"
        return "null"

    return write(value, "")


# -- a template --------------------------------------------------------------------------------------------------------


class _Model:
    """A template with what is known of it: the tokens around a prompt, and after the first trials what it takes."""

    def __init__(self, environment: Any, setup: dict[str, Any]) -> None:
        self.source = source = setup["template"]
        self.max_chars = setup["max_output_chars"]
        self.bos, self.eos = setup["bos_token"], setup["eos_token"]
        self.adds_bos, self.adds_eos = setup["add_bos"], setup["add_eos"]
        self.opens_turn = "'<|tool_call>call:'" in source
        for marker, check in _CHECKS:
            if marker in source:
                source = re.sub(check, "{%- if false %}", source)
        self.template = environment.from_string(source)
        self.forms: Any = None
        self.thoughts: tuple[str, str] | None = None

    def render(self, request: dict[str, Any]) -> str:
        from ggmq.messages import Forms, tools_as_given

        if self.forms is None:
            self.forms = Forms(self.source, self._trial)
        tools = tools_as_given(request["tools"])
        messages, extra = request["messages"], request["extra"]
        final = messages[-1] if request["continue_final"] and messages else None
        messages = self.forms.prepared(messages[:-1] if final else messages, tools)
        now = time.localtime()
        variables = {
            "bos_token": self.bos, "eos_token": self.eos,
            "enable_thinking": request["enable_thinking"], "preserve_reasoning": True,
            "datetime": time.strftime("%b %d %Y", now), "date_string": time.strftime("%d %b %Y", now),
        } | extra  # fmt: skip
        keeps = variables["preserve_reasoning"]
        if isinstance(keeps, bool):
            variables = {"preserve_thinking": keeps, "clear_thinking": not keeps, "truncate_history_thinking": not keeps,
                         "drop_thinking": not keeps} | variables  # fmt: skip
        if variables.get("reasoning_effort"):
            variables = {"reasoning_strength": variables["reasoning_effort"]} | variables
        if tools:
            variables["tools"] = tools
        if final is None:
            return self._prompt(messages, variables, request["add_generation_prompt"])
        return self._continued(messages, variables, final)

    def _prompt(self, messages: list[dict[str, Any]], variables: dict[str, Any], prompt: bool) -> str:
        text = self._generate({"messages": messages} | variables | ({"add_generation_prompt": True} if prompt else {}))
        if self.adds_bos:
            text = text.removeprefix(self.bos)
        if self.adds_eos:
            text = text.removesuffix(self.eos)
        if self.forms.channels and not prompt:
            text = "<|end|>".join(text.rsplit("<|return|>", 1))
        if self.opens_turn and prompt and text.endswith("<turn|>\n"):
            text += "<|turn>model\n"
        return text

    def _continued(self, messages: list[dict[str, Any]], variables: dict[str, Any], final: dict[str, Any]) -> str:
        """A prompt that ends within the last answer: after its content, or after its thoughts where there is no content."""
        from ggmq.messages import as_text

        text, opened = (self._prompt(messages, variables, prompt) for prompt in (False, True))
        same = next((i for i, (a, b) in enumerate(zip(text, opened, strict=False)) if a != b), min(len(text), len(opened)))
        opening = opened[same:]
        thoughts, content = final.get("reasoning_content") or "", as_text(final.get("content") or "", "\n\n")
        begin, end = self._markers_of_thoughts()
        if begin:
            opening = opening.partition(begin.strip())[0] + begin + thoughts
        if content or not thoughts:
            opening += end + ("all\n" if opening.endswith(">>>") else "") + content
        return text + opening

    def _markers_of_thoughts(self) -> tuple[str, str]:
        """What stands before and after the thoughts of an answer; nothing where the template shows none."""
        if self.thoughts is None and self.forms.channels:
            self.thoughts = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")
        elif self.thoughts is None:
            talk = [{"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "SAID", "reasoning_content": "THOUGHT"}]  # fmt: skip
            before, _, after = (self._trial(self.forms.prepared(talk, []), [], prompt=False) or "").partition("THOUGHT")
            begin = re.search(r"(<[^<>]+>|\[[^\[\]]+\])\s*$", before)
            end = re.match(r"\s*(<[^<>]+>|\[[^\[\]]+\])\s*(?=SAID)", after)
            known = next((pair for pair in _THOUGHTS if all(x.strip() in self.source for x in pair)), ("", ""))
            self.thoughts = (begin[0], end[0]) if begin and end else known
        return self.thoughts

    def _trial(self, messages: list[dict[str, Any]], tools: list[Any], prompt: bool = True) -> str | None:
        """What comes of messages; None when the template refuses them."""
        try:
            variables = {"messages": messages, "tools": tools, "bos_token": "", "eos_token": ""}
            return self._generate(variables | ({"add_generation_prompt": True} if prompt else {}))
        except MemoryError:
            raise
        except Exception:
            return None

    def _generate(self, variables: dict[str, Any]) -> str:
        pieces, n = [], 0
        for piece in self.template.generate(variables):
            n += len(piece)
            if n > self.max_chars:
                raise _TooLong
            pieces.append(piece)
        return "".join(pieces)


_THOUGHTS = (("<think>", "</think>"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("[THINK]", "[/THINK]"),
             ("<|channel>thought\n", "<channel|>"))  # fmt: skip
"""What stands around thoughts in templates that leave out those of earlier answers."""
_CHECKS = (
    ("<|channel|>", r"\{%-? if [^%]* in message\.content or [^%]* in message\.content -?%\}"),
    ("[TOOL_CALLS]", r"\{%-? if \(message\['content'\] is none or [^%]*message\['tool_calls'\]\|length == 0\) -?%\}"),
)
"""Where templates refuse an answer that is empty or has channels in it, which a chat may well hold."""


def _read(requests: queue.SimpleQueue[bytes]) -> None:
    """In a thread, so that the process ends in the middle of a template when whoever started it has gone."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def _limit(name: str, value: int) -> None:
    """Set a limit of this process, where the system has it; one that is lower already stays."""
    try:
        import resource
    except ImportError:
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError):  # a system that knows the name and does not do it: time is bounded from outside too
        pass


if __name__ == "__main__":
    main()
