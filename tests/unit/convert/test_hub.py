"""Uploading to the Hub, against a stand-in for its server."""

import base64
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

import trainer

TOKEN = "hf_right"
STEP_PATTERN = "Weights after 2 updates"


class StandIn(BaseHTTPRequestHandler):
    """Answers what `create_repo` and `upload_folder` ask; keeps what was created and committed in `server`."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.address}/me/speech", "name": "me/speech", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files, "commitOid": None})
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines() if line]
            self.server.commits.append(lines)
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/speech/commit/0"}
            self._answer(200, answer)
        else:
            self._answer(404, {"error": f"unexpected {self.path}"})

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self._answer(404, {"error": f"unexpected {self.path}"})

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.requests, server.created, server.commits = [], [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def convert(run: Any, out: Path, *words: str, **environment: str) -> tuple[int, str]:
    """`trainer convert` in a process of its own, which sees no token and no endpoint but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    kept |= {"PYTHONPATH": str(Path(trainer.__file__).parents[1]), "HF_HOME": str(out.with_name("hf-home"))}
    command = [sys.executable, "-m", "trainer", "convert", str(run.folder), str(out), *words]
    done = subprocess.run(
        command,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def is_private(made: dict[str, Any]) -> bool:
    """By the name of huggingface_hub 2, or of 1."""
    return made.get("visibility") == "private" or made.get("private") is True


def test_upload_creates_a_private_repository_and_commits_every_file(plain_run: Any, hub: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--push_to_hub", "me/speech", "--hub_token", TOKEN)
    code, said = convert(plain_run, out, *words, HF_ENDPOINT=hub.address)
    assert code == 0, said
    assert "uploaded to" in said
    (made,) = hub.created
    assert (made["name"], made.get("organization"), is_private(made)) == ("speech", "me", True)
    (commit,) = hub.commits
    assert commit[0]["value"]["summary"] == STEP_PATTERN
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit[1:]}
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_public_repository_and_token_from_the_environment(plain_run: Any, hub: Any, tmp_path: Path) -> None:
    words = ("--push_to_hub", "me/speech", "--hub_public", "--no_verify")
    code, said = convert(plain_run, tmp_path / "out", *words, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert code == 0, said
    assert not is_private(hub.created[0])


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "401"),
        ({}, "401"),
        ({"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "offline"),
    ],
)
def test_refusal_is_one_message_and_leaves_the_folder(
    plain_run: Any, hub: Any, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    out = tmp_path / "out"
    code, said = convert(plain_run, out, "--push_to_hub", "me/speech", **{"HF_ENDPOINT": hub.address} | environment)
    assert code == 2, said
    assert "Traceback" not in said
    error = said.splitlines()[-1]
    assert error.startswith("trainer: error: push_to_hub (me/speech): "), said
    assert reason in error
    assert f"The folder {out} is complete; upload it with `hf upload me/speech {out}`" in error
    assert (out / "model.safetensors").is_file()


def test_a_bad_name_is_refused_before_anything_is_converted(plain_run: Any, tmp_path: Path) -> None:
    code, said = convert(plain_run, tmp_path / "out", "--push_to_hub", "a/b/c")
    assert code == 2
    assert "push_to_hub (a/b/c) must be a name such as OWNER/MODEL" in said
    assert not (tmp_path / "out").exists()
