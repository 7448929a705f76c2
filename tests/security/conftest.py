"""The fixtures of the operator's tests on a real API server."""

from __future__ import annotations

from k8s_operator.conftest import node, operator, operators, world

__all__ = ["node", "operator", "operators", "world"]
