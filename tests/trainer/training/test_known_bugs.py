"""Bugs that recur in trainers and that no other test module here would show. docs/correctness.md
lists all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.messages import events
from finetune_trainer import seeds
from finetune_trainer.checkpoint import local_folder
from finetune_trainer.data import splits, token_cache
from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading.row import Row, Turn
from finetune_trainer.model import loading
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.loss import LossSum
from testkit.rows import pairs
from trainer.support.rank_runs import FinishedRun, finish_each, prepare

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, FinishedRun]:
    root, llama = tmp_path_factory.mktemp("bugs"), models["llama"]
    one = [{"prompt": "the fox", "completion": " a quick dog."}]
    overfit = {"max_steps": 40, "global_batch_size": 1, "learning_rate": 1e-2, "keep_best": False}
    timid = {"max_steps": 2, "learning_rate": 1e-6}
    head = {"max_steps": 10, "keep_best": False}
    jobs = {
        "one row": prepare(root / "1", llama, one, full=True, training=overfit, test=one, samples=1),
        "timid": prepare(root / "2", llama, pairs(16), dtype="bfloat16", training=timid, every=1),
        "head": prepare(
            root / "3",
            llama,
            pairs(16),
            lora={"target_modules": ("lm_head", "q_proj")},
            training=head,
            test=pairs(5, 2),
        ),
        **{
            strategy: prepare(
                root / strategy,
                llama,
                pairs(16),
                world=2,
                strategy=strategy,
                dtype="bfloat16",
                lora={"dropout": 0.1},
                training={"max_steps": 3, "activation_checkpointing": "never"},
            )
            for strategy in ("ddp", "zero3")
        },
    }
    return finish_each(jobs)


def test_an_end_token_of_number_0(models: dict[str, Path]) -> None:
    """Bug 4: `if end_token` is false for it, and the mask extends to the end of the chat."""
    tokenizer = tokenizer_files.load(models["llama"])
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<pad>")
    tokenizer.eos_token = "<pad>"
    assert tokenizer.eos_token_id == 0
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And?"), Turn("assistant", "Bye."))
    example = Renderer(tokenizer, frozenset({0}), max_length=200).render(Row(1, turns))
    assert isinstance(example, Example)
    labels = [token for token, flag in zip(example.ids, example.loss_mask, strict=True) if flag]
    assert tokenizer.decode(labels) == "Hello.<pad>Bye.<pad>"


def test_an_answer_that_never_ends(ended: dict[str, FinishedRun]) -> None:
    """Bug 6: the token that ends a turn isn't trained on, or isn't the one that generation stops
    at."""
    (sample,) = ended["one row"].events(events.SampleEvent)
    assert ended["one row"].losses[-1] < 0.05
    assert sample.after == sample.reference.strip()  # shorter than the 12 tokens that it may have


def _rows(folder: Path, base: Path, count: int = 6) -> splits.Split:
    renderer = Renderer.load(base, 96)
    path = prepare(folder, base, pairs(count)).paths.data("train")
    return splits.all_rows(
        token_cache.build(folder / "tokens", "k", path, ReadOptions("dataset.uri", renderer, "fail"))
    )


def _collator(*, packed: bool, pad: int = 0) -> Collator:
    return Collator(
        packed=packed, shared=False, encoder_decoder=False, pad_token=pad, decoder_start_token=pad, device=_CPU
    )


@pytest.mark.parametrize("packed", [True, False])
def test_an_end_token_that_is_the_padding_token(packed: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 7: labels that are compared with the padding token lose the end token."""
    rows = _rows(tmp_path / "job", models["llama"])
    stop = int(tokenizer_files.load(models["llama"]).eos_token_id)
    batch = _collator(packed=packed, pad=stop)(rows, (0, 1, 2))
    assert int((batch.targets == stop).sum()) == 3


def _loss(loaded: loading.LoadedModel, rows: splits.Split, micro: tuple[int, ...], *, packed: bool) -> float:
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    batch = _collator(packed=packed)(rows, micro)
    with torch.no_grad(), loss_sum.packed_context(batch):
        return float(loss_sum(loaded.model, batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_packed_row_whose_examples_see_each_other(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 9: the loss of an example depends neither on its neighbors nor on its position among
    them."""
    rows = _rows(tmp_path / "job", models[family])
    loaded = loading.load(models[family], dtype=torch.float32, longest=96)
    losses = {index: _loss(loaded, rows, (index,), packed=False) for index in range(6)}
    for micro in ((0, 1), (2, 1), (1, 3), (4, 0, 1, 5)):
        expected = sum(losses[index] for index in micro)
        assert _loss(loaded, rows, micro, packed=True) == pytest.approx(expected, rel=2e-6)


def test_a_first_token_that_is_predicted_from_the_example_before(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 10: a packed row has as many trained tokens as its examples, and none of them is an
    example's first."""
    rows = _rows(tmp_path / "job", models["llama"])
    for index in range(6):
        assert not rows.example(index)[1][0]
    padded = [_collator(packed=False)(rows, (index,)).targets for index in (3, 0, 5)]
    packed = _collator(packed=True)(rows, (3, 0, 5)).targets
    assert sorted(packed.tolist()) == sorted(torch.cat(padded).tolist())
    assert len(packed) == int(rows.label_counts[[3, 0, 5]].sum())


def test_a_stop_that_reaches_the_ranks_at_different_steps(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 15: only node 1 gets the stop; both nodes save the same step and end normally."""
    job = prepare(tmp_path / "job", models["llama"], pairs(16), world=2, nodes=2, training={"max_steps": 100000})
    ranks = job.start()
    ranks.wait_for_events(events.StepEvent, 2)
    job.node(1).stop.touch()
    ended = ranks.wait().check()
    (preempted,) = ended.events(events.PreemptedEvent)
    assert preempted.step == ended.events(events.StepEvent)[-1].step
    assert ended.events(events.CheckpointEvent)[-1].step == preempted.step


def test_float32_adapters_on_a_bfloat16_base_that_is_sharded(ended: dict[str, FinishedRun]) -> None:
    """Bug 17: ZeRO-3 gathers a layer's weights in one dtype, and fails on a mixture.

    Nothing is recomputed here. The only difference from ddp is how products in bfloat16 are
    rounded.
    """
    zero3, ddp = ended["zero3"], ended["ddp"]
    assert zero3.decision("dtype").choice == "bfloat16"
    assert zero3.decision("activationCheckpointing").choice == "off"
    assert zero3.losses == pytest.approx(ddp.losses, rel=1e-4)
    ours, theirs = (load_file(run.paths.export / "adapter_model.safetensors") for run in (zero3, ddp))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_small_updates_that_are_lost_in_bfloat16(ended: dict[str, FinishedRun], models: dict[str, Path]) -> None:
    """Bug 18: adapters stay float32 on a bfloat16 base, and two tiny steps change every one of
    them."""
    run = ended["timid"]
    loaded = loading.load(models["llama"], dtype=torch.bfloat16, longest=96)
    lora = prepare(run.paths.scratch.parent / "again", models["llama"], pairs(1)).run
    assert lora.lora is not None
    before = adapters.adapt(loaded, lora.lora, seeds.mix(lora.training.seed, "lora")).model.state_dict()
    after = load_file(run.paths.checkpoints / "step-2" / local_folder.WEIGHTS)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert (tensor != before[name]).any(), name


def test_an_adapter_on_an_output_head_that_is_tied_to_the_embeddings(
    ended: dict[str, FinishedRun], models: dict[str, Path]
) -> None:
    """Bug 19: the adapter is trained, written, and gives the reported loss on its base model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = ended["head"]
    written = load_file(run.paths.export / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in written.values())
    assert any("lm_head" in name for name in written)
    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, run.paths.export).eval()
    renderer = Renderer.load(models["llama"], 96)
    path = run.paths.data("test")
    rows = splits.all_rows(token_cache.build(run.paths.scratch / "own", "k", path, ReadOptions("f", renderer, "fail")))
    total = 0.0
    for index in range(len(rows)):
        ids, loss_mask, _ = rows.example(index)
        tokens = torch.tensor(ids.astype("int64"))
        positions = torch.tensor(loss_mask.nonzero()[0])
        with torch.no_grad():
            log_probabilities = loaded(input_ids=tokens[None]).logits[0].log_softmax(-1)
        total -= float(log_probabilities[positions - 1, tokens[positions]].sum())
    assert total / int(rows.label_counts.sum()) == pytest.approx(run.evals("test")[10], abs=1e-5)


def test_a_token_that_the_model_has_no_embedding_for(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 20: a tokenizer with added tokens is refused, because an adapter alone can't carry the
    new embeddings."""
    base = tmp_path / "base"
    shutil.copytree(models["llama"], base)
    tokenizer = tokenizer_files.load(base)
    tokenizer.add_tokens(["<grown>"])
    tokenizer.save_pretrained(base)
    rows = [*pairs(8), {"prompt": "what is <grown>?", "completion": " new."}]
    ended = prepare(tmp_path / "job", base, rows, training={"max_steps": 4}).finish()
    assert ended.failure.reason == "ModelInvalid"
    assert "token 300" in ended.failure.message
    assert not ended.events(events.StepEvent)


def test_a_rank_without_a_trained_token(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 28: with one row per step, the second rank gets none. It must not divide zero by zero,
    nor affect the other rank.

    The runs are its own, so that one that ends early fails this test.
    """
    single = {"max_steps": 3, "global_batch_size": 1}
    alone = prepare(tmp_path / "one rank", models["llama"], pairs(5), training=single).finish()
    both = prepare(tmp_path / "two ranks", models["llama"], pairs(5), training=single, world=2).finish()
    assert both.losses == pytest.approx(alone.losses, abs=1e-6)
    ours, theirs = (load_file(run.paths.export / "adapter_model.safetensors") for run in (both, alone))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-5, name
