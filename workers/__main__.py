"""`worker`: lends a device of this host. One process a device; see `worker --help`."""

from __future__ import annotations

import argparse
import errno
import os
import re
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from config.auth import find_keys
from config.commandline import Parser
from config.cores import n_cores
from config.installed import module_command
from config.keys import KeyPair, default_key_file, require
from config.roles import Role
from config.running import own_cluster_id
from config.terminal import (
    NO_READER,
    OUTPUT,
    accept_any_text,
    flushed,
    name_output,
    open_streams,
    print_line,
    stamp_lines,
)
from protocol.errors import ConfigError, GgmqError
from protocol.messages import DeviceInfo
from workers.cache import DEFAULT_QUOTA_BYTES, Cache, ModelFolder, default_folder
from workers.devices import accelerators, open_device
from workers.devices.base import Device

SOFTWARE = "ggmq 0.1.0"
MIB = 1 << 20
DEFAULT_PORT = 50052
LIST = "\0list"
SPIN_US = 1000


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="worker",
        description="Lend devices of this host to a main host that runs `ggmq run --rpc HOST:PORT`.",
        epilog="Environment: CUDA_VISIBLE_DEVICES limits the devices; LLAMA_CACHE moves the cache; GGMQ_DEBUG=1 "
        "(or GGML_RPC_DEBUG=1) prints each message; GGMQ_PROFILE=1 prints at the end where the time went; GGMQ_KEYS names "
        "the cluster key.",
    )
    p.add_argument("-H", "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    p.add_argument("-p", "--port", type=_port, help=f"port (default {DEFAULT_PORT}; 0 picks one); with --broker the one on "
                   "which other workers hand activations over (default: any)")  # fmt: skip
    p.add_argument("-t", "--threads", type=_positive, default=0, help="CPU threads (default: all cores)")
    p.add_argument("--cpus", type=_cpus, default=[], metavar="0,2-5", help="keep each thread on one of these CPUs")
    p.add_argument("--spin-us", type=_microseconds, default=SPIN_US if n_cores() > 1 else 0, metavar="US",
                   help="after a graph, look for the next one for so long before sleeping; 0 where several workers share "
                   "few cores (default %(default)s)")  # fmt: skip
    p.add_argument("-d", "--device", nargs="?", const=LIST, metavar="NAME[,NAME]",
                   help="devices to lend: CPU, reference, CUDA0, ... (default: all accelerators, else one CPU); "
                   "without a name: list them and end")  # fmt: skip
    p.add_argument("-m", "--mem", type=_positive, default=0, metavar="MIB", help="lend at most this much memory")
    p.add_argument("--keep", type=_seconds, default=0, metavar="SECONDS",
                   help="weights of a run that ended stay in memory for so long, unless they must make room, and "
                   "the next run loads nothing (default 0: they are freed; `ggmq up` gives its workers 300)")  # fmt: skip
    p.add_argument("-c", "--cache", action="store_true", help="keep weights in a local cache")
    p.add_argument("--cache-dir", type=Path, help=f"where (default {default_folder()})")
    p.add_argument("--cache-quota", type=_positive, default=DEFAULT_QUOTA_BYTES // MIB, metavar="MIB",
                   help="bound of the cache (default %(default)s)")  # fmt: skip
    p.add_argument("--model-dir", type=Path, metavar="DIR",
                   help="folder with GGUF files: weights of a file that is here too are read from it")  # fmt: skip
    p.add_argument("--broker", metavar="ENDPOINT", help="dial in to a broker (tcp://HOST:PORT) instead of listening")
    p.add_argument("--keys", type=Path, help="cluster key file, or with --broker a worker's own (default "
                   f"{default_key_file()}, if it is there)")  # fmt: skip
    p.add_argument("--insecure", action="store_true", help="no encryption, no authentication, on any address")
    p.add_argument("--parent-pid", type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument("--join", help=argparse.SUPPRESS)
    p.add_argument("--instance", default="", help=argparse.SUPPRESS)
    p.add_argument("--name", default="", help="what the main host calls this worker (default: its address)")
    p.add_argument("--tag", default="", help=argparse.SUPPRESS)
    p.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--log-timestamps", action="store_true", help="begin each line with the time")
    p.add_argument("--version", action="version", version=SOFTWARE)
    return p


def _positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _cpus(text: str) -> list[int]:
    """CPU numbers and ranges, as taskset and cgroups write them."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise argparse.ArgumentTypeError(f"expected CPU numbers such as 0,2-5, got {text!r}")
    ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    out = [n for part in ends for n in range(part[0], part[-1] + 1)]
    if not hasattr(os, "sched_setaffinity"):
        raise argparse.ArgumentTypeError("this system cannot keep threads on CPUs")
    missing = sorted(set(out) - os.sched_getaffinity(0))
    if missing or not out:
        raise argparse.ArgumentTypeError(f"this process may use the CPUs {sorted(os.sched_getaffinity(0))}, got {text!r}")
    return out


def _seconds(text: str) -> int:
    if not re.fullmatch(r"\d{1,8}", text):
        raise argparse.ArgumentTypeError(f"expected whole seconds, 0 for none, got {text!r}")
    return int(text)


def _microseconds(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise argparse.ArgumentTypeError(f"expected microseconds, 0 to 999999, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port of 0 to 65535, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `worker`. Returns the exit code."""
    open_streams()
    accept_any_text()
    name_output()
    try:
        args = parser().parse_args(argv)
        if args.log_timestamps:
            stamp_lines()
        code = _main(args)
        sys.stdout.flush()
        return code
    except GgmqError as e:
        print_line(f"worker: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return NO_READER
    except OSError as e:
        if e.filename != OUTPUT:
            raise
        print_line(f"worker: {OUTPUT}: {e.strerror}", file=sys.stderr)
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            flushed(stream)


def _main(args: argparse.Namespace) -> int:
    threads = args.threads or len(args.cpus) or n_cores()
    if args.cpus and threads > len(args.cpus):
        raise ConfigError(f"-t {threads}: --cpus names {len(args.cpus)}; give a CPU for each thread")
    if args.device == LIST:
        for name in [*accelerators(), "CPU", "reference"]:
            _print_device(open_device(name, threads).info())
        return 0
    names = args.device.split(",") if args.device else (accelerators() or ["CPU"])
    local = args.host in ("127.0.0.1", "localhost", "::1") or args.host.startswith("127.")
    keys = find_keys(args.keys, args.insecure)
    if keys is None and not local and not args.insecure and not args.broker and not args.join:
        raise ConfigError(
            f"-H {args.host}: this address can be reached from the network, and there is no cluster key at "
            f"{args.keys or default_key_file()}; make one with `ggmq keys new` and copy it to each host, "
            "or pass --insecure on a network that you trust"
        )
    require(keys, Role.WORKER, "to lend a device", "make one with `ggmq keys new NAME --role worker`")
    if not args.broker and not args.join:
        require(keys, Role.CLUSTER, "a worker that listens", "dial in with --broker ENDPOINT")
    cache = _cache(args)
    if len(names) > 1:
        return _serve_many(args, names, keys)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
    if args.model_dir and not args.model_dir.is_dir():
        raise ConfigError(f"--model-dir {args.model_dir}: no such folder")
    device = open_device(names[0], threads, args.mem * MIB, args.cpus)
    from workers.loop import WorkerLoop, serve

    if args.parent_pid and not args.join:
        device.prepare()  # a main host waits for this worker alone, and what is printed has its terminal
    else:
        device.begin()
    models = ModelFolder(args.model_dir) if args.model_dir else None
    loop = WorkerLoop(device, cache, SOFTWARE, keys, args.parent_pid, args.name[:256], models,
                      bytes.fromhex(args.instance), args.insecure, args.spin_us / 1e6,
                      args.port or 0, args.quiet, own_cluster_id(), args.keep)  # fmt: skip
    if args.join:
        loop.join(args.join)
        endpoint = args.join
    elif args.broker:
        loop.dial(args.broker)
        endpoint = args.broker
    else:
        endpoint = loop.listen(_endpoint(args))
    if not args.quiet and not args.join:
        _banner(endpoint, cache, [device], keys, dialled=bool(args.broker))
    try:
        serve(loop)
    except GgmqError as e:
        if device.broken:
            _end_at_once(e)
        raise
    return 0


def _end_at_once(error: GgmqError) -> NoReturn:
    """Without what else a process does at its end: the driver of a device that is broken may wait for it for ever."""
    print_line(f"worker: {error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        flushed(stream)
    os._exit(1)


def _cache(args: argparse.Namespace) -> Cache | None:
    """The weight cache that the options ask for. Errors: ConfigError when its folder cannot be used."""
    if not args.cache and not args.cache_dir:
        return None
    folder = args.cache_dir or default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"--cache-dir {folder}: expected a folder for weights: {reason}; choose another") from None
    return Cache(folder, args.cache_quota * MIB)


def _endpoint(args: argparse.Namespace) -> str:
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"tcp://{host}:{DEFAULT_PORT if args.port is None else args.port}"


def _serve_many(args: argparse.Namespace, names: list[str], keys: KeyPair | None) -> int:
    from workers.front import Front

    if args.broker:
        raise ConfigError("--broker takes one device; start one worker for each")
    if args.cpus:
        raise ConfigError("--cpus takes one device; start one worker for each")
    front = Front(_endpoint(args), keys)
    signal.signal(signal.SIGTERM, lambda *_: setattr(front, "stopping", True))
    signal.signal(signal.SIGINT, lambda *_: setattr(front, "stopping", True))
    common = [*module_command("workers"), "--quiet", "--instance", secrets.token_hex(16)]
    if args.insecure:
        common.append("--insecure")
    elif args.keys:
        common += ["--keys", str(args.keys)]
    if args.threads:
        common += ["-t", str(args.threads)]
    common += ["--keep", str(args.keep), "--spin-us", str(args.spin_us if len(names) < n_cores() else 0)]
    if args.mem:
        common += ["-m", str(args.mem)]
    if args.cache or args.cache_dir:
        common += ["-c", "--cache-dir", str(args.cache_dir or default_folder()), "--cache-quota", str(args.cache_quota)]
    if args.log_timestamps:
        common.append("--log-timestamps")
    if args.model_dir:
        common += ["--model-dir", str(args.model_dir)]
    try:
        infos = front.start([[*common, "-d", name] for name in names])
    except GgmqError:
        front.close()
        raise
    cache = str(args.cache_dir or default_folder()) if args.cache or args.cache_dir else "n/a"
    _print_banner(front.endpoint, cache, keys, False)
    for i in infos:
        _print_device(i)
    front.run()
    return 0


def _banner(endpoint: str, cache: Cache | None, devices: list[Device[Any]], keys: KeyPair | None, dialled: bool) -> None:
    _print_banner(endpoint, str(cache.folder) if cache else "n/a", keys, dialled)
    for d in devices:
        _print_device(d.info())


def _print_banner(endpoint: str, cache: str, keys: KeyPair | None, dialled: bool) -> None:
    print_line(f"Starting worker, {SOFTWARE}")
    print_line(f"  {'broker' if dialled else 'endpoint'} : {endpoint.removeprefix('tcp://') if not dialled else endpoint}")
    print_line(f"  local cache : {cache}")
    print_line(f"  security : {f'CURVE, {keys.called}' if keys is not None else 'none'}")
    print_line("Devices:")


def _print_device(i: DeviceInfo) -> None:
    print_line(f"  {i.name}: {i.description or i.kind} ({i.total_bytes // MIB} MiB, {i.free_bytes // MIB} MiB free)")


if __name__ == "__main__":
    sys.exit(main())
