"""The pure parts of the trainer benchmark: the FLOP formula (checked by hand and against torch),
goals, table, search and texts."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from benchmarks.trainer import data, dictd, flops, plot, recorder, rows, search, table, texts
from benchmarks.trainer.flops import Dimensions, Roof, Work
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2 = Dimensions(layers=30, hidden=576, intermediate=1536, heads=9, key_heads=3, head_size=64, vocabulary=49152)
TINY = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


def test_a_models_matrices_add_up_to_its_known_size() -> None:
    blocks = sum(shape.weights for shape in SMOLLM2.matrices)
    norms = 61 * 576
    assert blocks + SMOLLM2.head.weights + norms == 134_515_008  # SmolLM2-135M, tied
    assert SMOLLM2.adapters(16) == 921_600


def test_flops_of_a_token_equal_those_counted_by_hand() -> None:
    blocks, head, lowest = 106_168_320, 28_311_552, 576 * (576 + 192 + 192)
    counted = flops.needed(SMOLLM2, 16, Work(tokens=1, labels=1, pairs=100))
    assert counted.total == 4 * (blocks + head) - 2 * lowest + 6 * 921_600 + 12 * 576 * 30 * 100
    assert sum(counted.forward.values()) == 2 * (blocks + head)


def test_the_formula_equals_what_torch_counts_in_a_real_training_step() -> None:
    """Only matrix products are compared; attention is left to the formula, since torch counts
    masked pairs too."""
    torch.manual_seed(0)
    length, rank, labels = 12, 4, 5
    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="sdpa"))
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, logits_to_keep=torch.arange(labels), use_cache=False).logits
        logits.float().sum().backward()
    flops_by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in flops_by_op.items() if "mm" in op)
    size = Dimensions.of(TINY)
    needed = flops.needed(size, rank, Work(length, labels, 0))
    first_layers_inputs = 2 * rank * 2 * size.hidden * length  # no gradient flows into the embeddings
    assert products == pytest.approx(needed.total - first_layers_inputs)


def test_the_roofs_time_is_the_sum_over_its_products() -> None:
    work = flops.needed(SMOLLM2, 16, Work(tokens=10, labels=4, pairs=0))
    even = Roof(1024, dict.fromkeys(work.forward, 1e9), dict.fromkeys(work.backward, 1e9))
    assert even.seconds(work) == pytest.approx(work.total / 1e9)
    assert even.rate(work) == pytest.approx(1e9)
    faster = replace(even, forward=dict.fromkeys(work.forward, 2e9))
    assert flops.highest([even, faster], work) is faster
    both = sum(work.forward.values()) + sum(work.backward.values())
    expected = (sum(work.forward.values()) / 2e9 + sum(work.backward.values()) / 1e9) * work.total / both
    assert faster.seconds(work) == pytest.approx(expected)


def test_a_shared_prefix_counts_once() -> None:
    """Four rows have a prefix of 10 tokens in common and 5 tokens each of their own; the prefix is
    computed once."""
    length, prefix, count = 15, 10, 4
    without_sharing = Work(count * length, count * 5, count * length * (length + 1) / 2)
    tokens = prefix + count * 5
    with_sharing = flops.computed(without_sharing, tokens / without_sharing.tokens, prefix)
    once = prefix * (prefix + 1) / 2 + count * (5 * prefix + 5 * 6 / 2)
    assert (with_sharing.tokens, with_sharing.labels, with_sharing.pairs) == pytest.approx(
        (tokens, without_sharing.labels, once)
    )
    assert flops.computed(without_sharing, 1.0, prefix) == without_sharing


def row(system: str, config: str, dataset: str, speed: float, memory: int = 100, **more: object) -> dict[str, object]:
    return {
        "system": system, "config": config, "dataset": dataset, "tokens_per_second": speed, "peak_rss_bytes": memory,
        "roof_share": 0.6, "padding_share": 0.0, "computed_per_seen": 1.0, "dtype": "bfloat16", **more,
    }  # fmt: skip


def test_aims_are_met_missed_or_not_measured() -> None:
    measured = [
        row("finetune", "default", "mixed", 480, memory=90),
        row("trl", "default", "mixed", 60),
        row("trl", "best", "mixed", 300),
        row("finetune", "default", "shared", 3000, memory=110),
        row("trl", "best", "shared", 400),
        {"system": "trl", "config": "best", "dataset": "long", "error": "no memory"},
    ]
    by_name = {aim.name: aim for aim in table.aims(measured, {"two_ranks": {"ratio": 0.8}})}
    verdicts = {name: aim.met for name, aim in by_name.items()}
    assert verdicts["share of the GEMM roof, mixed, bfloat16"] is True
    assert verdicts["speed against TRL's searched best, mixed"] is True
    assert verdicts["speed against TRL's searched best, shared"] is False
    assert verdicts["speed against TRL's searched best, long"] is None
    assert verdicts["speed against TRL's default, mixed"] is False
    assert verdicts["peak memory against TRL's searched best, mixed"] is True
    assert verdicts["peak memory against TRL's searched best, shared"] is False
    assert verdicts["two ranks against one with two threads"] is False
    assert by_name["speed against TRL's default, mixed"].value == 8.0
    shown = table.render(measured, list(by_name.values()))
    assert "1.60x" in shown
    assert "failed: no memory" in shown
    assert "not measured" in shown


def test_a_float32_machine_has_the_float32_aim() -> None:
    names = [aim.name for aim in table.aims([row("finetune", "default", "mixed", 1, dtype="float32")], {})]
    assert "share of the GEMM roof, mixed, float32" in names


def test_a_peers_answer_becomes_a_row_and_so_does_its_error() -> None:
    request = search.formats([search.FLOAT32], search.Times(1, 2))[0]
    scale = rows.Scale(SMOLLM2, {})
    answer = {
        "name": request["name"], "tokens": 300, "positions": 400, "labels": 100, "pairs": 3000.0, "seconds": 2.0,
        "steps": 1.0, "micro_batches": 4, "thirds": [140.0, 150.0, 160.0], "peak_rss_bytes": 5,
    }  # fmt: skip
    made = rows.of_peer("trl", "best", "short", request, answer, scale)
    assert (made["tokens_per_second"], made["padding_share"], made["computed_per_seen"]) == (150.0, 0.25, 400 / 300)
    assert made["dtype"] == "float32"
    assert made["spread"] == pytest.approx(20 / 150)
    failed = rows.of_peer("trl", "best", "short", request, {"name": "x", "error": "no memory"}, scale)
    assert failed["error"] == "no memory"
    assert "tokens_per_second" not in failed


def test_the_search_covers_every_option_and_the_fastest_wins() -> None:
    times = search.Times(1, 2)
    assert search.dtypes(False) == (search.FLOAT32,)
    configs = search.families(search.FLOAT32, mean_length=80, longest=750, times=times)
    names = " ".join(config["name"] for config in configs)
    for knob in ("micro-batch 1,", "micro-batch 16,", "grouped", "padding-free", "packed bfd 1024"):
        assert knob in names
    assert all(config["arguments"]["activation_checkpointing"] is False for config in configs)
    assert "packed bfd 512" not in names  # a row has 750 tokens
    answers = [{"name": config["name"], "tokens": 10 + i, "seconds": 1.0} for i, config in enumerate(configs)]
    answers[-1] = {"name": configs[-1]["name"], "error": "no memory"}
    assert search.fastest(configs, answers, 2) == [configs[-2], configs[-3]]
    assert "family" not in search.again(configs[0], times)


def test_the_recorder_measures_complete_micro_batches_after_the_warmup() -> None:
    watch = recorder.Recorder(recorder.Window(warm_up=0.0, seconds=0.0, accumulation=2))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": torch.ones(2, 4), "labels": torch.tensor([[-100, 5, 5, -100]] * 2), "attention_mask": mask}
    for _ in range(3):
        watch.counted(batch)
        watch.done()
    watch.counted(batch)
    with pytest.raises(recorder.Enough):
        watch.done()
    measured = watch.result()
    assert (measured["micro_batches"], measured["tokens"], measured["positions"], measured["labels"]) == (2, 14, 16, 8)
    assert measured["pairs"] == 2 * (6 + 10)


def test_documents_of_a_row_without_padding_are_recognized_by_their_positions() -> None:
    watch = recorder.Recorder(recorder.Window(0.0, 0.0, 1))
    ids = torch.ones(1, 7)
    watch.counted({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])})
    assert watch.pairs == [6 + 3 + 3]


def test_texts_have_the_requested_lengths() -> None:
    entries = [f"word{i} " + " ".join(f"w{i}x{k}" for k in range(20 + i)) for i in range(300)]

    def length(text: str) -> int:
        return len(text.split())

    made = texts.mixed(entries, length, 200, median=44, mean=80, longest=310)
    sizes = sorted(length(pair.prompt + pair.completion) + 1 for pair in made)
    assert sizes[100] == pytest.approx(44, abs=3)
    assert max(sizes) <= 310
    assert made == texts.mixed(entries, length, 200, median=44, mean=80, longest=310)
    assert all(pair.completion.startswith(" ") for pair in made)
    documents = texts.long(entries, length, 10, shortest=500, longest=800)
    assert all(500 <= length(pair.prompt + pair.completion) + 1 <= 800 for pair in documents)


def test_a_dictionary_is_read_once_per_entry() -> None:
    text = b"adware\n n.\n\n  Software.\nAFK\n\n  Away."
    index = ["00-info\tA\tB\n", "adware\tA\tY\n", "alias\tA\tY\n", "AFK\tY\tN\n"]
    assert list(dictd.entries(index, text)) == ["adware n. Software.", "AFK Away."]


def test_statistics_report_the_prefix_that_all_rows_share() -> None:
    statistics = data.describe([([1, 2, 3, 9], 1), ([1, 2, 4, 5, 6, 9], 3)])
    assert (statistics.common_prefix, statistics.longest, statistics.label_share) == (2, 6, 0.4)
    assert statistics.attended_pairs_per_token == (10 + 21) / 10
    json.dumps(vars(statistics))


def test_curves_are_drawn_as_one_line_each() -> None:
    drawn = ElementTree.fromstring(plot.lines({"a": [3.0, 2.0, 1.0], "b & c": [3.0, 2.5, 1.5]}, "t", "x", "y"))
    assert len([each for each in drawn if each.tag.endswith("polyline")]) == 2
    assert not math.isnan(float(drawn.attrib["viewBox"].split()[2]))
