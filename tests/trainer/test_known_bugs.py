"""Bugs that recur in trainers, and that none of the other rooms here would show: see docs/correctness.md for all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_api import events
from finetune_trainer import adapters, checkpoint, model, seeds, split, tokenizer_files, tokens
from finetune_trainer.batch import Collator
from finetune_trainer.loss import LossSum
from finetune_trainer.render import Example, Renderer
from finetune_trainer.rows import Row, Turn
from trainer.ranks import Ended, finish_each, pairs, prepare

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Ended]:
    root, llama = tmp_path_factory.mktemp("bugs"), models["llama"]
    one = [{"prompt": "the fox", "completion": " a quick dog."}]
    overfit = {"max_steps": 40, "global_batch_size": 1, "learning_rate": 1e-2, "keep_best": False}
    timid = {"max_steps": 2, "learning_rate": 1e-6}
    head = {"max_steps": 10, "keep_best": False}
    single = {"max_steps": 3, "global_batch_size": 1}
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
        "one rank": prepare(root / "4", llama, pairs(5), training=single),
        "idle rank": prepare(root / "5", llama, pairs(5), training=single, world=2),
    }
    return finish_each(jobs)


def test_an_end_token_of_number_0(models: dict[str, Path]) -> None:
    """Bug 4: `if end_token` is false for it, and the mask runs on to the end of the chat."""
    tokenizer = tokenizer_files.load(models["llama"])
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<pad>")
    tokenizer.eos_token = "<pad>"
    assert tokenizer.eos_token_id == 0
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And?"), Turn("assistant", "Bye."))
    example = Renderer(tokenizer, frozenset({0}), max_length=200).render(Row(1, turns))
    assert isinstance(example, Example)
    learnt = [token for token, flag in zip(example.ids, example.learnt, strict=True) if flag]
    assert tokenizer.decode(learnt) == "Hello.<pad>Bye.<pad>"


def test_an_answer_that_never_ends(ended: dict[str, Ended]) -> None:
    """Bug 6: the token that ends a turn isn't learnt, or isn't the one that generation stops at."""
    (sample,) = ended["one row"].events(events.SampleEvent)
    assert ended["one row"].losses[-1] < 0.05
    assert sample.after == sample.reference.strip()  # of the 12 tokens that it might have had


def _rows(folder: Path, base: Path, count: int = 6) -> split.Split:
    renderer = Renderer.load(base, 96)
    path = prepare(folder, base, pairs(count)).paths.data("train")
    return split.whole(
        tokens.build(folder / "tokens", "k", path, "dataset.uri", format="auto", on_invalid="fail", renderer=renderer)
    )


def _collator(*, packed: bool, pad: int = 0) -> Collator:
    return Collator(packed=packed, shared=False, encoder_decoder=False, pad=pad, start=pad, device=_CPU)


@pytest.mark.parametrize("packed", [True, False])
def test_an_end_token_that_is_the_padding_token(packed: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 7: labels that are compared with the padding token lose the end token."""
    rows = _rows(tmp_path / "job", models["llama"])
    stop = int(tokenizer_files.load(models["llama"]).eos_token_id)
    batch = _collator(packed=packed, pad=stop)(rows, (0, 1, 2))
    assert int((batch.targets == stop).sum()) == 3


def _loss(loaded: model.Loaded, rows: split.Split, micro: tuple[int, ...], *, packed: bool) -> float:
    loss_sum = LossSum.of(loaded.base, None, "cpu")
    batch = _collator(packed=packed)(rows, micro)
    with torch.no_grad(), loss_sum.room(batch):
        return float(loss_sum(loaded.model, batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_packed_row_whose_examples_see_each_other(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 9: what an example loses doesn't depend on its neighbours, nor on its place among them."""
    rows = _rows(tmp_path / "job", models[family])
    loaded = model.load(models[family], dtype=torch.float32, longest=96)
    alone = {index: _loss(loaded, rows, (index,), packed=False) for index in range(6)}
    for micro in ((0, 1), (2, 1), (1, 3), (4, 0, 1, 5)):
        expected = sum(alone[index] for index in micro)
        assert _loss(loaded, rows, micro, packed=True) == pytest.approx(expected, rel=2e-6)


def test_a_first_token_that_is_predicted_from_the_example_before(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 10: a packed row has as many learnt tokens as its examples, and none of them is an example's first."""
    rows = _rows(tmp_path / "job", models["llama"])
    for index in range(6):
        assert not rows.example(index)[1][0]
    apart = [_collator(packed=False)(rows, (index,)).targets for index in (3, 0, 5)]
    together = _collator(packed=True)(rows, (3, 0, 5)).targets
    assert sorted(together.tolist()) == sorted(torch.cat(apart).tolist())
    assert len(together) == int(rows.label_counts[[3, 0, 5]].sum())


def test_a_stop_that_the_ranks_hear_at_different_steps(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 15: only node 1 is asked to stop; both save the same step and end well."""
    job = prepare(tmp_path / "job", models["llama"], pairs(16), world=2, nodes=2, training={"max_steps": 100000})
    ranks = job.start()
    ranks.until(events.StepEvent, 2)
    job.node(1).stop.touch()
    ended = ranks.wait().check()
    (preempted,) = ended.events(events.PreemptedEvent)
    assert preempted.step == ended.events(events.StepEvent)[-1].step
    assert ended.events(events.CheckpointEvent)[-1].step == preempted.step


def test_float32_adapters_beside_a_bfloat16_base_that_is_split(ended: dict[str, Ended]) -> None:
    """Bug 17: ZeRO-3 gathers a layer's weights in one number format, and fails on a mixture.

    Nothing is recomputed here. What differs from ddp is how products in bfloat16 are rounded.
    """
    split, whole = ended["zero3"], ended["ddp"]
    assert split.decision("dtype").choice == "bfloat16"
    assert split.decision("activationCheckpointing").choice == "off"
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    ours, theirs = (load_file(run.paths.export / "adapter_model.safetensors") for run in (split, whole))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_small_updates_that_are_lost_in_bfloat16(ended: dict[str, Ended], models: dict[str, Path]) -> None:
    """Bug 18: adapters stay float32 beside a bfloat16 base, and two tiny steps move every one of them."""
    run = ended["timid"]
    loaded = model.load(models["llama"], dtype=torch.bfloat16, longest=96)
    lora = prepare(run.paths.scratch.parent / "again", models["llama"], pairs(1)).run
    assert lora.lora is not None
    before = adapters.adapt(loaded, lora.lora, seeds.mix(lora.training.seed, "lora")).model.state_dict()
    after = load_file(run.paths.checkpoints / "step-2" / checkpoint.WEIGHTS)
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert (tensor != before[name]).any(), name


def test_an_adapter_on_an_output_head_that_is_tied_to_the_embeddings(
    ended: dict[str, Ended], models: dict[str, Path]
) -> None:
    """Bug 19: it is trained, written, and gives the reported loss on the base that it came from."""
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
    rows = split.whole(
        tokens.build(run.paths.scratch / "own", "k", path, "f", format="auto", on_invalid="fail", renderer=renderer)
    )
    total = 0.0
    for index in range(len(rows)):
        ids, learnt, _ = rows.example(index)
        whole = torch.tensor(ids.astype("int64"))
        at = torch.tensor(learnt.nonzero()[0])
        with torch.no_grad():
            chances = loaded(input_ids=whole[None]).logits[0].log_softmax(-1)
        total -= float(chances[at - 1, whole[at]].sum())
    assert total / int(rows.label_counts.sum()) == pytest.approx(run.evals("test")[10], abs=1e-5)


def test_a_token_that_the_model_has_no_embedding_for(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 20: a tokenizer that has grown; an adapter alone couldn't carry the new embeddings, so it's refused."""
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


def test_a_rank_without_a_learnt_token(ended: dict[str, Ended]) -> None:
    """Bug 28: of one row a step the second rank gets nothing; it divides nothing by nothing, and disturbs nobody."""
    assert ended["idle rank"].losses == pytest.approx(ended["one rank"].losses, abs=1e-6)
    ours, theirs = (
        load_file(ended[name].paths.export / "adapter_model.safetensors") for name in ("idle rank", "one rank")
    )
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-5, name
