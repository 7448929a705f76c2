"""Posts of progress, as a pod sends them or somebody in its name."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from finetune_api import names
from k8s_operator.support.kubelet_stand_in import Raw, World
from k8s_operator.support.operator_process import Operator


def pod_token(world: World, pod: Raw) -> str:
    """Return a token like the one that the kubelet mounts for reporting progress."""
    meta = pod["metadata"]
    spec: Raw = {"audiences": [names.PROGRESS_AUDIENCE], "expirationSeconds": 600}
    spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = world.request("POST", world.path("serviceaccounts", "default") + "/token", request)
    assert answer.accepted, answer.message
    token: str = answer.body["status"]["token"]
    return token


def post(operator: Operator, token: str, body: Any) -> int:
    """Post to the operator and return the code of its answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{operator.progress_port}{names.PROGRESS_PATH}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
