"""Which variables of a pod reach its ranks: every one that a job may set, and no credential."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api import names
from finetune_api.messages.run import RunConfig
from finetune_api.spec import environment
from finetune_api.spec.environment import EnvVarSpec
from finetune_trainer.paths import Paths
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.processes import rank_specs
from trainer.support.supervisor_process import JobSetup

_RUN = JobSetup(Path("/nowhere")).run()
_TEXT = st.text("ABCKEYTOKNSRP_019abz", min_size=1, max_size=12)
_NAMES = st.builds(
    str.__add__, st.sampled_from(["", "AWS_", "WANDB_", *environment.PREFIXES]), _TEXT
) | st.sampled_from(
    [*environment.PROXIES, "http_proxy", "no_proxy", "HF_TOKEN", "PYTHONPATH", "LD_PRELOAD", "NCCL_IB_PKEY"]
)


def _rank_environments(variables: dict[str, str], run: RunConfig = _RUN) -> list[dict[str, str]]:
    node = Node(run, 0, Path("/dev/null"), variables)
    specs = rank_specs(run.world, node.rank, Paths(Path("/scratch")), ("rank",), node.rank_environment)
    return [dict(spec.environment) for spec in specs]


@given(st.dictionaries(_NAMES, st.text("abc/:,1", max_size=8), max_size=8))
def test_what_a_job_may_set_reaches_every_rank_as_it_is(variables: dict[str, str]) -> None:
    ranks = _rank_environments(variables)
    assert len(ranks) == _RUN.world.processes_per_node == 2
    for name, value in variables.items():
        try:
            EnvVarSpec(name=name, value=value)
        except ValidationError:
            continue
        assert [rank[name] for rank in ranks] == [value, value]


@given(st.dictionaries(_NAMES, st.just("secret"), max_size=8))
def test_no_credential_reaches_a_rank(variables: dict[str, str]) -> None:
    clouds = (*names.SECRET_AWS_KEYS, *names.SECRET_GOOGLE_KEYS, *names.SECRET_AZURE_KEYS)
    secret = dict.fromkeys((*clouds, *names.SECRET_TRACKER_KEYS, names.SECRET_HF_TOKEN), "secret")
    for rank in _rank_environments({**variables, **secret}):
        reached = {name for name, value in rank.items() if value == "secret"}
        assert not reached & secret.keys()
        assert not {name for name in reached if name.endswith(("_TOKEN", "_KEY")) or "SECRET" in name}


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES", "FINETUNE_SCRATCH"])
def test_variables_of_the_image_reach_a_rank_although_a_job_cannot_set_them(name: str) -> None:
    with pytest.raises(ValidationError):
        EnvVarSpec(name=name, value="x")
    assert name in _rank_environments({name: "/x"})[0]


@pytest.mark.parametrize(
    ("device", "variables", "order"),
    [
        ("cuda", {}, "PCI_BUS_ID"), ("cuda", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "FASTEST_FIRST"), ("cpu", {}, None)
    ],
)  # fmt: skip
def test_gpus_have_nvmls_order_unless_the_job_sets_another(
    device: str, variables: dict[str, str], order: str | None
) -> None:
    run = _RUN.model_copy(update={"world": _RUN.world.model_copy(update={"device": device})})
    assert [rank.get("CUDA_DEVICE_ORDER") for rank in _rank_environments(variables, run)] == [order, order]
