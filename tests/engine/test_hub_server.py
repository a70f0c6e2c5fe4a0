"""A hub of our own that speaks as much of the protocol as a download needs: revisions, private repositories, offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORIES: dict[str, dict[str, dict[str, bytes]]] = {
    "acme/tiny": {
        "main": {
            "config.json": b'{"v": 1}',
            "model.safetensors": b"new",
            "consolidated.safetensors": b"c",
            "original/model.safetensors": b"o",
            "pytorch_model.bin": b"b",
            "onnx/model.onnx": b"x",
        },
        "v0": {"config.json": b'{"v": 0}', "model.safetensors": b"old"},
    },
    "acme/bins": {"main": {"config.json": b"{}", "pytorch_model.bin": b"b", "tokenizer.json": b"{}"}},
    "acme/native": {"main": {"params.json": b"{}", "consolidated.safetensors": b"c", "tekken.json": b"{}"}},
    "acme/ggufs": {
        "main": {
            "m-Q4_K_M.gguf": b"4",
            "mmproj-Q4_K_M.gguf": b"5",
            "m-Q8_0-00001-of-00002.gguf": b"8",
            "m-Q8_0-00002-of-00002.gguf": b"9",
        }
    },
    "acme/private": {"main": {"config.json": b"{}", "model.safetensors": b"p"}},
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner_name = "/".join(parts[2:4] if api else parts[:2])
        revisions = REPOSITORIES.get(owner_name)
        if owner_name == "acme/private" and self.headers.get("Authorization") != "Bearer secret-token":
            self.refuse(401, "GatedRepo" if api else "RepoNotFound")
        elif revisions is None:
            self.refuse(404, "RepoNotFound")
        elif api:
            self.describe(revisions, parts[4], parts[5])
        else:
            self.send_file(revisions, parts[3], "/".join(parts[4:]), with_body)

    def describe(self, revisions: dict[str, dict[str, bytes]], what: str, revision: str) -> None:
        name = next((name for name in revisions if revision in (name, commit(name))), None)
        if name is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = revisions[name]
        listing: Any = [{"type": "file", "path": f, "size": len(b), "oid": commit(f)} for f, b in files.items()]
        if what == "revision":
            listing = {"id": "x", "sha": commit(name), "siblings": [{"rfilename": file} for file in files]}
        self.reply(json.dumps(listing).encode(), {})

    def send_file(self, revisions: dict[str, dict[str, bytes]], revision: str, file: str, with_body: bool) -> None:
        name = next(name for name in revisions if revision in (name, commit(name)))
        body = revisions[name][file]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit(name)}
        self.reply(body, headers, with_body)

    def reply(self, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def located(endpoint: str, cache: Path, *arguments: str, **environment: str) -> tuple[str, list[str]]:
    """(path or error, files beside it) of hub.locate(*arguments), in a process of its own: the hub's address and
    offline mode are read at import."""
    code = (
        "import sys, json; from kvasir.engine import hub; from kvasir.engine.errors import ConfigError\n"
        "a = json.loads(sys.argv[1])\n"
        "try: p = hub.locate(a.pop('model'), a.pop('revision', None), **a)\n"
        "except ConfigError as e: print(json.dumps([e.message, []])); sys.exit()\n"
        "f = p if p.is_dir() else p.parent\n"
        "print(json.dumps([str(p), sorted(str(x.relative_to(f)) for x in f.rglob('*') if x.is_file())]))"
    )
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env.pop("HF_TOKEN", None)
    env |= {"HF_TOKEN_PATH": str(cache / "none"), **environment}
    asked = dict(part.split("=", 1) for part in arguments)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "secret-token" not in done.stderr
    path, files = json.loads(done.stdout.splitlines()[-1])
    return path, files


def test_only_one_format_is_fetched(endpoint: str, tmp_path: Path) -> None:
    path, files = located(endpoint, tmp_path, "model=acme/tiny")
    assert files == ["config.json", "model.safetensors"]
    assert Path(path, "model.safetensors").read_bytes() == b"new"
    assert located(endpoint, tmp_path, "model=acme/tiny", "revision=v0")[0] != path
    _, files = located(endpoint, tmp_path, "model=acme/tiny", "load_format=pt", f"cache={tmp_path / 'other'}")
    assert files == ["config.json", "pytorch_model.bin"]
    assert "it isn't a hub id" not in located(endpoint, tmp_path, "model=acme/tiny", HF_HUB_OFFLINE="1")[0]


def test_other_formats_are_fetched_where_there_is_nothing_else(endpoint: str, tmp_path: Path) -> None:
    assert located(endpoint, tmp_path, "model=acme/bins")[1] == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert located(endpoint, tmp_path, "model=acme/native")[1] == [
        "consolidated.safetensors",
        "params.json",
        "tekken.json",
    ]


def test_one_gguf_of_many(endpoint: str, tmp_path: Path) -> None:
    path, files = located(endpoint, tmp_path, "model=acme/ggufs:Q4_K_M")
    assert Path(path).name == "m-Q4_K_M.gguf"
    assert files == ["m-Q4_K_M.gguf"]
    path, files = located(endpoint, tmp_path / "2", "model=acme/ggufs:q8_0")
    assert Path(path).name == "m-Q8_0-00001-of-00002.gguf"
    assert len(files) == 2
    assert Path(located(endpoint, tmp_path / "3", "model=acme/ggufs:m-Q4_K_M.gguf")[0]).name == "m-Q4_K_M.gguf"
    assert "no GGUF file matches 'Q2_K'" in located(endpoint, tmp_path, "model=acme/ggufs:Q2_K")[0]


def test_what_the_hub_refuses(endpoint: str, tmp_path: Path) -> None:
    text, _ = located(endpoint, tmp_path, "model=acme/private")
    assert "--hf-token or HF_TOKEN" in text
    assert located(endpoint, tmp_path, "model=acme/private", "token=secret-token")[1] == [
        "config.json",
        "model.safetensors",
    ]
    assert "at revision 'v9'" in located(endpoint, tmp_path, "model=acme/tiny", "revision=v9")[0]
    assert "HF_HUB_OFFLINE is set" in located(endpoint, tmp_path, "model=acme/bins", HF_HUB_OFFLINE="1")[0]
