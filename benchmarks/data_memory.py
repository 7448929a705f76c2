"""How fast a large file becomes tokens, and in how much memory: ours beside `datasets` in the same run.

    PYTHONPATH=operator:trainer_image:hack:. .venv/bin/python benchmarks/data_memory.py [--megabytes 300]

The rows are WordNet's 117,000 glosses, asked for in different words and with a few neighbours, so that no two are
equal. Both read the file, render each row by the chat template of SmolLM2, and leave prompt and answer as tokens on
disk. Ours also finds what rows begin with alike, and the data report. Prints a table, writes JSON.
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


def rows(glosses: list[tuple[str, str]], most: int) -> Iterator[str]:
    """JSON lines of at most so many bytes together; row i of round r has r to r + 15 glosses after its own."""
    size = 0
    for turn in range(1000):
        for index, (word, _) in enumerate(glosses):
            more = glosses[index : index + 1 + turn + index % 16]
            answer = " ".join(f"{other}: {gloss}." if at else gloss for at, (other, gloss) in enumerate(more))
            prompt = _QUESTIONS[turn % len(_QUESTIONS)].format(word)
            line = json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            if size > most:
                return
            yield line


def glosses(folder: Path) -> list[tuple[str, str]]:
    """(word, gloss) of every synset, in WordNet's order."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text().splitlines():
            synset, bar, gloss = line.partition(" | ")
            if bar and not line.startswith(" "):
                word = re.sub(r"\(.*", "", synset.split()[4]).replace("_", " ")
                found.append((word, gloss.strip()))
    return found


def file(megabytes: int) -> Path:
    """The rows in the cache."""
    from demo_assets.package import debian_files, write_once

    def write(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            share = debian_files("wordnet-base", Path(scratch)) / "usr/share/wordnet"
            with (target / "rows.jsonl").open("w") as out:
                out.writelines(rows(glosses(share), megabytes << 20))

    source = hashlib.sha256(Path(__file__).read_bytes().partition(b"\ndef file")[0]).hexdigest()[:12]
    return write_once(f"bench-data-{megabytes}-{source}", write) / "rows.jsonl"


# ---- what is measured: each in a process of its own, which prints its figures as one line of JSON


def ours(path: Path, model: Path, folder: Path) -> dict[str, Any]:
    """As preflight does it."""
    from finetune_trainer import survey, tokens
    from finetune_trainer.render import Renderer

    renderer = Renderer.load(model, 2048)
    begin = time.perf_counter()
    cache = tokens.build(folder, "cache", path, "dataset.uri", on_invalid="fail", renderer=renderer)
    built = time.perf_counter()
    survey.report(
        survey.parts_of({"train": survey.Measured.of_tokens(cache)}, 0.05, None), longest=2048, renderer=renderer
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
    asked = [[{"role": "user", "content": p}] for p in rows["prompt"]]
    said = [[*a, {"role": "assistant", "content": c}] for a, c in zip(asked, rows["completion"])]
    prompts = tokenizer(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)).input_ids
    whole = tokenizer(tokenizer.apply_chat_template(said, tokenize=False)).input_ids
    masks = [[0] * len(p) + [1] * (len(w) - len(p)) for p, w in zip(prompts, whole)]
    return {"input_ids": whole, "completion_mask": masks}
found = datasets.load_dataset("json", data_files=path, cache_dir=folder, split="train")
found = found.map(tokens, batched=True, remove_columns=["prompt", "completion"])
print(json.dumps({"rows": len(found), "tokens_seconds": time.perf_counter() - begin}))
"""


def measured(command: list[str]) -> dict[str, Any]:
    """What the command prints, with its peaks of memory: of its own (anonymous) and with mapped files (resident)."""
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
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return {
        **json.loads(out.splitlines()[-1]), "anonymous_bytes": peaks["RssAnon"], "resident_bytes": peaks["VmHWM"],
        "process_seconds": time.perf_counter() - begin,
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=int, default=300)
    arguments.add_argument("--only", choices=("ours", "datasets"))
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
    found: dict[str, Any] = {
        "file_bytes": path.stat().st_size, "cores": len(os.sched_getaffinity(0)), "load_at_start": os.getloadavg()[0],
    }  # fmt: skip
    for name, command in commands.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".bench-data-") as scratch:
                found[name] = measured([*command, str(path), str(folder), scratch])
            told(name, found[name], found["file_bytes"])
    if options.only is None:
        speed = found["datasets"]["tokens_seconds"] / found["ours"]["tokens_seconds"]
        memory = found["ours"]["anonymous_bytes"] / found["datasets"]["anonymous_bytes"]
        found["speed_ratio"], found["memory_ratio"] = speed, memory
        print(f"ours is {speed:.2f} times as fast, in {memory:.2f} of the memory")
        (ROOT / "benchmarks/results/data_memory.json").write_text(json.dumps(found, indent=1) + "\n")


def told(name: str, of: dict[str, Any], size: int) -> None:
    seconds = of["tokens_seconds"]
    print(
        f"{name:9} {of['rows']:,} rows in {seconds:.0f} s: {of['rows'] / seconds:,.0f} rows/s, "
        f"{size / seconds / 2**20:.2f} MB/s; memory {of['anonymous_bytes'] / 2**20:,.0f} MiB "
        f"({of['resident_bytes'] / 2**20:,.0f} with mapped files)"
        + (f"; data report {of['report_seconds']:.1f} s" if "report_seconds" in of else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
