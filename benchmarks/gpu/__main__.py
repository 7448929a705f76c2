"""Tests and times the trainer on a real GPU in minutes, through its own entry points.

Stages run one after the other, each in its own process with a time limit, so one that fails or
hangs never stops the next. Each finding is printed as soon as it is known, and OUT/gpu-check.json
is complete after every line.

  make gpu-check                                  on a machine with an NVIDIA GPU
  make gpu-check STAGES=ranks,large BUDGET=590     some stages, in at most 590 seconds
  make gpu-check REHEARSE=1                       every stage on a CPU at tiny sizes, with the
                                                  package versions of a GPU machine
  make gpu-carry                                  collects the wheels that a GPU machine without
                                                  network lacks in .gpu-carry
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import catalog, packages, rehearsal, runner
from benchmarks.gpu.results import Finding, Results, StageEnd

_INSIDE = "GPU_CHECK_REHEARSES"  # set in the process that runs with a GPU machine's package versions


def main() -> int:
    """Returns 0 if all is right, 1 if something is wrong, 2 if there is no GPU."""
    options = _options()
    cache = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator")
    if options.rehearse and not options.here and _INSIDE not in os.environ:
        return _rehearse(cache)
    site = packages.unpacked(_writable(options.out))
    os.environ["PYTHONPATH"] = packages.python_path(site)
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not _has_gpu():
        print(
            "gpu-check: PyTorch can use no GPU here. `make gpu-check REHEARSE=1` rehearses on a CPU.", file=sys.stderr
        )
        return 2
    arguments = ["--device", device, "--out", str(options.out)]
    arguments += ["--tiny"] * options.rehearse + ["--short"] * options.short
    results = Results(options.out / "gpu-check.json", _about(options))
    _check(options, results, arguments)
    code = _summary(results, options.out / "gpu-check.json")
    if options.print:
        print(f"--- gpu-check.json\n{(options.out / 'gpu-check.json').read_text()}", end="", flush=True)
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(stage.name for stage in catalog.STAGES)
    parser.add_argument("--stages", default="", metavar="LIST", help=f"comma-separated list of {names} (default: all)")
    parser.add_argument(
        "--budget", type=float, default=0.0, metavar="SECONDS", help="time limit of all stages together (default: none)"
    )
    parser.add_argument("--out", type=Path, default=packages.ROOT / "out" / "gpu-check", metavar="DIR",
                        help="results, logs and profiles (default: out/gpu-check)")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU at tiny sizes")
    parser.add_argument(
        "--here", action="store_true", help="rehearse with the package versions that are installed here"
    )
    parser.add_argument("--short", action="store_true", help="run only a few cases of stages with many similar ones")
    parser.add_argument(
        "--print", action="store_true", help="print the results file at the end, so that a pod's log has it"
    )
    parser.add_argument("--commit", default="", help="commit of the code (default: read from git)")
    options = parser.parse_args()
    try:
        options.stages = catalog.chosen([name for name in options.stages.split(",") if name])
    except catalog.UnknownStage as error:
        parser.error(str(error))
    options.out = options.out.resolve()
    return options


def _rehearse(cache: Path) -> int:
    """Runs this command again in an environment like that of a GPU machine."""
    cache.mkdir(parents=True, exist_ok=True)
    machine = rehearsal.environment(cache)
    if machine.remark:
        print(f"gpu-check: {machine.remark}", file=sys.stderr)
    if not packages.wheels() and not (packages.ROOT / packages.FOLDER).is_dir():
        raise SystemExit("gpu-check: there are no wheels in .gpu-carry; run `make gpu-carry` first")
    environment = {**os.environ, **machine.variables, _INSIDE: machine.remark or "1", "PYTHONNOUSERSITE": "1"}
    command = [machine.python, "-m", "benchmarks.gpu", *sys.argv[1:]]
    environment["PYTHONPATH"] = os.pathsep.join([machine.variables["PYTHONPATH"], str(packages.ROOT)])
    return subprocess.run(command, env=environment).returncode


def _check(options: argparse.Namespace, results: Results, arguments: list[str]) -> None:
    end = time.monotonic() + options.budget if options.budget else float("inf")

    def add(finding: Finding) -> None:
        results.add(finding)
        print(finding.line(), flush=True)

    for stage in options.stages:
        left = end - time.monotonic()
        if left < 5:
            results.end(StageEnd(stage.name, "not begun: the budget is spent", 0.0))
            print(f"{stage.name:<10} not started: the budget of {options.budget:.0f} s is spent", flush=True)
            continue
        limit = catalog.limit(stage, rehearsal=options.rehearse, left=left)
        command = [sys.executable, "-m", f"benchmarks.gpu.stages.{stage.name}", *arguments]
        ended = runner.run(stage.name, command, limit, os.environ, options.out, add)
        results.end(ended)
        print(f"{stage.name:<10} {ended.ended} after {ended.seconds:.0f} s of {limit:.0f}", flush=True)
        if ended.log:
            print("\n".join(f"           | {line[:160]}" for line in ended.log.splitlines()[-6:]), flush=True)


def _summary(results: Results, path: Path) -> int:
    """Prints the totals. Returns 1 if something is wrong or a stage failed, else 0."""
    counts = {
        v: sum(f.verdict == v for f in results.findings) for v in ("right", "wrong", "figure", "skipped", "failed")
    }
    failed = [stage.stage for stage in results.stages if stage.ended != "done"]
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {path}", flush=True)
    if failed:
        print(f"stages that failed: {', '.join(failed)}", flush=True)
    return 1 if failed or counts["wrong"] or counts["failed"] else 0


def _about(options: argparse.Namespace) -> dict[str, Any]:
    remark = os.environ.get(_INSIDE, "")
    return {
        "commit": options.commit or _commit(),
        "code": packages.code_digest(),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": options.rehearse,
        "remark": "" if remark == "1" else remark,
        "short": options.short,
    }


def _commit() -> str:
    if shutil.which("git") is None or not (packages.ROOT / ".git").exists():
        return ""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=packages.ROOT, capture_output=True, text=True)
    return answer.stdout.strip()


def _has_gpu() -> bool:
    """Whether PyTorch can use a GPU.

    A separate process checks it, so that this one allocates no GPU memory.
    """
    program = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True).returncode == 0


def _writable(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    return Path(os.environ.get("TMPDIR", "/tmp"))


if __name__ == "__main__":
    sys.exit(main())
