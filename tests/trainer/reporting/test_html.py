"""report.html: user data appears as text and never as markup, nothing is loaded, and the page is
written even if inputs are missing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_api import names
from finetune_api.messages import events
from finetune_api.messages.data_report import DataReport, Piece, RenderedSample, SplitReport
from finetune_api.messages.evaluation import Evaluation, Score
from finetune_api.messages.manifest import FileEntry, Manifest, ManifestJob
from finetune_api.messages.result import Result
from finetune_cli.main import main
from finetune_trainer.reporting.html import charts
from finetune_trainer.reporting.html import page as report

_NASTY = "</pre></article><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }} & \" '"
_MANIFEST = Manifest(
    kind="adapter",
    job=ManifestJob(namespace="default", name="tiny", uid="u-1", attempt=2),
    step=30,
    created="2026-01-01T00:00:00Z",
    files=(FileEntry(path="adapter_model.safetensors", size=2048, sha256="0" * 64),),
    provenance={
        "model": {"uri": "hf://tiny/model", "revision": None},
        "configuration": {"method": "lora", "evaluation": {"samples": 2}, "world": {"nodes": 1, "device": "cuda"}},
        "decisions": {"dtype": {"choice": "float32", "reason": _NASTY}},
        "cost": {"wallSeconds": 90.0, "phases": {"training": 60.0}},
    },
    metrics={"testLossBefore": 4.4, "testLossAfter": 2.78},
)


def _step(step: int, loss: float) -> events.StepEvent:
    return events.StepEvent(
        time=0, step=step, epoch=1, loss=loss, learning_rate=1, grad_norm=1, tokens=10, label_tokens=5, samples=1,
        seconds={"total": 0.5},
    )  # fmt: skip


def _eval(step: int, loss: float) -> events.EvalEvent:
    return events.EvalEvent(time=0, step=step, split="validation", loss=loss, label_tokens=5)


def _sample(index: int, text: str) -> events.SampleEvent:
    return events.SampleEvent(
        time=0, index=index, prompt=text, reference=text, before=text, after=text, row=10 * index
    )  # fmt: skip


def _files(text: str) -> dict[str, bytes]:
    history = [_step(step, 3.0 - step / 20) for step in range(1, 31)]
    lines = [*history, _eval(10, 2.0), _eval(20, 2.2), _eval(30, 2.4)]
    samples = [_sample(index, text) for index in range(4)]
    data = DataReport(
        max_sequence_length=64,
        splits=(SplitReport(split="train", rows=5, examples=5, read=5),),
        samples=(RenderedSample(split="train", row=1, pieces=(Piece(text=text, learnt=True),)),),
    )
    score = Score(name="rougeL", base=0.1, tuned=0.3, low=0.1, high=0.3, rows=9, how=text)
    return {
        names.HISTORY_PATH: "".join(events.encode(line) + "\n" for line in lines).encode(),
        names.SAMPLES_PATH: "".join(events.encode(sample) + "\n" for sample in samples).encode(),
        names.EVALUATION_PATH: Evaluation(scores=(score,)).model_dump_json(by_alias=True).encode(),
        names.DATA_REPORT_PATH: data.model_dump_json(by_alias=True).encode(),
    }


class _Page(HTMLParser):
    """A parsed page: its elements, what their attributes would load, the texts of its parts, and
    the full text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.parts: dict[str, list[str]] = {}
        self.raw: dict[str, str] = {}
        self.policy = ""
        self.text = ""
        self._open: str | None = None
        self._raw: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        self.loads += [str(values[name]) for name in ("src", "href", "data", "action") if name in values]
        self.handlers += [name for name in values if name.startswith("on") or name == "style"]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self._open = values.get("data-part")
        if self._open:
            self.parts.setdefault(self._open, []).append("")
        self._raw = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._open = self._raw = None

    def handle_data(self, data: str) -> None:
        if self._raw:
            self.raw[self._raw] = self.raw.get(self._raw, "") + data
        elif self._open:
            self.parts[self._open][-1] += data
        self.text += data


def _page(text: str = "words") -> _Page:
    files = _files(text)
    return _Page(report.page(report.read(_MANIFEST, files.get)))


def test_no_user_data_becomes_markup() -> None:
    plain, nasty = _page(), _page(_NASTY)
    assert nasty.tags == plain.tags
    assert nasty.handlers == []
    assert nasty.tags.count("script") == 1
    assert nasty.parts["tuned"] == [f"\n{_NASTY}"] * 2  # a browser drops the line break at the beginning of pre


def test_the_policy_allows_only_our_script_and_style() -> None:
    page = _page(_NASTY)
    for what in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.raw[what].encode()).digest()).decode()
        assert f"{what}-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert all(address.startswith("#") for address in page.loads)


@settings(max_examples=15, deadline=None)
@example("a\x85b\u2028c\x0cd")
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_shown_unchanged(text: str) -> None:
    assert _page(text).parts["base"] == [f"\n{text}"] * 2


def test_a_page_shows_what_is_known() -> None:
    text = " ".join(_page().text.split())
    expected = (
        "Succeeded", "tiny", "hf://tiny/model", "2.780", "better", "The model overfits", "2 of 4 answered rows",
        "90.0 s of GPU time", "adapter_model.safetensors",
    )  # fmt: skip
    for part in expected:
        assert part in text, part


@pytest.mark.parametrize("missing", [*_files(""), "all"])
def test_a_page_is_written_without_what_is_missing_or_torn(missing: str) -> None:
    files = _files("words")
    for path in files if missing == "all" else [missing]:
        files[path] = b'{"half": '
    page = _Page(report.page(report.read(_MANIFEST, files.get)))
    assert "h1" in page.tags
    bare = Manifest(kind="model", job=_MANIFEST.job, step=0, created="", files=())
    assert "Succeeded" in _Page(report.page(report.read(bare, {}.get))).text


def test_a_failed_run_explains_why() -> None:
    why = Result(outcome="failed", reason="OutOfMemory", message="rank 1 died", rank=1, log_tail="<b>last</b> line")
    facts = dataclasses.replace(
        report.read(_MANIFEST, _files("x").get), failure=why, hint="Give more.", samples=(), evaluation=None, data=None
    )
    text = _Page(report.page(facts)).text
    for part in ("Failed", "OutOfMemory", "rank 1 died", "Give more.", "<b>last</b> line"):
        assert part in text


def test_finetune_report_regenerates_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {**_files("words"), names.MANIFEST_PATH: _MANIFEST.model_dump_json(by_alias=True).encode()}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    out = tmp_path / "again.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    assert out.read_text() == report.page(report.read(_MANIFEST, files.get))
    assert main(["report", str(tmp_path / "finetune")]) == 2
    assert "finetune/manifest.json; give the folder of a finished result" in capsys.readouterr().err
    (tmp_path / names.MANIFEST_PATH).write_text(json.dumps({"kind": "cake"}))
    assert main(["report", str(tmp_path)]) == 2
    assert "isn't a manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (1.37, 4.41), (2.0, 2.0), (0.0, 0.0), (-3.0, 250.0), (1e-6, 2e-6)]
)
def test_ticks_are_round_and_few_and_cover_the_range(low: float, high: float) -> None:
    ticks = charts.ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert len(ticks) <= 8


def test_a_long_history_is_thinned_and_values_that_arent_finite_are_left_out() -> None:
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    assert len(charts.thinned(points)) <= 400
    chart = charts.chart([("train", [*points, (10_000.0, math.nan)])], written=None)
    assert chart is not None
    assert "nan" not in chart.lines[0].path
    assert charts.chart([("train", [(1.0, math.nan)])], written=1) is None
