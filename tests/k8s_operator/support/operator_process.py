"""The operator as a real process, which tests kill and restart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[3]


class Operator:
    """One replica that watches the given namespaces. `settings` are merged over settings with short
    intervals."""

    def __init__(self, kubeconfig: Path, folder: Path, namespaces: tuple[str, ...], **settings: Any) -> None:
        self.name = settings.pop("pod_name", "operator")
        self.kubeconfig = kubeconfig
        self.folder = folder
        self.log = folder / f"{self.name}.log"
        self.progress_port, self.metrics_port, self.probes_port = _free_ports(3)
        lease = {
            "enabled": False,
            "namespace": namespaces[0],
            "leaseSeconds": 3,
            "renewSeconds": 2,
            "retrySeconds": 0.3,
        }
        self.settings = {
            "trainerImage": "example.test/trainer:1",
            "watchNamespaces": list(namespaces),
            "progress": {"url": f"http://127.0.0.1:{self.progress_port}", "port": self.progress_port}
            | settings.pop("progress", {}),
            "leaderElection": lease | settings.pop("leader_election", {}),
            "metricsPort": self.metrics_port,
            "probesPort": self.probes_port,
            "pods": {"gracePeriodSeconds": 30},
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, wait: bool = True) -> None:
        config = self.folder / f"{self.name}.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "operator"),
            "POD_NAME": self.name,
            "POD_IP": "127.0.0.1",
            "POD_NAMESPACE": "default",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator", "--config", config, "--kubeconfig", self.kubeconfig],
                env=environment,
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.get(self.probes_port, "/readyz")
                return
            assert self.is_running, f"the operator ended: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s: {self.log.read_text()[-2000:]}")

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def kill(self) -> None:
        """Send SIGKILL: the operator writes no last message and releases nothing."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, name: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(name)
            self._process.wait(timeout=15)

    def get(self, port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def samples(self, name: str, **labels: str) -> list[float]:
        """Return the values of a series, as Prometheus would scrape them."""
        text = self.get(self.metrics_port, "/metrics")
        return [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
