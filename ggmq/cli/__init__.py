"""The command line: `ggmq COMMAND`; every command ends with an exit code and never with a traceback.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 130 interrupted, 141 when whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from config.commandline import Parser
from config.installed import module_command, module_environment
from config.interrupts import raise_interrupts
from config.terminal import NO_READER, accept_any_text, flushed, name_output, open_streams, print_line
from ggmq.version import __version__
from protocol.errors import ConfigError, GgmqError, InternalError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `ggmq`. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["worker"]:  # the worker's own process, with the worker's own options
        os.execve(sys.executable, [*module_command("workers"), *argv[1:]], module_environment())
    open_streams()
    accept_any_text()
    name_output()
    raise_interrupts()
    try:
        return _guarded(argv)
    finally:
        for stream in (sys.stdout, sys.stderr):
            flushed(stream)


def _guarded(argv: Sequence[str]) -> int:
    """Run a command; what it raises becomes a line and an exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()  # a full disk may only show itself now
        return code
    except GgmqError as e:
        _say(f"ggmq: {e}")
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("\nggmq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return NO_READER
    except OSError as e:  # a file that cannot be read or written, a full disk: whatever we did, it is the system's answer
        if os.environ.get("GGMQ_DEBUG"):
            raise
        _say(f"ggmq: {f'{e.filename}: ' if e.filename is not None else ''}{e.strerror or e}")
        return 1
    except Exception as e:
        if os.environ.get("GGMQ_DEBUG"):
            raise
        bug = InternalError(f"{type(e).__name__}: {e}; this is a bug of ggmq, run again with GGMQ_DEBUG=1 and report it")
        _say(f"ggmq: {bug}")
        return 1


def _run(argv: Sequence[str]) -> int:
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args))
    except SystemExit as e:  # argparse has printed help, or what was wrong
        return int(e.code or 0)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # where errors cannot be told the exit code has to do
        print_line(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from ggmq.cli import bench, clusters, drain, inspect, keys, logits, models, run, serve, top, trace

    p = Parser(
        prog="ggmq",
        description="Run GGUF language models over all the devices you have.",
        epilog="Start with: ggmq run -p \"Once upon a time\". On other hosts: worker -H 0.0.0.0. "
        "Environment: LLAMA_CACHE moves the caches, GGMQ_KEYS names the cluster key, GGMQ_DEBUG=1 tells more, "
        "GGMQ_PROFILE=1 where the time went.",
    )
    p.add_argument("--version", action="version", version=f"ggmq {__version__}")
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    run.add(commands)
    serve.add(commands)
    commands.add_parser("worker", help="lend devices of this host (the same as the command `worker`)", add_help=False)
    models.add(commands)
    clusters.add(commands)
    drain.add(commands)
    inspect.add(commands)
    keys.add(commands)
    logits.add(commands)
    bench.add(commands)
    trace.add(commands)
    top.add(commands)
    return p


if __name__ == "__main__":
    sys.exit(main())
