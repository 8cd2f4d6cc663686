"""A cache of the Hugging Face hub as huggingface_hub lays it out, and a stand-in for the hub itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse


def commit_of(n: int) -> str:
    return f"{n:040x}"


def add_to_cache(hub: Path, repo: str, files: Mapping[str, bytes], commit: str = commit_of(1), current: bool = True) -> Path:
    """Add a revision: blobs by hash, links to them in the snapshot, and refs/main if it is the current one.

    Returns: the snapshot's folder.
    """
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name, data in files.items():
        blob, link = folder / "blobs" / hashlib.sha256(data).hexdigest(), snapshot / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if current:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return snapshot


@contextlib.contextmanager
def stand_in(
    repo: str, files: Mapping[str, bytes], asked: list[str], refusal: tuple[int, str] | None = None
) -> Iterator[str]:
    """A server that is no hub but answers the requests that huggingface_hub makes for a public repository.

    `asked` gets each request's method and path; `refusal` is a status and the hub's name for it, given instead of files.
    Returns: its address, for HF_ENDPOINT.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = urlparse(self.path).path
            asked.append(f"{self.command} {path}")
            resolve = f"/{repo}/resolve/"
            name = path.removeprefix(resolve).partition("/")[2]
            if path == f"/api/models/{repo}":
                info = {"id": repo, "siblings": [{"rfilename": f} for f in files]}
                self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif path.startswith(resolve) and refusal:
                self._send(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
            elif path.startswith(resolve) and name in files:
                data = files[name]
                self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit_of(7)})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
