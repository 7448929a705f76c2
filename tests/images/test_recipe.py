"""What changes an image's key, and what doesn't."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from finetune_trainer.kernels import kernel_build
from images.cache import uv_program
from images.cli import REPOSITORY, files_of
from images.errors import ImagesError
from images.recipe import LABEL_KEY, RECIPES, content_key, order

FILES = {"a": b"1", "b": b"2"}


def test_the_order_of_files_does_not_matter() -> None:
    assert content_key(FILES, "base") == content_key(dict(reversed(FILES.items())), "base")


@pytest.mark.parametrize(
    ("files", "base"),
    [
        ({"a": b"1", "b": b"3"}, "base"),
        ({"a": b"1", "c": b"2"}, "base"),
        ({"a": b"1"}, "base"),
        ({"a": b"1b", "": b"2"}, "base"),
        (FILES, "another base"),
    ],
    ids=["content", "name", "a file less", "moved border", "base"],
)
def test_any_change_gives_another_key(files: dict[str, bytes], base: str) -> None:
    assert content_key(files, base) != content_key(FILES, "base")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_what_its_dockerfile_copies(name: str) -> None:
    recipe = RECIPES[name]
    copied = [
        line.split()[1]
        for line in (REPOSITORY / recipe.dockerfile).read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line and "/src/" not in line
    ]
    assert sorted(copied) == sorted(recipe.sources)


def test_the_attention_kernel_is_compiled_and_named_as_the_trainer_does() -> None:
    dockerfile = (REPOSITORY / "trainer_image/Dockerfile").read_text()
    assert f"g++ {' '.join(kernel_build.FLAGS)} /src/{kernel_build.SOURCE.name}" in dockerfile
    assert f'-o "/opt/finetune/attention-$(sha256sum /src/{kernel_build.SOURCE.name} | cut -c1-16).so"' in dockerfile


def _trainer_environment() -> dict[str, str]:
    """Returns the variables of the trainer image's last stage."""
    dockerfile = (REPOSITORY / "trainer_image/Dockerfile").read_text().replace("\\\n", " ")
    (line,) = [line for line in dockerfile.splitlines() if line.startswith("ENV PATH=")]
    return dict(word.split("=", 1) for word in shlex.split(line.removeprefix("ENV ")))


def test_a_driver_that_is_too_old_for_the_locked_pytorch_is_refused_by_the_runtime() -> None:
    packages = {one["name"]: one["version"] for one in tomllib.loads((REPOSITORY / "uv.lock").read_text())["package"]}
    major, minor, *_ = packages["nvidia-cuda-runtime"].split(".")
    assert _trainer_environment()["NVIDIA_REQUIRE_CUDA"] == "cuda>=$OLDEST_CUDA"
    arguments = dict(re.findall(r"^ARG (\w+)=(.+)$", (REPOSITORY / "trainer_image/Dockerfile").read_text(), re.M))
    assert arguments["CUDA"] == arguments["OLDEST_CUDA"] == f"{major}.{minor}"


_LOCKED = """\
accelerate==1.0
cuda-toolkit==13.0 ; sys_platform == 'linux'
nvidia-ml-py==13.6
nvidia-nccl-cu13==2.2
torch==2.13.0 \\
triton==3.7
"""


@pytest.mark.parametrize(
    ("arguments", "code", "pytorch", "left_out"),
    [
        pytest.param({}, 0, "", [], id="the locked PyTorch"),
        pytest.param(
            {"CUDA": "12.6", "OLDEST_CUDA": "12.0", "PYTORCH_INDEX": "https://index.test"}, 0, "torch==2.13.0+cu126\n",
            ["cuda-toolkit", "nvidia-nccl-cu13", "torch", "triton"], id="for older drivers",
        ),
        pytest.param({"CUDA": "12.6", "OLDEST_CUDA": "12.0"}, 64, None, None, id="no index"),
        pytest.param({"CUDA": "12.6", "PYTORCH_INDEX": "https://index.test"}, 64, None, None, id="other driver"),
    ],
)  # fmt: skip
def test_pytorch_for_another_cuda_needs_an_index_and_replaces_what_belongs_to_cuda(
    tmp_path: Path, arguments: dict[str, str], code: int, pytorch: str | None, left_out: list[str] | None
) -> None:
    """The Dockerfile's own command, with a uv that writes the lines of a lock file."""
    text = (REPOSITORY / RECIPES["trainer"].dockerfile).read_text()
    (step,) = [step for step in text.replace("\\\n", "").split("\n") if step.startswith("RUN cd /src;")]
    for path in ("/src", "/uv/bin/uv", "/requirements.txt", "/pytorch.txt"):
        step = re.sub(rf"(?<=[ ;]){path}(?=[ ;])", str(tmp_path / Path(path).name), step + " ").rstrip()
    (tmp_path / "src").mkdir()
    (tmp_path / "locked").write_text(_LOCKED)
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp {tmp_path}/locked {tmp_path}/requirements.txt\n')
    uv.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "CUDA": "13.0", "OLDEST_CUDA": "13.0", "PYTORCH_INDEX": "", **arguments}
    done = subprocess.run(["/bin/sh", "-c", step.removeprefix("RUN ")], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert "CUDA=12.6 needs PYTORCH_INDEX" in done.stderr
        assert "OLDEST_CUDA=12.0" in done.stderr
        return
    assert (tmp_path / "pytorch.txt").read_text() == pytorch
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert re.findall(r"--no-emit-package=(\S+)", last) == left_out


def test_a_driver_that_is_mounted_without_nvidias_runtime_is_found() -> None:
    dockerfile = (REPOSITORY / "trainer_image/Dockerfile").read_text()
    assert _trainer_environment()["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert "echo /usr/local/nvidia/lib64 > /etc/ld.so.conf.d/nvidia.conf && ldconfig" in dockerfile


def test_the_image_has_what_nccl_loads_for_rdma() -> None:
    (line,) = [
        line
        for line in (REPOSITORY / "trainer_image/Dockerfile").read_text().splitlines()
        if "apt-get install" in line and "libibverbs1" in line
    ]
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(line.split())


def test_a_pod_without_a_gpu_sees_none() -> None:
    assert _trainer_environment()["NVIDIA_VISIBLE_DEVICES"] == "void"


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_names_reaches_the_build(name: str) -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {*RECIPES[name].sources, "pyproject.toml", "uv.lock"} <= allowed


def test_the_operator_image_contains_nothing_of_the_trainer() -> None:
    assert not [name for name in files_of(RECIPES["operator"]) if "trainer" in name]


def test_byte_code_never_changes_the_key() -> None:
    assert not [name for recipe in RECIPES.values() for name in files_of(recipe) if name.endswith(".pyc")]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match=r"operator/Dockerfile is missing"):
        files_of(RECIPES["operator"], tmp_path)


def test_a_build_has_its_key_as_a_label_and_the_base_as_an_argument() -> None:
    placed = order(RECIPES["operator"], "v1", "debian:x", FILES, "0.1.0")
    options = placed.options()
    assert placed.image == "localhost/finetune-operator:v1"
    assert f"{LABEL_KEY}={content_key(FILES, 'debian:x')}" in options
    assert options[options.index("--build-arg") + 1] == "BASE=debian:x"


@pytest.mark.parametrize("name", RECIPES)
def test_the_code_is_copied_after_everything_that_takes_long(name: str) -> None:
    lines = (REPOSITORY / RECIPES[name].dockerfile).read_text().splitlines()
    last_run = max(number for number, line in enumerate(lines) if line.startswith("RUN "))
    first_copy = min(
        number
        for number, line in enumerate(lines)
        if line.startswith("COPY ") and line.split()[1] in RECIPES[name].sources
    )
    assert last_run < first_copy


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_runs_as_a_numbered_user_who_is_not_root(name: str) -> None:
    assert "\nUSER 65532:65532\n" in (REPOSITORY / RECIPES[name].dockerfile).read_text()


@pytest.mark.parametrize(
    ("compiler", "header", "installed"),
    [(True, True, None), (False, True, "g++"), (True, False, "g++ python3-dev"), (False, False, "g++ python3-dev")],
)
def test_the_trainer_image_gets_what_triton_needs_to_build_a_launcher(
    tmp_path: Path, compiler: bool, header: bool, installed: str | None
) -> None:
    """The Dockerfile's own command, on a system that has only the programs below."""
    text = (REPOSITORY / RECIPES["trainer"].dockerfile).read_text()
    (command,) = [step for step in text.replace("\\\n", "").split("\n") if step.startswith("RUN header=")]
    programs = {"apt-get": 'echo "$@"', "python3": f"echo {tmp_path}", **({"g++": ""} if compiler else {})}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    if header:
        (tmp_path / "Python.h").touch()
    steps = command.removeprefix("RUN ").partition("&& rm ")[0] + "; }"
    done = subprocess.run(
        ["/bin/sh", "-c", steps], env={"PATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True, check=True
    )
    commands = [line for line in done.stdout.splitlines() if line.startswith(("update", "install"))]
    assert commands == ([] if installed is None else ["update", f"install -y --no-install-recommends {installed}"])


def test_uv_is_found_where_make_venv_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert uv_program() is None
    installed = tmp_path / "uv" / "bin" / "uv"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert uv_program() == installed
