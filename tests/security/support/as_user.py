"""Requests to a real API server in the name of somebody with few rights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from api.support.api_server import Answer, Server


class User(Server):
    """One persistent connection, whose requests are authorized as those of `name`."""

    def __init__(self, kubeconfig: Path, name: str) -> None:
        super().__init__(kubeconfig)
        self._name = name

    def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Answer:
        url = path + ("?" + "&".join(f"{key}={value}" for key, value in query.items()) if query else "")
        payload = body if isinstance(body, str) or body is None else json.dumps(body)
        headers = {"Content-Type": content, "Accept": "application/json", "Impersonate-User": self._name}
        self._connection.request(method, url, payload, headers)
        response = self._connection.getresponse()
        return Answer(response.status, json.loads(response.read()))
