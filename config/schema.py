"""The cluster file's shape, typed. Units stand in the names; paths may begin with `~`."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Line = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Count = Annotated[int, Meta(ge=0, le=1 << 24)]


class Strict(Struct, forbid_unknown_fields=True, frozen=True):
    """A typo in a key is an error."""


class BrokerSection(Strict, frozen=True):
    """`listen` is bound on the main host; `advertise` is what workers dial, when that differs. Port 0: any that is free."""

    listen: Annotated[str, Meta(pattern=r"^tcp://[^:/]+:\d{1,5}$")] = "tcp://127.0.0.1:0"
    advertise: Annotated[str, Meta(pattern=r"^(tcp://[^:/]+:\d{1,5})?$")] = ""


class SecuritySection(Strict, frozen=True):
    """`keys`: the cluster key file; empty takes the default file, if there is one."""

    keys: Line = ""
    insecure: bool = False


class ModelSection(Strict, frozen=True):
    path: Line = ""
    context: Count = 0


class WorkerSection(Strict, frozen=True):
    """Workers of one host, a process for each device.

    `keep_s`: so long weights stay in memory after a run, for the next one that wants the same.
    `launcher`: local starts a process here, ssh one on `host`, none expects one that listens on `host` and `port`.
    """

    name: Name
    host: Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_.@:-]+$")] = "localhost"
    launcher: Literal["local", "ssh", "none"] = "local"
    devices: Annotated[list[Name], Meta(min_length=1, max_length=64)] = field(default_factory=lambda: ["CPU"])
    threads: Count = 0
    memory_mib: Count = 0
    cache: bool = False
    keep_s: Count = 300
    port: Annotated[int, Meta(ge=1, le=65535)] = 50052
    command: Line = "worker"
    keys: Line = ""
    ssh_options: Annotated[list[Line], Meta(max_length=32)] = []


class SplitSection(Strict, frozen=True):
    tensor_split: Annotated[list[Annotated[float, Meta(ge=0)]], Meta(max_length=256)] = []


class ClusterFile(Strict, frozen=True):
    workers: Annotated[list[WorkerSection], Meta(min_length=1, max_length=256)]
    name: Name = "ggmq"
    broker: BrokerSection = BrokerSection()
    security: SecuritySection = SecuritySection()
    model: ModelSection = ModelSection()
    split: SplitSection = SplitSection()


def expanded(path: str) -> Path:
    """A path of the file. The `~` of a user who is not there stays, and names no file."""
    return Path(os.path.expanduser(path))
