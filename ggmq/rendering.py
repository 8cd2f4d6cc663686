"""The process that renders a chat template: `python -I -S rendering.py`, started and ended by `ggmq.chat`.

A template is a program of whoever made the model, so it runs where it can be stopped: memory and processor time are
bounded here, output as it comes, and whoever started the process kills it when it is late. It imports neither the rest of
ggmq nor `site`, so that it is there within a few hundredths of a second.

Standard input and output carry one JSON object a line. The first says the limits, the template and where to import from;
`{"ready": true}` answers it as soon as Jinja is there. Then comes an answer for the template and one for each conversation:
`{"text": ...}`, or `{"failed": ..., "text": ...}` where `failed` is refused, output, memory or depth.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from datetime import datetime
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
    template = None
    while True:
        request = setup if template is None else json.loads(requests.get())
        _limit("RLIMIT_CPU", int(time.process_time()) + setup["max_cpu_s"])
        try:
            if template is None:
                template, text = environment.from_string(setup["template"]), ""
            else:
                text = _render(template, request, setup["max_output_chars"])
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
        if template is None:
            os._exit(1)


class _TooLong(Exception):
    pass


def _environment() -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda f: datetime.now().strftime(f)
    return environment


def _render(template: Any, variables: dict[str, Any], max_chars: int) -> str:
    pieces, n = [], 0
    for piece in template.generate(variables):
        n += len(piece)
        if n > max_chars:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


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
