"""A dry run sends nothing, a push sends every file in one commit, a refusal leaves the export whole."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.push import check_repo, push
from polybit.options.export import ExportOptions


class FakeHub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to make a repository and a commit; keeps the files it is sent."""

    def log_message(self, *_):
        pass

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            self.server.repository = json.loads(body)
            self.answer(200, {"url": f"{self.server.address}/me/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines()]
            for row in rows:
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            where = f"{self.server.address}/me/model/commit/{'1' * 40}"
            self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": where})
        else:
            self.answer(200, {})


@pytest.fixture
def fake_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files, server.repository = [], {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CODE = """
import sys, pathlib
from polybit.core.runtime import PolybitError
from polybit.hub.push import push
try:
    print(push(pathlib.Path(sys.argv[1]), "me/model", private=True, dry_run=False)["commit"])
except PolybitError as error:
    sys.exit(f"sentence: {error}")
"""


def pushed(directory, hub, token):
    """A process of its own, because huggingface_hub reads the address of the hub when it is imported."""
    said = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", CODE, str(directory)], env=os.environ | said, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(bytes(range(256)))
    (folder / "README.md").write_text("# A model\n")
    return folder


def test_every_file_in_one_commit(export, fake_hub):
    done = pushed(export, fake_hub, "hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/commit/" + "1" * 40)
    assert fake_hub.files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert fake_hub.repository["name"] == "model" and fake_hub.repository["organization"] == "me"
    assert fake_hub.repository.get("private") or fake_hub.repository.get("visibility") == "private"
    assert sum("/commit/" in path for path in fake_hub.asked) == 1


def test_a_refusal_is_one_sentence_and_the_export_stays(export, fake_hub):
    done = pushed(export, fake_hub, "hf_wrong")
    assert (
        done.returncode
        and done.stderr.startswith("sentence: me/model was not pushed (")
        and done.stderr.count("\n") == 1
    )
    assert "is finished and whole" in done.stderr and not fake_hub.files
    assert {path.name for path in export.iterdir()} == {"model.gguf", "README.md"}


def test_a_dry_run_sends_nothing(export, fake_hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", fake_hub.address)
    found = push(export, "me/model", private=False, dry_run=True)
    assert found["files"] == {"README.md": 10, "model.gguf": 256} and found["bytes"] == 266
    assert found["commit"] is None and not fake_hub.asked


@pytest.mark.parametrize("repo", ["model", "a/b/c", "me/", "me/mo del", "..", "me/" + "x" * 200])
def test_names_of_no_repository(repo):
    with pytest.raises(PolybitError, match="--push"):
        check_repo(repo)


def test_flags_that_say_how_to_push_need_the_push(tmp_path):
    for flag in ("private", "push_dry_run"):
        with pytest.raises(PolybitError, match="give --push"):
            ExportOptions(to="dense", out=tmp_path, **{flag: True})
