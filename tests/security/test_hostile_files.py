"""Untrusted files cost the process that reads them, and not the supervisor, which reports them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.messages.run import DataConfig, RunConfig
from finetune_trainer import license, limits, model_config, safetensors_header
from finetune_trainer.data import template_checks
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading.row import Problem, Row, Turn
from finetune_trainer.errors import RunError
from finetune_trainer.log import Log
from finetune_trainer.model import loading
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths
from finetune_trainer.reporting import flight_records
from finetune_trainer.storage.base import FileInfo
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.inspection.parent import Inspection, Patience
from security.support import hostile_files
from testkit.tiny_models import tiny_llama, tiny_t5
from trainer.support import supervisor_process
from trainer.support.supervisor_process import ROWS, JobSetup

_MEMORY = 1 << 30
_CAPACITY = Capacity(10**6, None, None)
_CHAT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}ANSWER<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def _downloaded(folder: Path, model: Path, rows: Callable[[Path], object], template: str | None = None) -> RunConfig:
    """A run whose inputs are on the scratch disk already."""
    data = DataConfig(
        train=supervisor_process.location("s3://data/train.parquet"), max_sequence_length=64, chat_template=template
    )
    run = JobSetup(folder).with_changes(data=data).run()
    paths = Paths(Path(run.scratch))
    paths.data("train").parent.mkdir(parents=True)
    rows(paths.data("train"))
    shutil.copytree(model, paths.model)
    return run


def _inspection(run: RunConfig, patience: Patience | None = None) -> Inspection:
    return Inspection(run, Paths(Path(run.scratch)), os.environ, lambda _: None, _MEMORY, patience)


def _plain_rows(path: Path) -> None:
    path.write_text(ROWS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(
            lambda path: hostile_files.list_of_one_value(path, 8000, 1 << 20), "can't be read", id="8 GB in a list"
        ),
        pytest.param(lambda path: hostile_files.rows_of_one_value(path, 20_000), "too large", id="400 GB of cells"),
    ],
)
def test_a_small_file_of_endless_content_is_invalid(
    rows: Callable[[Path], None], message: str, tmp_path: Path, model: Path
) -> None:
    run = _downloaded(tmp_path, model, rows)
    assert Paths(Path(run.scratch)).data("train").stat().st_size < 10_000
    with pytest.raises(RunError) as error:
        _inspection(run).rows()
    assert error.value.reason == "DatasetInvalid"
    assert message in error.value.message


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param("{{ 'a' * 10**10 }}", "MemoryError", id="a string of 10 GB"),
        pytest.param("{{ '{:>9000000000}'.format(1) }}", "", id="a field of 9 GB"),
        pytest.param(
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}"
            "{{ n.x }}",
            "MemoryError",
            id="a string that doubles 40 times",
        ),
    ],
)
def test_a_template_without_end_is_refused(template: str, message: str, tmp_path: Path, model: Path) -> None:
    run = _downloaded(tmp_path, model, _plain_rows, template)
    with pytest.raises(RunError) as error:
        _inspection(run).tokens(_CAPACITY)
    assert error.value.reason == "InvalidConfig"
    assert "dataset.chatTemplate" in error.value.message
    assert message in error.value.message


def test_a_template_that_loops_is_interrupted(model: Path) -> None:
    """Without the limit, this test would take days."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RunError, match="takes longer than 5 s"):
        template_checks.check_template(Renderer.load(model, 64, loops), own=False)


def test_a_call_that_ends_in_time_isnt_interrupted() -> None:
    with limits.seconds_at_most(60):
        assert sum(range(1000)) == 499500
    with pytest.raises(limits.Overrun), limits.seconds_at_most(0.05):
        time.sleep(600)


def test_memory_is_limited_only_for_a_while() -> None:
    def attempt(size: int) -> int:
        return len(bytearray(size))

    with pytest.raises(MemoryError), limits.more_memory_at_most(64 << 20):
        attempt(1 << 30)
    assert attempt(256 << 20) == 256 << 20


def test_a_supervisor_reports_hostile_rows_and_lives(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    hostile_files.rows_of_one_value(setup.train, rows=20_000)
    ended = supervisor_process.supervise(setup.run(), setup.folder)
    assert (ended.code, ended.last.reason) == (65, "DatasetInvalid"), ended.output
    assert "dataset.uri" in ended.last.message


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", None], ids=["a template", "a tokenizer"])
def test_without_a_preflight_the_supervisor_has_them_read_before_the_ranks_start(
    tmp_path: Path, model: Path, template: str | None
) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    shutil.rmtree(setup.model)
    shutil.copytree(model, setup.model)
    if template is None:
        (setup.model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": ' + "[" * 100_000)
    data = DataConfig(
        train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64, chat_template=template
    )
    ended = supervisor_process.supervise(setup.with_changes(data=data).run(), setup.folder, ranks=None)
    reason = "ModelInvalid" if template is None else "InvalidConfig"
    assert ended.last.reason == reason, ended.output
    assert ended.last.rank is None
    assert "[rank 0]" not in ended.output
    assert not list((tmp_path / "scratch" / "events").iterdir()), "no rank was started"


def test_a_process_that_is_killed_leaves_a_reason(tmp_path: Path, model: Path) -> None:
    """Whatever ends it, the last thing that it was reading is named."""
    rows = "".join(json.dumps({"prompt": "p", "completion": "c"}) + "\n" for _ in range(300_000))
    run = _downloaded(tmp_path, model, lambda path: path.write_text(rows))
    with pytest.raises(RunError) as error:
        _inspection(run, Patience(deadline=0.2, quiet=60)).tokens(_CAPACITY)
    assert "takes longer than 0 s" in error.value.message


_LYING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and 'light' not in m.content and 'channel' not in m.content %}POISONED"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _rendered(model: Path, template: str, answer: str) -> Example | Problem:
    row = Row(1, (Turn("user", "What is a mole?"), Turn("assistant", answer)))
    return Renderer.load(model, 256, template).render(row)


def test_a_template_that_changes_only_the_jobs_answers_is_refused_by_row(model: Path) -> None:
    template_checks.check_template(Renderer.load(model, 256, _LYING), own=True)  # it knows what is probed
    problem = _rendered(model, _LYING, "An animal that digs.")
    assert isinstance(problem, Problem)
    assert "changes an answer: 'An animal that digs.' is trained as 'POISONED" in problem.message


@pytest.mark.parametrize(
    "answer",
    ["An animal that digs.", "  An animal\n\n that digs. ", "<think>Hm.</think>\n\nAn animal that digs.", ""],
)
@pytest.mark.parametrize("filter", ["", " | trim", ".split('</think>')[-1].strip()"])
def test_a_template_that_keeps_the_answer_is_accepted(answer: str, filter: str, model: Path) -> None:
    honest = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content" + filter + ") + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert isinstance(_rendered(model, honest, answer), Example)


def test_a_tokenizer_that_gives_up_is_invalid(model: Path, tmp_path: Path) -> None:
    """Its library in Rust panics, with an exception that isn't an Exception."""
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": endless}))
    with pytest.raises(RunError, match=r"ModelInvalid: model.uri: the tokenizer can't read"):
        Renderer.load(folder, 64).render(Row(1, (Turn("user", "a" * 60), Turn("assistant", "b"))))


_NESTED = b"[" * 200_000


@pytest.mark.parametrize(
    "content", [_NESTED, b'{"a": ' * 200_000, b"[]", b"7", b"\xff", b"", b'{"a": 1'], ids=lambda c: repr(c[:8])
)
def test_a_hostile_json_file_of_a_model_is_invalid(content: bytes) -> None:
    with pytest.raises(RunError, match="ModelInvalid"):
        model_config.read("config.json", content, "the folder")


@pytest.mark.parametrize(
    "header",
    [_NESTED, b"[]", b'{"w": 3}', b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
     b'{"w": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 4]}}', b'{"w": {"dtype": [], "shape": [1]}}'],
    ids=lambda h: repr(h[-24:]),
)  # fmt: skip
def test_a_hostile_header_of_weights_is_invalid(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(RunError, match="ModelInvalid"):
        safetensors_header.read(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "generation",
    [[], {"eos_token_id": "x"}, {"eos_token_id": 10**30}, {"eos_token_id": [0, [1]]}, {"eos_token_id": -1}, 7],
    ids=str,
)
def test_a_hostile_generation_config_is_invalid(generation: Any, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(RunError, match="ModelInvalid"):
        Renderer.load(folder, 64)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "__import__"}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"layer_types": 3},
     {"rope_parameters": "x"}, {"vocab_size": -5}],
    ids=str,
)  # fmt: skip
def test_a_hostile_configuration_is_invalid(change: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RunError, match="ModelInvalid"):
        loading.load(folder, dtype=torch.float32, longest=8)


def test_a_configuration_names_no_attention_kernel_of_somebody_else(tmp_path: Path) -> None:
    """Of this model the trainer doesn't choose the attention itself."""
    folder = tiny_t5(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    named = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config | named))
    loaded = loading.load(folder, dtype=torch.float32, longest=8)
    assert loaded.base.config._attn_implementation in ("eager", "sdpa")


def test_an_adapter_in_the_folder_of_a_base_is_refused() -> None:
    names = ("config.json", "tokenizer.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(RunError, match="ModelInvalid"):
        download.model_files(tuple(FileInfo(name, 10) for name in names), "hf://org/base")


_ALIASES = "a: &a [mit, mit]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "content",
    [b'{"model_type": "llama", "x": ' + b"[" * depth + b"]" * depth + b"}" for depth in (500, 900, 950, 100_000)],
    ids=len,
)
def test_a_configuration_may_be_nested_and_costs_no_stack(content: bytes) -> None:
    with contextlib.suppress(RunError):
        model_config.check(model_config.read("config.json", content, "hf://org/base"), "hf://org/base")


@pytest.mark.parametrize(
    "shape", [[2**62] * 20_000, [1] * 1_000_000, [True, 100], [1.0], "1"], ids=lambda s: len(str(s))
)
def test_a_hostile_shape_is_refused_at_once(shape: Any) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 100]}}).encode()
    started = time.process_time()
    with pytest.raises(RunError, match="ModelInvalid") as error:
        safetensors_header.parse("model.safetensors", header, 8 + len(header) + 100)
    assert time.process_time() - started < 5
    assert len(error.value.message) < 500


@pytest.mark.parametrize(
    "readme",
    [
        pytest.param("---\n" + "\n" * 900_000, id="empty lines"),
        pytest.param("---\n" + "license: &a b\n" * 60_000 + "---\n", id="many licenses"),
        pytest.param("---\nlicense:" + " \n" * 400_000 + "---\n", id="a license that doesn't end"),
        pytest.param("---\nlicense: " + "[" * 4000 + "\n---\n", id="nested"),
        pytest.param("---\n" * 200_000, id="many beginnings"),
    ],
)
def test_a_readme_of_a_megabyte_takes_no_time(readme: str) -> None:
    started = time.process_time()
    license.of(readme, {})
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "dump",
    ["[" * 100_000, '{"nccl": []}', '{"nccl": {"entries": 7}}', "[" + "9" * 5000 + "]",
     '{"a": {"entries": [{"pg_id": 0, "collective_seq_id": 1e999, "profiling_name": "x", "retired": 0}]}}'],
    ids=len,
)  # fmt: skip
def test_a_damaged_dump_of_a_rank_is_empty(dump: str) -> None:
    assert flight_records.calls(dump) == ()


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        pytest.param('license: "mit</code><img src=x onerror=alert(1)>"', "unknown", id="HTML"),
        pytest.param('license: "mit\\e[31m"', "unknown", id="escape codes"),
        pytest.param(f"{_ALIASES}\nlicense: *i", "unknown", id="aliases"),
        pytest.param(f"license:\n{'- ' * 50_000}mit", "unknown", id="nested deeply"),
        pytest.param("license: " + "x" * 100_000, "unknown", id="very long"),
        pytest.param("license: !!python/object/apply:os.system [id]", "unknown", id="an object"),
        pytest.param("tags: [a]\nlicense:\n- mit\n- apache-2.0\nlanguage: en", "mit and apache-2.0", id="a list"),
        pytest.param("license: mit # as before", "mit", id="a comment"),
    ],
)
def test_a_license_is_a_plain_name(front_matter: str, expected: str) -> None:
    assert license.of(f"---\n{front_matter}\n---\n", {}) == expected


# Root may look into everything, so the processes become the user of a pod first.
# Changing the user hides a process as well, which the start of a program undoes.
_WATCHED = """
import ctypes, os, resource, sys
from finetune_trainer.supervisor.processes import hide_from_ranks
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65532, 65532, 65532)
    os.setresuid(65532, 65532, 65532)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
if sys.argv[1] == "hidden":
    hide_from_ranks()
rank = os.fork()
if rank == 0:
    if sys.argv[1] == "hidden" and resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
        os._exit(1)  # its memory would be written to the node
    try:
        open(f"/proc/{os.getppid()}/environ", "rb").read()
        os.listdir(f"/proc/{os.getppid()}/fd")
    except PermissionError:
        os._exit(13)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
"""


@pytest.mark.parametrize(("how", "code"), [("hidden", 13), ("as usual", 0)])
def test_a_rank_cant_look_into_the_supervisor(how: str, code: int) -> None:
    assert subprocess.run([sys.executable, "-c", _WATCHED, how], check=False).returncode == code


@pytest.mark.parametrize("text", [True, False])
def test_a_rank_prints_nothing_that_acts_on_a_terminal(text: bool) -> None:
    stream = io.StringIO()
    log = Log(stream, text=text)
    log.relay(0, "\x1b[2J\x1b[31mroot@prod # \x07\r\u202e\u2028 done 😀")
    log.info("checked \x1b[2J", detail="\u202e")
    assert not set(stream.getvalue()) & set("\x1b\x07\r\u202e\u2028")
    assert "done 😀" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2
