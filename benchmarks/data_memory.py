"""Compares the trainer with `datasets`: time and memory for turning a large file into tokens.

    PYTHONPATH=operator:trainer_image:hack:. .venv/bin/python benchmarks/data_memory.py \\
        [--megabytes 300]

The rows are WordNet's 117,000 glosses, with different questions and a few neighboring glosses each,
so that no two are equal. Both read the file, render each row with SmolLM2's chat template, and
write the tokens of prompt and answer to disk. The trainer also finds common prefixes of rows and
makes the data report. The benchmark prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_QUESTIONS = (
    "What is meant by {}?", "Define {}.", "{}: what does it mean?", "Tell me what {} means.", "Explain {}, please.",
    "I have read {} in a book. What is that?", "Meaning of {}?", "In a phrase, {} is",
)  # fmt: skip


def rows(glosses: list[tuple[str, str]], size_limit: int) -> Iterator[str]:
    """Yields JSON lines of at most `size_limit` bytes in total.

    Row i of round r has r + i % 16 glosses after its own.
    """
    size = 0
    for round_number in range(1000):
        for index, (word, _) in enumerate(glosses):
            neighbors = glosses[index : index + 1 + round_number + index % 16]
            answer = " ".join(f"{other}: {gloss}." if at else gloss for at, (other, gloss) in enumerate(neighbors))
            prompt = _QUESTIONS[round_number % len(_QUESTIONS)].format(word)
            line = json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            if size > size_limit:
                return
            yield line


def glosses(folder: Path) -> list[tuple[str, str]]:
    """Returns (word, gloss) of every synset, in WordNet's order."""
    samples = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text().splitlines():
            synset, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" "):
                word = re.sub(r"\(.*", "", synset.split()[4]).replace("_", " ")
                samples.append((word, gloss.strip()))
    return samples


def file(megabytes: int) -> Path:
    """Returns the cached file with the rows, created if it is missing."""
    from demo_assets.package import debian_files, write_once

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            share = debian_files("wordnet-base", Path(scratch)) / "usr/share/wordnet"
            with (target / "rows.jsonl").open("w") as out:
                out.writelines(rows(glosses(share), megabytes << 20))

    source = hashlib.sha256(Path(__file__).read_bytes().partition(b"\ndef file")[0]).hexdigest()[:12]
    return write_once(f"bench-data-{megabytes}-{source}", write) / "rows.jsonl"


# ---- The measured programs: each runs in its own process and prints its figures as one JSON line.


def ours(path: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Reads the rows as the trainer's preflight does; returns sizes and seconds."""
    from finetune_trainer.data import quality_report, token_cache
    from finetune_trainer.data.chat_rendering import Renderer
    from finetune_trainer.data.preparation import ReadOptions
    from finetune_trainer.data.row_statistics import RowStatistics
    from finetune_trainer.data.splits import split_rows

    renderer = Renderer.load(model, 2048)
    begin = time.perf_counter()
    cache = token_cache.build(folder, "cache", path, ReadOptions("dataset.uri", renderer, "fail"))
    built = time.perf_counter()
    quality_report.report(
        split_rows({"train": RowStatistics.of_tokens(cache)}, 0.05, None),
        max_length=2048,
        renderer=renderer,
    )
    return {
        "rows": len(cache), "tokens": int(cache.lengths.sum()),
        "tokens_seconds": built - begin, "report_seconds": time.perf_counter() - built,
    }  # fmt: skip


_DATASETS = """
import json, sys, time
import datasets, transformers
path, model, folder = sys.argv[1:]
datasets.disable_progress_bars()
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
begin = time.perf_counter()
def tokens(rows):
    questions = [[{"role": "user", "content": p}] for p in rows["prompt"]]
    chats = [[*q, {"role": "assistant", "content": c}] for q, c in zip(questions, rows["completion"])]
    prompts = tokenizer(tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)).input_ids
    ids = tokenizer(tokenizer.apply_chat_template(chats, tokenize=False)).input_ids
    masks = [[0] * len(p) + [1] * (len(i) - len(p)) for p, i in zip(prompts, ids)]
    return {"input_ids": ids, "completion_mask": masks}
dataset = datasets.load_dataset("json", data_files=path, cache_dir=folder, split="train")
dataset = dataset.map(tokens, batched=True, remove_columns=["prompt", "completion"])
print(json.dumps({"rows": len(dataset), "tokens_seconds": time.perf_counter() - begin}))
"""


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command and returns the figures that it prints, with its peak memory.

    `anonymous_bytes` is the process's own memory; `resident_bytes` includes mapped files. Raises
    SystemExit if the command fails.
    """
    begin = time.perf_counter()
    peaks = {"RssAnon": 0, "VmHWM": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    return
                for name, _, value in (line.partition(":") for line in lines):
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) << 10)

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = process.communicate()
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with exit code {process.returncode}")
    return {
        **json.loads(out.splitlines()[-1]), "anonymous_bytes": peaks["RssAnon"], "resident_bytes": peaks["VmHWM"],
        "process_seconds": time.perf_counter() - begin,
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=int, default=300, help="size of the file (default: %(default)s)")
    arguments.add_argument("--only", choices=("ours", "datasets"), help="measure only one of them")
    arguments.add_argument("--child", nargs=3, metavar=("ROWS", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        print(json.dumps(ours(*map(Path, options.child))))
        return
    from benchmarks.trainer import peers

    from demo_assets import model

    path, folder = file(options.megabytes), model.folder()
    commands = {
        "ours": [sys.executable, __file__, "--child"],
        "datasets": [str(peers.python("trl")), "-c", _DATASETS],
    }
    document: dict[str, Any] = {
        "file_bytes": path.stat().st_size, "cores": len(os.sched_getaffinity(0)), "load_at_start": os.getloadavg()[0],
    }  # fmt: skip
    for name, command in commands.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".bench-data-") as scratch:
                document[name] = measured([*command, str(path), str(folder), scratch])
            show(name, document[name], document["file_bytes"])
    if options.only is None:
        speed = document["datasets"]["tokens_seconds"] / document["ours"]["tokens_seconds"]
        memory = document["ours"]["anonymous_bytes"] / document["datasets"]["anonymous_bytes"]
        document["speed_ratio"], document["memory_ratio"] = speed, memory
        print(f"ours is {speed:.2f} times as fast, in {memory:.2f} of the memory")
        (ROOT / "benchmarks/results/data_memory.json").write_text(json.dumps(document, indent=1) + "\n")


def show(name: str, figures: dict[str, Any], size: int) -> None:
    """Prints one line of the table; `size` is the file's in bytes."""
    seconds = figures["tokens_seconds"]
    print(
        f"{name:9} {figures['rows']:,} rows in {seconds:.0f} s: {figures['rows'] / seconds:,.0f} rows/s, "
        f"{size / seconds / 2**20:.2f} MB/s; memory {figures['anonymous_bytes'] / 2**20:,.0f} MiB "
        f"({figures['resident_bytes'] / 2**20:,.0f} with mapped files)"
        + (f"; data report {figures['report_seconds']:.1f} s" if "report_seconds" in figures else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
