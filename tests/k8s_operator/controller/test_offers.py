"""A job that names something that the administrator doesn't offer waits until it is offered."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from k8s_operator.support.kubelet_stand_in import World
from k8s_operator.support.operator_process import Operator

pytestmark = pytest.mark.cluster


def test_a_job_with_an_unknown_network_starts_once_the_administrator_has_added_it(
    world: World, operators: Callable[..., Operator]
) -> None:
    before = operators()
    before.start()
    world.submit("waits", pod={"network": "roce"})
    status = world.wait_phase("waits", "Pending")
    assert "spec.pod.network: 'roce' is not one of the network profiles" in status["message"]
    assert world.condition("waits", "Reconciling")["reason"] == "UnknownNetwork"
    assert not world.all("jobs")
    before.kill()
    after = operators(pods={"networkProfiles": {"roce": {"annotations": {"example.test/network": "roce-0"}}}})
    after.start()
    job = world.wait_job("waits-1", 30)
    assert job["spec"]["template"]["metadata"]["annotations"]["example.test/network"] == "roce-0"
