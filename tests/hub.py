"""A hub on the loopback address, which serves folders as far as huggingface_hub asks for it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves ``folder``/ORG/NAME as models, each with the one revision ``main``.

    Attributes:
        fetched: names of the files that were sent.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 5:
            self.tell_of_model("/".join(parts[2:4]), *parts[4:6])
        elif parts[2:3] == ["resolve"]:
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404)

    def tell_of_model(self, model: str, what: str, revision: str) -> None:
        folder = self.server.folder / model
        if not folder.is_dir():
            return self.reply(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.reply(404, error="RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            content: Any = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        else:
            names = [{"rfilename": str(path.relative_to(folder))} for path in files]
            content = {"id": model, "sha": COMMIT, "siblings": names}
        self.reply(200, json.dumps(content).encode(), content_type="application/json")

    def send_file(self, model: str, revision: str, name: str) -> None:
        folder = self.server.folder / model
        if not folder.is_dir():
            return self.reply(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.reply(404, error="RevisionNotFound")
        if not (folder / name).is_file():
            return self.reply(404, error="EntryNotFound")
        content = (folder / name).read_bytes()
        if self.command == "GET":
            self.server.fetched.append(name)
        self.reply(200, content, etag=f'"{hashlib.sha1(content).hexdigest()}"')

    def reply(
        self,
        code: int,
        content: bytes = b"",
        error: str = "",
        etag: str = "",
        content_type: str = "application/octet-stream",
    ) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(content)),
            "X-Repo-Commit": COMMIT,
            "X-Error-Code": error,
            "ETag": etag,
        }
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
