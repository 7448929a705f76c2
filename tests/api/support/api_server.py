"""A few raw requests to a real API server, so that tests send JSON exactly as they wrote it."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/default/finetunejobs"


@dataclass(frozen=True)
class Answer:
    """The server's answer: an object, or a Status if it refused the request."""

    code: int
    body: dict[str, Any]

    @property
    def accepted(self) -> bool:
        return self.code < 300

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the refusal names."""
        return tuple(cause.get("field", "") for cause in self.body.get("details", {}).get("causes", ()))


class Server:
    """One persistent connection with the admin's certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cadata=_pem(cluster, "certificate-authority"))
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pair:
            pair.write(_pem(user, "client-certificate") + "\n" + _pem(user, "client-key"))
            pair.flush()
            context.load_cert_chain(pair.name)
        where = urlsplit(cluster["server"])
        self._connection = http.client.HTTPSConnection(where.hostname or "", where.port, context=context, timeout=30)

    def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Answer:
        url = path + "".join(
            f"{'&' if index else '?'}{key}={value}" for index, (key, value) in enumerate(query.items())
        )
        payload = body if isinstance(body, str) or body is None else json.dumps(body)
        self._connection.request(method, url, payload, {"Content-Type": content, "Accept": "application/json"})
        response = self._connection.getresponse()
        return Answer(response.status, json.loads(response.read()))

    def create(self, body: Any) -> Answer:
        """Create `body` in a strict dry run: everything except storing."""
        return self.request("POST", JOBS, body, dryRun="All", fieldValidation="Strict")

    def replace(self, body: dict[str, Any], *, dry_run: bool = True) -> Answer:
        query = {"dryRun": "All"} if dry_run else {}
        return self.request("PUT", f"{JOBS}/{body['metadata']['name']}", body, fieldValidation="Strict", **query)


def _pem(entry: dict[str, Any], key: str) -> str:
    if f"{key}-data" in entry:
        return base64.b64decode(entry[f"{key}-data"]).decode()
    return Path(entry[key]).read_text()
