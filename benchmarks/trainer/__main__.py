"""Compares our trainer with TRL and LLaMA-Factory on four data sets, in one run.

TRL is measured with its defaults and with the fastest configuration of a search. The benchmark
prints one table and the targets, and writes benchmarks/results/trainer.json. It takes about 45
minutes on an otherwise idle machine with 2 cores. A configuration that fails becomes a row with
its error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("hack", "operator", "trainer_image"))]

from benchmarks.trainer import data, machine, ours, peers, processes, roof, search, table  # noqa: E402
from benchmarks.trainer import rows as result  # noqa: E402
from benchmarks.trainer.flops import Dimensions  # noqa: E402
from benchmarks.trainer.kept import MeasurementCache  # noqa: E402

from finetune_trainer.data.batching import batch_plan  # noqa: E402

SYSTEMS = ("finetune", "trl", "llamafactory")
EXTRAS = ("two-ranks", "start", "overhead", "curves")
SEED = 42
RESULTS = ROOT / "benchmarks/results/trainer.json"


def main() -> None:
    options = _options()
    if options.dry_run:
        return _show_data(options)
    bench = Bench(options)
    bench.measure()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", default=",".join(data.NAMES), help="comma-separated list (default: %(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated list (default: %(default)s)")
    parser.add_argument(
        "--extras", default=",".join(EXTRAS), help="comma-separated list, or '' for none (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="length of a final measurement (default: %(default)g)"
    )
    parser.add_argument(
        "--search-seconds", type=float, default=3.0, help="length of a search's measurement (default: %(default)g)"
    )
    parser.add_argument(
        "--finalists",
        type=int,
        default=2,
        help="configurations of a search that are measured again (default: %(default)d)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="very short measurements, to test the benchmark; their figures mean nothing",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every system (default: %(default)d)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="the GPU's dense bf16 peak, for MFU (cuda)")
    parser.add_argument("--model", type=Path, help="folder of another Llama-like model (default: SmolLM2-135M)")
    parser.add_argument("--keep-going", action="store_true", help="reuse the measurements of an interrupted run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only create the data sets and show their tokens")
    options = parser.parse_args()
    for name, known in (("datasets", data.NAMES), ("systems", SYSTEMS), ("extras", EXTRAS)):
        chosen = [part for part in getattr(options, name).split(",") if part]
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        setattr(options, name, chosen)
    if options.quick:
        options.seconds, options.search_seconds, options.finalists = 1.0, 0.3, 1
    return options


def _show_data(options: argparse.Namespace) -> None:
    print(f"{'data set':8} {'rows':>5} {'median':>7} {'mean':>7} {'longest':>7} {'labels':>7} {'common prefix':>13}")
    for name in options.datasets:
        s = data.statistics(name)
        print(
            f"{name:8} {s.rows:5} {s.median:7.0f} {s.mean:7.1f} {s.longest:7} {s.label_share:7.1%} {s.common_prefix:13}"
        )


class Bench:
    """One run of the full benchmark. All measurements are in `rows` and `extras`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = options.model or data.model_folder()
        self.size = Dimensions.of(json.loads((self.model / "config.json").read_text()))
        self.rows: list[dict[str, Any]] = []
        self.extras: dict[str, Any] = {}
        self.searched: dict[str, list[dict[str, Any]]] = {}
        self.scale = result.Scale(self.size, {})
        self._stored = MeasurementCache(ROOT, options)

    def measure(self) -> None:
        """Measures everything, prints the table and writes the result file after each part."""
        began = time.time()
        _show_data(self.options)
        facts = machine.facts(self.options.device)
        for warning in machine.warnings(self.options.threads):
            _report(f"WARNING: {warning}")
        _report("measuring the roof")
        self.scale = result.Scale(self.size, self._roof())
        for dataset in self.options.datasets:
            for system in self.options.systems:
                self._guarded(system, dataset)
                self._write(facts, began)
        for extra in self.options.extras:
            self._extra(extra)
            self._write(facts, began)
        self._write(facts, began)
        print()
        print(table.render(self.rows, table.aims(self.rows, self.extras)))
        _report(f"{time.time() - began:.0f} s; {self.options.out}")

    def _guarded(self, system: str, dataset: str) -> None:
        """Measures a system; if it fails, its row has the error, and the run continues."""
        try:
            {"finetune": self._finetune, "trl": self._trl, "llamafactory": self._llamafactory}[system](dataset)
        except Exception as error:
            self._add({"system": system, "config": "best", "dataset": dataset, "error": f"{error!r}"[:800]})

    def _roof(self) -> dict[str, Any]:
        window = 0.03 if self.options.quick else 0.15
        environment = processes.environment(self.options.threads, device=self.options.device, keeps_memory=True)
        return roof.measure(
            self.size,
            {**environment, "PYTHONPATH": f"{ROOT}:{ROOT}/trainer_image"},
            device=self.options.device,
            dtypes=("float32", "bfloat16"),
            seconds=window,
        )

    @property
    def _fast_bfloat16(self) -> bool:
        """Whether bfloat16 products are faster than float32 here; the same for every system."""
        known = {name: data.statistics(name) for name in data.NAMES[:1]}
        rates = {d: r["by_dataset"]["mixed"]["flops_per_second"] for d, r in result.of_roofs(self.scale, known).items()}
        return bool(rates["bfloat16"] > rates["float32"])

    # systems

    def request(self, dataset: str, **more: Any) -> ours.RunRequest:
        """Returns a run of our trainer on a data set; `more` overrides its fields."""
        settings = {
            "model": self.model,
            "rows": data.folder() / f"{dataset}.jsonl",
            "global_batch": data.GLOBAL_BATCH[dataset],
            "longest": data.LONGEST,
            "seconds": self.options.seconds,
            "timeout": 300 + 10 * self.options.seconds,
            "threads": self.options.threads,
            "device": self.options.device,
            **more,
        }
        return ours.RunRequest(**settings)

    def _finetune(self, dataset: str) -> None:
        def measure() -> dict[str, Any]:
            record = ours.run(self.request(dataset))
            return result.of_ours(dataset, data.statistics(dataset), record, self.scale)

        self._add(self._stored.get(f"finetune default {dataset}", measure))

    def task(self, dataset: str, global_batch: int = 0) -> peers.Task:
        """Returns a peer's task, with the rows in the order of our plan's first epoch.

        So step n of every system is trained on the same rows.
        """
        rows = data.rows(dataset)
        ordered = [rows[index] for index in batch_plan.order(SEED, 0, len(rows))]
        return peers.Task(
            self.model,
            ordered * 3,
            global_batch or data.GLOBAL_BATCH[dataset],
            data.LONGEST,
            ours.LEARNING_RATE,
            ours.DROPOUT,
            self.options.device,
            self.options.threads,
        )

    @property
    def _times(self) -> tuple[search.Times, search.Times]:
        """The times of the search and of final measurements."""
        quick = self.options.quick
        return (
            search.Times(0.3 if quick else 1.0, self.options.search_seconds, 1),
            search.Times(0.5 if quick else 3.0, self.options.seconds, 1 if quick else 2),
        )

    def _trl(self, dataset: str) -> None:
        task, (short, long) = self.task(dataset), self._times
        default = search.default(self._fast_bfloat16, replace(long, least=1))
        self._peer("trl", "default", dataset, task, default)
        known = data.statistics(dataset)
        formats = search.formats(search.dtypes(self._fast_bfloat16), short)
        probed = self._search("trl", dataset, "formats", task, formats)
        best = search.fastest(formats, probed, 1)
        if not best:
            raise RuntimeError(f"no configuration of TRL runs: {probed[0].get('error')}")
        dtype = next(
            d for d, config in zip(search.dtypes(self._fast_bfloat16), formats, strict=True) if config is best[0]
        )
        configs = search.families(dtype, known.mean, known.longest, short)
        answers = self._search("trl", dataset, "families", task, configs)
        finalists = search.fastest(configs, answers, self.options.finalists)
        self._final("trl", dataset, task, finalists, long)

    def _llamafactory(self, dataset: str) -> None:
        """Measures a reasonable best: small micro-batches, thus little padding, in its dtypes."""
        task, (short, long) = self.task(dataset), self._times
        chosen = search.dtypes(self._fast_bfloat16)[:2]
        configs = [config for dtype in chosen for config in search.few(dtype, short)]
        answers = self._search("llamafactory", dataset, "few", task, configs)
        self._final("llamafactory", dataset, task, search.fastest(configs, answers, 1), long)

    def _search(
        self, peer: str, dataset: str, what: str, task: peers.Task, configs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        _report(f"{dataset}: {peer}, searching among {len(configs)} configurations ({what})")
        answers: list[dict[str, Any]] = self._stored.get(
            f"{peer} {what} {dataset}",
            lambda: peers.measure(peer, task, configs, 120 + 60 * len(configs)),
            peer=True,
        )
        shown = [
            {
                "name": answer["name"],
                **({"tokens_per_second": search.rate(answer)} if search.rate(answer) else {}),
                **{key: answer[key] for key in ("seconds", "micro_batches", "error", "skipped") if key in answer},
            }
            for answer in answers
        ]
        self.searched.setdefault(f"{peer} {dataset}", []).extend(shown)
        return answers

    def _final(self, peer: str, dataset: str, task: peers.Task, finalists: list[Any], times: search.Times) -> None:
        """Measures each finalist in a new process; the fastest becomes the row `best`.

        The others are stored with the search's results.
        """
        results = [self._measured(peer, "best", dataset, task, search.again(config, times)) for config in finalists]
        results.sort(key=lambda row: -row.get("tokens_per_second", 0.0))
        if not results:
            raise RuntimeError(f"no configuration of {peer} could be measured")
        self._add(results[0])
        if self.options.device == "cpu":
            (request,) = (config for config in finalists if config["name"] == results[0]["what"])
            task_with_allocator = replace(task, keeps_memory=True)
            self._peer(peer, "best, memory kept", dataset, task_with_allocator, search.again(request, times))
        for row in results[1:]:
            self.searched.setdefault(f"{peer} {dataset}", []).append({**row, "config": "finalist"})

    def _peer(self, peer: str, config: str, dataset: str, task: peers.Task, request: dict[str, Any]) -> None:
        self._add(self._measured(peer, config, dataset, task, request))

    def _measured(
        self, peer: str, config: str, dataset: str, task: peers.Task, request: dict[str, Any]
    ) -> dict[str, Any]:
        _report(f"{dataset}: {peer}, {request['name']}")

        def measure() -> dict[str, Any]:
            (answer,) = peers.measure(peer, task, [request], 300 + 10 * self.options.seconds)
            return answer

        answer = self._stored.get(f"{peer} {config} {dataset} {request['name']}", measure, peer=True)
        return result.of_peer(peer, config, dataset, request, answer, self.scale)

    def _extra(self, name: str) -> None:
        from benchmarks.trainer import extras

        try:
            _report(f"extra: {name}")
            self.extras[name.replace("-", "_")] = self._stored.get(name, lambda: extras.MEASURES[name](self))
        except Exception as error:
            self.extras[name.replace("-", "_")] = {"error": f"{error!r}"[:800]}

    def _add(self, row: dict[str, Any]) -> None:
        if self.options.peak_tflops and "details" in row:
            row["mfu"] = row["details"]["flops_per_second"] / (self.options.peak_tflops * 1e12)
        self.rows.append(row)
        shown = row.get("error") or f"{row['tokens_per_second']:.0f} tokens/s, {row['roof_share']:.0%} of the roof"
        _report(f"{row['dataset']}: {row['system']} {row['config']}: {shown}")

    def _write(self, facts: dict[str, Any], began: float) -> None:
        known = {name: data.statistics(name) for name in data.NAMES}
        document = {
            "machine": facts,
            "options": {k: v for k, v in vars(self.options).items() if k not in ("out", "model", "keep_going")},
            "seconds": time.time() - began,
            "datasets": {name: vars(s) for name, s in known.items()},
            "roof": result.of_roofs(self.scale, known),
            "rows": self.rows,
            "searched": self.searched,
            "extras": self.extras,
            "aims": [aim.to_json() for aim in table.aims(self.rows, self.extras)],
        }
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(document, indent=1) + "\n")


def _report(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
