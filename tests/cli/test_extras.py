"""Commands without the optional packages: one line names the extra that is missing, and what needs
none still works."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_cli.main import EXTRAS, explanation

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "examples" / "quickstart.yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages that are installed under another name, or as a part of another package.
_INSTALLED_AS = {
    "pynvml": "nvidia-ml-py", "mlflow": "mlflow-skinny", "markupsafe": "jinja2", "tokenizers": "transformers",
}  # fmt: skip
_WITHOUT = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')));"


def run_without(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `finetune` as if these packages weren't installed."""
    code = f"{_WITHOUT} from finetune_cli.main import main; sys.exit(main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, ",".join(packages), *arguments]
    environment = {"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'trainer_image'}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)


def finished_result(folder: Path) -> str:
    manifest = {
        "kind": "adapter",
        "job": {"namespace": "ns", "name": "job", "uid": "u", "attempt": 1},
        "step": 1,
        "created": "2026-01-31T12:00:00Z",
        "files": [],
    }
    (folder / "finetune").mkdir()
    (folder / "finetune" / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("report", "s3://models/v1", "--out", "-"), "obstore", "trainer"),
        (("report", "gs://models/v1", "--out", "-"), "obstore", "trainer"),
        (("report", "hf://org/model", "--out", "-"), "huggingface_hub", "trainer"),
        (("report", "RESULT", "--out", "-"), "markupsafe", "cli"),
        (("serve-manifest", "s3://models/v1", "--for", "vllm"), "obstore", "trainer"),
        (("serve-manifest", "hf://org/model", "--for", "vllm"), "huggingface_hub", "trainer"),
        (("run", JOB), "torch, transformers, peft, accelerate, obstore, rich", "cli,trainer"),
        (("validate", JOB, "--data", "ROWS"), "numpy", "trainer"),
        (("validate", JOB, "--data", "ROWS", "--model", "RESULT"), "numpy", "trainer"),
    ],
    ids=lambda value: " ".join(value[:2]).replace(JOB, "FILE") if isinstance(value, tuple) else None,
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    arguments: tuple[str, ...], package: str, extra: str, tmp_path: Path
) -> None:
    files = {"RESULT": finished_result(tmp_path), "ROWS": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    ended = run_without([*EXTRAS], *(files.get(argument, argument) for argument in arguments))
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    verb = "aren't" if "," in package else "isn't"
    assert line.startswith(f"finetune {arguments[0]}: {package} {verb} installed; install finetune-operator[{extra}]")
    assert f"pip install '.[{extra}]'" in line
    assert ended.stdout == ""


@pytest.mark.parametrize("package", ["rich", "obstore"])
def test_a_run_names_only_what_it_lacks(package: str) -> None:
    ended = run_without([package], "run", "/nowhere.yaml")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"finetune run: {package} isn't installed; install ")


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("transformers", ("--data", "rows.jsonl", "--model", ".")), ("pyarrow", ("--data", "rows.parquet"))],
)
def test_a_package_that_only_some_rows_need_is_not_mistaken_for_a_broken_file(
    package: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 PAR1")
    (tmp_path / "tokenizer.json").write_text("{}")
    paths = [str(tmp_path / argument) if "rows" in argument or argument == "." else argument for argument in arguments]
    ended = run_without([package], "validate", JOB, *paths)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"finetune validate: {package} isn't installed; install ")


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("run", "--help"), ("plan", JOB), ("validate", JOB)]
)
def test_files_can_be_checked_without_any_extra(arguments: tuple[str, ...]) -> None:
    ended = run_without([*EXTRAS], *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_module_that_belongs_to_no_extra_is_not_explained_away() -> None:
    assert explanation(ModuleNotFoundError("x", name="finetune_trainer.no_such_module")) is None
    assert explanation(ModuleNotFoundError("x")) is None


def _imports() -> Iterator[str]:
    """Yields the top-level package of every import of the sources."""
    for folder in ("operator", "trainer_image"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    yield node.module.partition(".")[0]
                elif isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)


def test_every_package_that_the_sources_import_has_an_extra_unless_all_installations_have_it() -> None:
    ours = {"finetune_api", "finetune_cli", "finetune_operator", "finetune_trainer"}
    installed = {"pydantic", "pydantic_core", "yaml", "triton"}  # torch brings triton where a GPU can be
    others = set(_imports()) - ours - set(sys.stdlib_module_names) - installed
    assert others <= EXTRAS.keys()


def test_every_extra_installs_what_is_said_to_be_in_it() -> None:
    installs = {
        extra: {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
        for extra, requirements in PROJECT["optional-dependencies"].items()
    }
    for package, extra in EXTRAS.items():
        assert _INSTALLED_AS.get(package, package.replace("_", "-")) in installs[extra], package
