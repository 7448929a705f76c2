"""Files on the command line: errors name file, line, field and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_cli.files import read_text
from finetune_cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if "kind: FineTuneJob" in path.read_text()]
GOOD = (ROOT / "examples" / "quickstart.yaml").read_text()


def _line(text: str) -> int:
    """Return the number of the line of GOOD that contains this text."""
    return next(number for number, line in enumerate(GOOD.splitlines(), 1) if text in line)


WRONG = {
    "a value out of range": (
        ("rank: 16", "rank: 0"),
        f"job.yaml:{_line('rank: 16')}: spec.method.lora.rank: ",
        "(got 0)",
    ),
    "a misspelt field": (
        ("nodes: 2", "nodez: 2"),
        f"job.yaml:{_line('nodes: 2')}: spec.distribution.nodez: ",
        "spelling",
    ),
    "a missing field": (("type: lora", "kind: lora"), "spec.method.type: ", "required"),
    "broken YAML": (("spec:", "spec: ["), "isn't YAML", ""),
    "a key twice": (("    maxSteps: 16", "    maxSteps: 16\n    maxSteps: 17"), "'maxSteps' is set twice", ""),
    "not a number": (("1.0e-3", ".nan"), "is not a number", ""),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    assert "valid" in capsys.readouterr().out
    assert main(["plan", str(path)]) == 0
    assert "Job " in capsys.readouterr().out


@pytest.mark.parametrize(("change", "start", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_line_field_and_value(change: tuple[str, str], start: str, message: str) -> None:
    assert change[0] in GOOD
    contents = read_text(GOOD.replace(change[0], change[1], 1), "job.yaml")
    texts = [str(problem) for problem in contents.problems]
    assert any(start in text and message in text for text in texts), texts
    assert all(text.startswith("job.yaml") for text in texts)


def test_other_kinds_in_a_file_are_left_alone() -> None:
    contents = read_text("kind: Secret\napiVersion: v1\n---\n" + GOOD, "job.yaml")
    assert (len(contents.jobs), contents.others, contents.problems) == (1, 1, ())


def test_a_file_without_a_job_is_refused() -> None:
    assert [str(p) for p in read_text("kind: Secret\n", "s.yaml").problems] == ["s.yaml: contains no FineTuneJob"]


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "/nowhere.yaml"]) == 1
    assert "/nowhere.yaml: can't be read" in capsys.readouterr().err


def test_plan_shows_world_batches_and_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "examples" / "quickstart.yaml")]) == 0
    out = capsys.readouterr().out
    assert "4 processes: 2 pods x 2" in out
    assert "Service quickstart-ranks\n  Job quickstart-1" in out


def test_plan_can_print_the_objects_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["plan", "-o", "yaml", "--image", "registry/trainer:1", str(ROOT / "examples/quickstart.yaml")]) == 0
    objects = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [item["kind"] for item in objects] == ["Service", "Job"]
    assert objects[1]["spec"]["template"]["spec"]["containers"][0]["image"] == "registry/trainer:1"


def test_the_command_line_imports_neither_kopf_nor_torch_for_files() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from finetune_cli.main import main; "
        f"main(['plan', {str(ROOT / 'examples/quickstart.yaml')!r}]); "
        "print([m for m in ('kopf', 'kubernetes', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
