"""A preflight ends at its deadline, whatever a storage or a file does, and names what took so
long."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune_api.messages.run import DataConfig, S3Config
from finetune_api.reasons import REASONS
from finetune_trainer.storage import bucket
from testkit.tiny_models import tiny_llama
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

_SIZE = 3 * bucket.PART_BYTES
_END = threading.Event()


class _Slow(BaseHTTPRequestHandler):
    """Has one large file, sends the first part of it, and is silent about the others."""

    def do_HEAD(self) -> None:
        self._answer(200, {"Content-Length": str(_SIZE)})

    def do_GET(self) -> None:
        first, _, last = (self.headers.get("Range") or "").removeprefix("bytes=").partition("-")
        if first != "0":
            _END.wait(60)
            return
        self._answer(206, {"Content-Range": f"bytes 0-{last}/{_SIZE}", "Content-Length": str(int(last) + 1)})
        self.wfile.write(b"\n" * (int(last) + 1))

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "ETag": '"1"', "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.fixture
def slow_store() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    _END.set()
    server.shutdown()
    server.server_close()


def _setup(folder: Path) -> JobSetup:
    setup = JobSetup(folder).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    return setup


def test_a_file_that_never_arrives_is_named_with_its_bytes(tmp_path: Path, slow_store: str) -> None:
    keys = supervisor_process.secret(tmp_path / "keys", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    data = DataConfig(train=supervisor_process.location("s3://data/rows/train.jsonl", keys))
    setup = _setup(tmp_path)
    run = setup.with_changes(data=data, s3=S3Config(endpoint=slow_store, allow_http=True), preflight_seconds=3).run()
    began = time.monotonic()
    ended = supervisor_process.supervise(run, tmp_path, command="preflight")
    assert time.monotonic() - began < 30
    assert (ended.code, ended.last.reason) == (REASONS["PreflightTimeout"].exit_code, "PreflightTimeout")
    assert ended.last.message == (
        "runPolicy.preflightSeconds: the checks didn't end within 3 s; the last one: downloading the train rows "
        f"s3://data/rows/train.jsonl: {_SIZE / 1e6:,.1f} MB; still downloading train.jsonl ({_SIZE // 3:,} of "
        f"{_SIZE:,} bytes)"
    )
    assert not list(setup.output.rglob("*.json")), "the output is free for another job"


def test_rows_that_take_too_long_are_named(tmp_path: Path) -> None:
    setup = _setup(tmp_path)
    setup.train.write_text(
        "".join(json.dumps({"prompt": f"question {n}", "completion": "x" * 4000}) + "\n" for n in range(20000))
    )
    run = setup.with_changes(preflight_seconds=1).run()
    ended = supervisor_process.supervise(run, tmp_path, command="preflight")
    assert ended.last.reason == "PreflightTimeout", ended.output
    assert "the last one: " in ended.last.message
