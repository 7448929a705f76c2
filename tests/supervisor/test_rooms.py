"""The pure rooms: what a folder must hold, how a bucket is opened, what events amount to, where a file may lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api import events as e
from finetune_api.run import S3Config
from finetune_trainer import fetch, history, state
from finetune_trainer.bucket import access_options
from finetune_trainer.failure import Failed
from finetune_trainer.folder import FolderPlace
from finetune_trainer.memory import oom_kills
from finetune_trainer.place import Entry
from finetune_trainer.tail import Tail, last_lines

GOOD = ("config.json", "tokenizer.json", "model.safetensors")

MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "ModelNotFound"),
    "no configuration": (GOOD[1:], "ModelInvalid"),
    "no weights": (GOOD[:2], "ModelInvalid"),
    "pickles only": ((*GOOD[:2], "pytorch_model.bin"), "ModelInvalid"),
    "no tokenizer": ((GOOD[0], GOOD[2]), "ModelInvalid"),
    "weights in a sub-folder": ((*GOOD[:2], "onnx/model.safetensors"), "ModelInvalid"),
}


def entries(*paths: str) -> tuple[Entry, ...]:
    return tuple(Entry(path, 1) for path in paths)


@pytest.mark.parametrize(("paths", "reason"), MODELS.values(), ids=MODELS)
def test_a_folder_that_is_no_safe_model_is_refused(paths: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Failed) as refused:
        fetch.wanted_files(entries(*paths), "s3://m/x")
    assert refused.value.reason == reason
    assert "s3://m/x" in refused.value.message


def test_only_safe_and_useful_files_of_a_model_are_wanted() -> None:
    more = ("chat_template.jinja", "pytorch_model.bin", "modeling_x.py", "original/params.json", "README.md", "a.gguf")
    wanted = fetch.wanted_files(entries(*GOOD, *more), "x")
    assert {entry.path for entry in wanted} == {*GOOD, "chat_template.jinja", "README.md"}  # names the licence
    without = fetch.wanted_files(entries(*GOOD), "x", weights=False)
    assert {entry.path for entry in without} == set(GOOD[:2])


KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}
MINE = S3Config(endpoint="http://s3:9000", region="eu-central-1", allow_http=True)

ACCESS: dict[str, tuple[S3Config, dict[str, str] | None, dict[str, str], dict[str, Any]]] = {
    "the Secret's keys": (S3Config(), KEYS, {}, {"access_key_id": "a", "region": "us-east-1", "endpoint": None}),
    "the Secret's endpoint wins": (MINE, {**KEYS, "AWS_ENDPOINT_URL": "https://own"}, {}, {"endpoint": "https://own"}),
    "the administrator's endpoint": (MINE, KEYS, {"AWS_ENDPOINT_URL": "http://env"}, {"endpoint": "http://s3:9000"}),
    "the Secret's region": (MINE, {**KEYS, "AWS_REGION": "r"}, {}, {"region": "r"}),
    "a session token": (MINE, {**KEYS, "AWS_SESSION_TOKEN": "t"}, {}, {"session_token": "t"}),
    "nobody's keys at an own endpoint": (MINE, None, {}, {"skip_signature": True, "access_key_id": None}),
    "the environment's keys": (MINE, None, KEYS, {"skip_signature": None, "access_key_id": None}),
    "the pod's identity": (MINE, None, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}, {"skip_signature": None}),
    "nobody's keys at AWS": (S3Config(), None, {}, {"skip_signature": None, "endpoint": None}),
}


@pytest.mark.parametrize(("config", "secret", "environment", "wanted"), ACCESS.values(), ids=ACCESS)
def test_keys_and_endpoint_are_taken_in_order(
    config: S3Config, secret: dict[str, str] | None, environment: dict[str, str], wanted: dict[str, Any]
) -> None:
    options = access_options(config, secret, environment)
    assert {key: options.get(key) for key in wanted} == wanted


def test_a_secret_without_keys_is_refused_rather_than_ignored() -> None:
    with pytest.raises(Failed, match="neither AWS_ACCESS_KEY_ID nor AWS_SECRET_ACCESS_KEY"):
        access_options(MINE, {"password": "x"}, KEYS)


def step(number: int, tokens: int = 100, total: float = 0.5) -> e.StepEvent:
    return e.StepEvent(
        time=1.0, step=number, epoch=0.1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=tokens, label_tokens=1,
        samples=2, seconds={"total": total},
    )  # fmt: skip


def evaluated(number: int, split: str, loss: float) -> e.EvalEvent:
    return e.EvalEvent.model_validate({"time": 1.0, "step": number, "split": split, "loss": loss, "labelTokens": 1})


def folded(*events: e.Event) -> state.TrainingState:
    now = state.TrainingState()
    for event in events:
        now = state.after(now, event)
    return now


def test_speed_and_time_left_come_from_the_last_steps() -> None:
    plan = e.PlanEvent(
        time=1.0, total_steps=10, epochs=1, rows=1, tokens_per_epoch=1, label_tokens_per_epoch=1, padding_share=0,
        parameters=1, trainable_parameters=1,
    )  # fmt: skip
    now = folded(plan, *(step(i + 1) for i in range(4)))
    assert now.tokens_per_second == 200
    assert now.eta_seconds == 3
    assert folded(plan).eta_seconds is None


def test_the_eval_loss_that_is_reported_is_the_one_of_the_weights_that_were_written() -> None:
    now = folded(
        evaluated(4, "validation", 0.7), evaluated(8, "validation", 0.9), e.SavedEvent(time=1.0, path="/x", step=4)
    )
    assert now.evaluation is not None
    assert now.evaluation.eval_loss == 0.7


def test_the_first_test_loss_is_the_bases_and_the_last_the_results() -> None:
    now = folded(evaluated(0, "test", 4.0), evaluated(8, "test", 2.0))
    assert now.evaluation is not None
    assert (now.evaluation.test_loss_before, now.evaluation.test_loss_after) == (4.0, 2.0)


def test_a_restored_history_counts_tokens_but_not_this_attempts_steps() -> None:
    lines = history.parse("".join(e.encode(step(i)) + "\n" for i in range(1, 9)) + "{torn", until=6)
    now = state.restored(lines, 6)
    assert (now.step, now.steps_here, now.tokens, now.samples) == (6, 0, 600, 12)
    assert now.tokens_per_second is None


def test_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    file, line = tmp_path / "events.jsonl", e.encode(step(1))
    tail = Tail(file)
    assert tail.read() == ()
    file.write_text(line[:20])
    assert tail.read() == ()
    with file.open("a") as more:
        more.write(line[20:] + "\nnonsense\n" + e.encode(step(2)) + "\n")
    assert [event.step for event in tail.read() if isinstance(event, e.StepEvent)] == [1, 2]
    assert tail.read() == ()


def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = last_lines(file, 100)
    assert text.startswith("line 9")
    assert text.endswith("line 999")
    assert last_lines(tmp_path / "none") == ""


def test_a_link_that_leads_out_of_its_volume_is_refused(tmp_path: Path) -> None:
    claim, outside = tmp_path / "claim", tmp_path / "secret.jsonl"
    claim.mkdir()
    outside.write_text("{}")
    (claim / "train.jsonl").symlink_to(outside)
    (claim / "inside.jsonl").write_text("{}")
    (claim / "link.jsonl").symlink_to(claim / "inside.jsonl")
    place = FolderPlace(claim, role="dataset", display="pvc://claim", bounds=claim)
    with pytest.raises(Failed, match="leads out of its volume"):
        place.head("train.jsonl")
    assert place.head("link.jsonl") is not None
    with pytest.raises(Failed, match="leads out of its volume"):
        place.read("../secret.jsonl")


def test_a_folder_creates_only_what_is_not_there_and_leaves_no_part_behind(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path, role="output", display="x")
    assert place.create("a/b.json", b"1")
    assert not place.create("a/b.json", b"2")
    place.write("a/b.json", b"3")
    assert place.read("a/b.json") == b"3"
    assert [entry.path for entry in place.list()] == ["a/b.json"]
    place.delete(("a/b.json", "a/none"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 0\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"],
    ids=["cgroup v2", "cgroup v1"],
)
def test_kills_for_memory_are_read_from_either_cgroup_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert oom_kills((tmp_path / "none", tmp_path / "file")) == 2
    assert oom_kills((tmp_path / "none",)) == 0


def test_a_history_is_cut_at_the_step_that_is_asked_for() -> None:
    kept = history.History()
    for event in (step(1), evaluated(1, "validation", 1.0), step(2), e.PhaseEvent(time=1.0, phase="done")):
        kept.add(event)
    assert [json.loads(line)["type"] for line in kept.text(1).splitlines()] == ["step", "eval"]
    assert len(kept.text().splitlines()) == 3
