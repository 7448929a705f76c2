"""A small real HTTP server that receives progress and answers as the operator's replicas do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from finetune_api.messages.progress import Progress


@dataclass
class Replica:
    """A replica that answers with `status` (and Location) and stores what was posted."""

    url: str = ""
    status: int = 200
    location: str = ""
    signers: list[str] = field(default_factory=list)  # what it answers: the keys that it knows
    taken: list[tuple[str, Progress]] = field(default_factory=list)

    @property
    def last(self) -> Progress:
        """What was posted last."""
        return self.taken[-1][1]

    @property
    def phases(self) -> list[str]:
        phases: list[str] = []
        for _, progress in self.taken:
            if not phases or phases[-1] != progress.phase:
                phases.append(progress.phase)
        return phases


@contextmanager
def replica() -> Iterator[Replica]:
    here = Replica()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if here.status == 200:
                here.taken.append((self.headers["Authorization"], Progress.model_validate_json(body)))
            answer = json.dumps({"signers": here.signers}).encode()
            self.send_response(here.status)
            if here.location:
                self.send_header("Location", here.location)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_address[1]}/v1/progress"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
