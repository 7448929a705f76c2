"""The GPU check: its decisions in tables, its handling of real processes, and a short rehearsal of
every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import (
    carry,
    catalog,
    cells,
    claims,
    flops,
    kit,
    packages,
    page,
    rehearsal,
    repairs,
    runner,
    running,
)
from benchmarks.gpu.cells import CELLS, Cell, Outcome
from benchmarks.gpu.child import MARK
from benchmarks.gpu.planned_jobs import planned_jobs
from benchmarks.gpu.results import Finding, Results
from benchmarks.gpu.stages.ranks import REFERENCES
from benchmarks.trainer.flops import Dimensions, Work, needed

from testkit.rows import pairs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(str(ROOT / part) for part in packages.SOURCES)}
_REFERENCE = (6.0, 5.5, 5.0)
_CELL = Cell("LoRA, zero2", "LoRA", kit.Recipe(strategy="zero2"))


def test_stages_are_chosen_by_name_in_the_order_in_which_they_are_named() -> None:
    assert [stage.name for stage in catalog.chosen(["large", "machine"])] == ["large", "machine"]
    assert catalog.chosen([]) == catalog.STAGES
    with pytest.raises(catalog.UnknownStage, match="there is no speed; there are machine, attention"):
        catalog.chosen(["speed"])


def test_a_stage_gets_no_more_than_what_is_left_of_the_budget() -> None:
    stage = catalog.STAGES[0]
    assert catalog.limit(stage, rehearsal=False, left=1e9) == stage.seconds
    assert catalog.limit(stage, rehearsal=True, left=7.0) == 7.0


@pytest.mark.parametrize(
    ("outcome", "verdict", "message"),
    [
        pytest.param(
            Outcome((6.0, 5.51, 5.01), "bfloat16", {"bfloat16": 1.0}), "right", "1.0e-02", id="as it should be"
        ),
        pytest.param(Outcome((6.0, 5.9, 5.9), "bfloat16", {"bfloat16": 1.0}), "wrong", "is rounding", id="learns less"),
        pytest.param(Outcome(_REFERENCE, "bfloat16", {"float32": 1.0}), "wrong", "not the decided", id="other format"),
        pytest.param(
            Outcome(_REFERENCE, "bfloat16", {"bfloat16": 0.9, "float32": 0.1}),
            "wrong",
            "10% float32",
            id="partly other",
        ),
        pytest.param(Outcome((6.0, 5.503, 5.0), "float32", {"float32": 1.0}), "wrong", "2e-03", id="float32 is exact"),
        pytest.param(Outcome((6.0, 5.5), "bfloat16"), "wrong", "2 of 3 steps", id="ended early"),
        pytest.param(Outcome((), "", error="TrainingError: m1 and m2"), "wrong", "m1 and m2", id="died"),
        pytest.param(Outcome((float("nan"),) * 3, "bfloat16"), "wrong", "nan", id="not a number"),
    ],
)
def test_a_run_is_judged_by_its_losses_and_by_the_dtype_of_its_products(
    outcome: Outcome, verdict: str, message: str
) -> None:
    actual, text = cells.judge(_CELL, outcome, _REFERENCE)
    assert actual == verdict
    assert message in text


def test_every_cell_has_a_reference_whose_loss_falls_far_enough_to_be_compared_with() -> None:
    references = json.loads(REFERENCES.read_text())
    assert {cell.reference for cell in CELLS} == references["tiny"].keys() == references["card"].keys()
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for size in references.values():
        for name, losses in size.items():
            assert len(losses) == 10
            assert losses[0] - min(losses) > (0.04 if name == "DPO" else 0.2), name


def test_a_claim_is_judged_by_a_cards_results_and_is_open_without_them() -> None:
    def finding(verdict: str, **figures: Any) -> dict[str, Any]:
        return {"ranks/LoRA, zero2": {"verdict": verdict, "figures": figures}}

    g1, float32 = claims.CLAIMS[0], claims.CLAIMS[1]
    assert claims.answer(g1, []) == "not tested"
    assert claims.answer(g1, [finding("wrong")]) == "right"
    assert claims.answer(g1, [{}, finding("right")]) == "wrong"
    computed = {"ranks/full, zero2": {"verdict": "wrong", "figures": {"products": {"base float32": 1.0}}}}
    assert claims.answer(float32, [computed]) == "right"
    assert {claim.number for claim in claims.CLAIMS} >= {f"G{number}" for number in range(1, 35)}


def test_every_finding_names_tests_that_exist_or_the_reason_why_it_still_holds() -> None:
    assert [repair.number for repair in repairs.REPAIRS] == [f"G{number}" for number in range(1, 35)]
    for repair in repairs.REPAIRS:
        assert bool(repair.tests) != repair.done.startswith(repairs.NOT_DONE), repair.number
        assert (ROOT / "docs" / "decisions" / repair.decision).is_file()
        for test in repair.tests:
            file, _, name = test.partition("::")
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{repair.number}: {test}"


def test_the_page_matches_the_results() -> None:
    model = json.loads((page.RESULTS / page.MODEL).read_text())
    assert page.PAGE.read_text() == page.page(page.read(page.RESULTS), model, planned_jobs())


def test_the_page_has_a_section_for_each_card() -> None:
    finding = Finding("machine", "versions", "figure", "a | b", {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0"}})
    document = {
        "commit": "abc", "began": "2026-12-01T00:00:00+00:00", "rehearsal": False, "findings": [vars(finding)],
        "stages": [{"stage": "large", "ended": "stopped at its limit of 240 s"}],
    }  # fmt: skip
    text = page.page({"h200.json": document})
    assert "| NVIDIA H200 | ? | 2.11.0 | abc | 2026-12-01 | 1 figure |" in text
    assert "| machine | versions | figure | a \\| b |" in text
    assert "Stages that failed: large stopped at its limit of 240 s." in text


def test_a_rehearsal_is_not_a_result_of_a_card(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"rehearsal": True}))
    assert page.read(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("peft-0.21.2-py3-none-any.whl", True),
        ("pydantic_core-2.50.5-cp312-cp312-linux_x86_64.whl", True),
        ("pydantic_core-2.50.5-cp311-cp311-linux_x86_64.whl", False),
        ("obstore-0.12.1-cp311-abi3-linux_x86_64.whl", True),
        ("obstore-0.12.1-cp313-abi3-linux_x86_64.whl", False),
        ("six-1.0-py2.py3-none-any.whl", True),
    ],
)
def test_a_wheel_is_used_by_the_python_that_it_is_for(name: str, fitting: bool) -> None:
    assert packages.fits(name, (3, 12)) == fitting


def test_only_one_cuda_version_of_bitsandbytes_is_included() -> None:
    assert carry.needed("bitsandbytes/libbitsandbytes_cuda130.so")
    assert carry.needed("bitsandbytes/nn/modules.py")
    assert not carry.needed("bitsandbytes/libbitsandbytes_cuda118.so")
    assert not carry.needed("bitsandbytes/libbitsandbytes_rocm64.so")


def test_flops_are_those_of_the_trainers_benchmark_except_for_its_adapters_and_lowest_layer() -> None:
    shape = kit.LLAMA_8B
    size = Dimensions(32, 4096, 14336, 32, 8, 128, 128256)
    mine = flops.needed(shape, tokens=100, labels=60, pairs=5050, full=False)
    theirs = needed(size, 16, Work(100, 60, 5050))
    assert mine == pytest.approx(theirs.total - theirs.adapters, rel=5e-3)
    assert flops.needed(shape, tokens=1, labels=1, pairs=0, full=True) == pytest.approx(6 * 7.5e9, rel=2e-2)


def test_a_cards_peak_is_looked_up_by_the_longest_matching_name() -> None:
    assert flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA L40S") == 362e12
    assert flops.peak("a card of the future") is None


def test_weights_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    one, other = (kit.write_model(tmp_path / name, kit.TINY.config()) for name in ("one", "other"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_machines_versions_are_pinned_if_they_are_known() -> None:
    lines = [line for line in rehearsal.VERSIONS.read_text().splitlines() if line and not line.startswith("#")]
    assert {"torch==2.11.0", "transformers==5.17.0"} <= set(lines)
    assert not {line.partition("==")[0] for line in lines} & set(carry.EXTRA)


def test_the_results_file_is_complete_after_every_finding(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {"commit": "abc"})
    assert json.loads((tmp_path / "r.json").read_text()) == {"commit": "abc", "stages": [], "findings": []}
    results.add(Finding("machine", "copy", "figure", "4 TB/s"))
    assert json.loads((tmp_path / "r.json").read_text())["findings"][0]["name"] == "copy"


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_its_findings(tmp_path: Path) -> None:
    line = MARK + json.dumps(vars(Finding("x", "first", "figure", "known early")))
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"print({line!r}, flush=True); print('child', child.pid, flush=True); time.sleep(600)"
    )
    findings: list[Finding] = []
    began = time.monotonic()
    ended = runner.run("x", [sys.executable, "-c", code], 2.0, os.environ, tmp_path, findings.append)
    assert time.monotonic() - began < 10
    assert ended.ended == "stopped at its limit of 2 s"
    assert [finding.text for finding in findings] == ["known early"]
    pid = int(ended.log.split()[-1])
    deadline = time.monotonic() + 60  # nobody waits for the child, so its end may become visible later
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_a_stage_that_dies_reports_how_and_shows_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(7)"]
    ended = runner.run("x", command, 30.0, os.environ, tmp_path, lambda finding: None)
    assert (ended.ended, ended.log) == ("code 7", "what went wrong")


def test_without_a_gpu_the_check_explains_how_to_rehearse(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return  # here the check itself would begin
    done = _check("--out", str(tmp_path))
    assert done.returncode == 2
    assert "make gpu-check REHEARSE=1" in done.stderr


def test_an_unknown_stage_is_refused_with_the_existing_names(tmp_path: Path) -> None:
    done = _check("--stages", "machine,sped", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--stages: there is no sped; there are machine, attention" in done.stderr


def test_the_dtype_that_products_are_computed_in_is_observed(tmp_path: Path) -> None:
    """It isn't derived from the trainer's decisions."""
    model = kit.write_model(tmp_path / "model", kit.TINY.config())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    recipe = kit.Recipe(dtype="float32", training={"max_steps": 2})
    paths = kit.prepare(scratch, model, pairs(20), recipe, device="cpu")
    ran = running.run(paths, options=("--rank", "8"), environment={"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]})
    assert ran.code == 0, ran.error
    assert ran.observed["products"] == {"adapter float32": 1.0, "base float32": 1.0}
    assert ran.choice("dtype") == "float32"
    assert ran.estimate_bytes is not None


def test_a_short_rehearsal_of_every_stage_on_the_products_own_code(tmp_path: Path) -> None:
    """The check still runs after modules move: this test calls everything that the check calls."""
    done = _check("--rehearse", "--here", "--short", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [stage["stage"] for stage in document["stages"]] == [stage.name for stage in catalog.STAGES]
    assert {stage["ended"] for stage in document["stages"]} == {"done"}
    names = {f"{finding['stage']}/{finding['name']}" for finding in document["findings"]}
    assert names >= {
        "machine/versions", "attention/head size 64", "attention/5 readers of 40 tokens", "head/exact, full training",
        "fused/taken", "ranks/LoRA, ddp", "ranks/full, zero1", "large/LoRA q,v", "memory/too large micro-batches",
        "fsdp/as the product, recomputed", "resume/stopped by SIGTERM", "resume/answers", "operations/stall",
    }  # fmt: skip
    assert document["rehearsal"] is True
    assert len(document["code"]) == 12


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=3600)


def _runs(pid: int) -> bool:
    """Return whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
