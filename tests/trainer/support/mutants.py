"""The bugs of docs/correctness.md as mutants: each as somebody might write it, with the tests that
must fail because of it (see `mutation_testing`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Bug `number` as somebody might write it. `edits` are (file, original text, replacement);
    `tests` are those that must fail."""

    number: int
    what: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def _one(number: int, what: str, file: str, original: str, replacement: str, *tests: str) -> Mutant:
    return Mutant(number, what, ((file, original, replacement),), tests)


_KILLED = "checkpoint/test_kill_anywhere.py::"
_RENDER = "data/test_chat_rendering.py::"
_EXPORT = "model/test_export.py::"
_GUARDS = "training/test_anomalies.py::"
_AVERAGES = "training/test_averages.py::"
_TRAINING = "training/test_invariance.py::"
_BUGS = "training/test_known_bugs.py::"
_BACKWARD = "t.strategy.backward(loss * (t.world.size / step.label_tokens), last)"
_RATE = "rate = lr_schedule.learning_rate(step.number, total, recipe)"
_LABELS = "labels = [np.flatnonzero(mask) for _, mask, *_ in rows]"

ALL = (
    _one(
        1, "the mean of each micro-batch is used", "training/loop.py", _BACKWARD,
        "t.strategy.backward(loss / max(1, len(batch.targets)) / len(micro_batches), last)",
        f"{_AVERAGES}test_a_mean_of_means",
    ),
    _one(
        2, "the mean of a micro-batch is taken for a sum", "model/loss.py",
        'cross_entropy(exact, batch.targets, reduction="none" if per_token else "sum")',
        'cross_entropy(exact, batch.targets, reduction="none" if per_token else "mean")',
        f"{_AVERAGES}test_a_loss_that_the_model_averages_itself",
    ),
    _one(
        3, "the mean of each batch is used", "evaluation/evaluator.py",
        "own += self.loss_sum(self.strategy.model, batch, losses, sums)",
        "own += self.loss_sum(self.strategy.model, batch, losses, sums) / max(1, len(batch.targets)) * 9",
        f"{_AVERAGES}test_an_evaluation_that_depends_on_the_batch_size",
    ),
    _one(
        4, "EOS token 0 is treated as false", "data/chat_rendering.py",
        "if token in self._stops), len(", "if token and token in self._stops), len(",
        f"{_BUGS}test_an_end_token_of_number_0",
    ),
    _one(
        4, "off by one", "data/chat_rendering.py", "(answer_ids[: stop + 1], True), (answer_ids[stop + 1 :], False)",
        "(answer_ids[:stop], True), (answer_ids[stop:], False)",
        f"{_RENDER}test_each_answer_and_its_stop_token_is_trained_on_and_nothing_else",
    ),
    _one(
        5, "any template is accepted", "data/rendering/answers.py",
        "    if full.startswith(before):\n", "    if True:\n",
        f"{_RENDER}test_a_template_whose_prompt_isnt_a_prefix_of_the_chat_is_rejected",
    ),
    _one(
        6, "the stop token isn't trained on", "data/chat_rendering.py", "        loss_mask[0] = False  #",
        "        loss_mask = [flag and token not in self._stops for token, flag in zip(ids, loss_mask, strict=True)]\n"
        "        loss_mask[0] = False  #",
        f"{_BUGS}test_an_answer_that_never_ends",
        f"{_RENDER}test_the_prompt_is_what_generation_starts_from_and_the_last_label_is_the_stop_token",
    ),
    _one(
        7, "labels are compared with the padding token", "data/batching/collator.py", _LABELS,
        "labels = [np.flatnonzero(mask & (ids != self.pad_token)) for ids, mask, *_ in rows]",
        f"{_BUGS}test_an_end_token_that_is_the_padding_token",
    ),
    _one(
        7, "a label that is the padding token is masked", "data/chat_rendering.py", "        loss_mask[0] = False  #",
        "        loss_mask = [f and t != self._tokenizer.pad_token_id for t, f in zip(ids, loss_mask, strict=True)]\n"
        "        loss_mask[0] = False  #",
        f"{_RENDER}test_an_end_token_is_trained_on_even_if_it_is_the_padding_token",
    ),
    _one(
        8, "a BOS token is always prepended", "data/rendering/encoder.py",
        "return ids if ids[: len(self.beginning)] == self.beginning else [*self.beginning, *ids]",
        "return [*self.beginning, *ids]",
        f"{_RENDER}test_plain_text_begins_with_one_beginning_token",
    ),
    _one(
        8, "the tokenizer's BOS token is added to the template's", "data/tokenizer.py",
        "tokenizer(texts, add_special_tokens=False)", "tokenizer(texts)",
        f"{_RENDER}test_a_template_with_a_beginning_token_gets_no_second_one",
    ),
    _one(
        9, "a packed row is one segment", "data/batching/collator.py", "            layout=row.layout,",
        "            layout=packed_layout.Layout(row.layout.size, ((0, row.layout.size),)),",
        f"{_BUGS}test_a_packed_row_whose_examples_see_each_other",
        "training/test_one_by_one.py::test_every_way_of_sharing_a_row_gives_the_same_loss_and_gradients",
    ),
    _one(
        10, "the first token of an example is trained on", "data/batching/collator.py", _LABELS,
        "labels = [np.flatnonzero(np.concatenate([[True], mask[1:]])) for _, mask, *_ in rows]",
        f"{_BUGS}test_a_first_token_that_is_predicted_from_the_example_before",
    ),
    Mutant(
        11, "a resumed run draws another permutation",
        (
            ("training/packing_setup.py", "seed=run.training.seed,", "seed=run.training.seed + resolved.resumed,"),
            ("training/resolve.py", "    longest: int\n    micro", "    longest: int\n    resumed: int\n    micro"),
            (
                "training/resolve.py", "longest=facts.longest,\n",
                "longest=facts.longest,\n        resumed=int(saved is not None),\n",
            ),
        ),
        (
            f"{_KILLED}test_killed_at_every_step_a_run_reports_the_same_history",
            "checkpoint/test_resume.py::test_another_world_or_strategy_resumes_from_the_same_checkpoint",
        ),
    ),
    _one(
        12, "grouping by length uses the random state of the process", "data/batching/batch_plan.py",
        "random = np.random.Generator(np.random.PCG64([seed, epoch]))\n    shuffled",
        'random = np.random.Generator(np.random.PCG64([seed, epoch, __import__("os").getpid()]))\n    shuffled',
        f"{_KILLED}test_killed_at_every_step_a_run_reports_the_same_history",
    ),
    _one(
        13, "dropout uses the current random state of the process", "training/loop.py",
        'torch.manual_seed(seeds.mix(t.run.training.seed, "dropout", step.number, index, t.world.rank))\n', "pass\n",
        f"{_KILLED}test_killed_at_every_step_a_run_ends_with_the_same_adapter",
    ),
    Mutant(
        14, "the newest folder is used, complete or not",
        (
            (
                "manifest.py", "    manifest = _read_checkpoint_manifest(folder)\n",
                "    manifest = None\n    return None\n",
            ),
            ("checkpoint/local_folder.py", 'return root / f"step-{step}.tmp"', 'return root / f"step-{step}"'),
            (
                "checkpoint/local_folder.py",
                "    shutil.rmtree(folder, ignore_errors=True)\n    os.replace(partial, folder)\n", "",
            ),
        ),
        (
            f"{_KILLED}test_killed_at_any_access_to_a_checkpoint_the_newest_complete_one_is_found",
            "checkpoint/test_resume.py::test_a_torn_checkpoint_is_skipped_for_the_one_before",
            "checkpoint/test_sharded.py::test_killed_at_any_access_to_shards_the_newest_complete_checkpoint_is_found",
            "checkpoint/test_sharded.py::test_a_torn_or_altered_shard_invalidates_the_full_checkpoint",
        ),
    ),
    _one(
        15, "each rank stops as soon as it gets the signal", "training/steps/step_sync.py",
        "    return StepOutcome(\n        loss / step.label_tokens,\n        any_stop > 0,",
        "    return StepOutcome(\n        loss / step.label_tokens,\n        stop,",
        f"{_BUGS}test_a_stop_that_reaches_the_ranks_at_different_steps",
        f"{_GUARDS}test_a_rank_that_is_terminated_stops_all_ranks",
    ),
    Mutant(
        16, "the shard of rank 0 is written as if it were the full weight",
        (
            (
                "parallel/deepspeed.py",
                "return self._gathered(name, safe_get_full_fp32_param(self._parameters[name]), dtype)",
                "return self._gathered(name, self._parameters[name].ds_tensor, dtype)",
            ),
        ),
        (f"{_TRAINING}test_zero3_gives_the_adapter_of_ddp_to_five_digits",),
    ),
    _one(
        17, "matrix products mix two dtypes", "parallel/strategy.py", "enabled=half is not None", "enabled=False",
        f"{_BUGS}test_float32_adapters_on_a_bfloat16_base_that_is_sharded",
        f"{_TRAINING}test_a_frozen_base_in_bfloat16_works_with_every_strategy",
    ),
    Mutant(
        18, "adapters have the dtype of the base",
        (
            (
                "model/lora.py", "get_peft_model(loaded.base, config)",
                "get_peft_model(loaded.base, config, autocast_adapter_dtype=False)",
            ),
            (
                "model/lora.py",
                "_convert_to_float32(parameter for parameter in model.parameters() if parameter.requires_grad)\n",
                "\n",
            ),
        ),
        (f"{_BUGS}test_small_updates_that_are_lost_in_bfloat16",),
    ),
    _one(
        19, "an adapter of the output layer isn't written", "model/result/export.py",
        "contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}",
        'contiguous = {name: tensor.contiguous() for name, tensor in tensors.items() if "lm_head" not in name}',
        f"{_BUGS}test_an_adapter_on_an_output_head_that_is_tied_to_the_embeddings",
    ),
    _one(
        19, "a tied weight is written twice", "model/result/weight_files.py",
        "in base.named_parameters()\n", "in base.named_parameters(remove_duplicate=False)\n",
        f"{_EXPORT}test_a_full_model_is_written_in_the_bases_format_with_tied_weights",
    ),
    _one(
        20, "nothing checks whether a token has an embedding", "model/method.py",
        "model_folder.check_rows(capacity(loaded), rows)", "pass",
        f"{_BUGS}test_a_token_that_the_model_has_no_embedding_for",
    ),
    _one(
        20, "the tokenizer isn't written", "model/result/export.py",
        "        if (model / name).is_file():\n            shutil", "        if False:\n            shutil",
        f"{_EXPORT}test_the_tokenizer_is_written_unchanged",
    ),
    _one(
        21, "the schedule steps once per rank", "training/loop.py", _RATE,
        "rate = lr_schedule.learning_rate(min(total, step.number * t.world.size), total, recipe)",
        f"{_TRAINING}test_the_learning_rate_counts_optimizer_steps",
    ),
    _one(
        21, "the schedule steps once per micro-batch", "training/loop.py", _RATE,
        "rate = lr_schedule.learning_rate(min(total, step.number * len(step.micro_batches[0])), total, recipe)",
        f"{_TRAINING}test_the_learning_rate_counts_optimizer_steps",
    ),
    _one(
        22, "the loss is divided again", "parallel/deepspeed.py", "self._engine.backward(loss, scale_wrt_gas=False)",
        "self._engine.backward(loss / 2, scale_wrt_gas=False)",
        f"{_AVERAGES}test_a_strategy_that_divides_by_accumulation_again",
    ),
    Mutant(
        23, "a step with a NaN is applied",
        (
            (
                "training/loop.py", "t.strategy.step(rate) if agreed.finite else _discard_gradients(t)",
                "t.strategy.step(rate)",
            ),
            (
                "parallel/ddp.py", "        if math.isfinite(norm):\n            self._optimizer.step(rate)",
                "        self._optimizer.step(rate)",
            ),
        ),
        ("parallel/test_ddp.py::test_a_gradient_that_isnt_finite_changes_neither_weights_nor_moments",),
    ),
    _one(
        24, "fewer examples are trained on", "training/loop.py",
        "t = replace(t, plan=t.unhalved.halved(state.halvings))",
        "t = replace(t, plan=replace(t.unhalved.halved(state.halvings), "
        "global_batch=max(1, t.unhalved.global_batch >> state.halvings)))",
        f"{_GUARDS}test_a_rank_that_runs_out_of_memory_halves_the_micro_batches_of_all_ranks",
    ),
    _one(
        24, "a rank that the others wait for continues by itself", "training/loop.py",
        "or not independent or len(micro_batch) < 2", "or len(micro_batch) < 2",
        f"{_GUARDS}test_if_ranks_meet_within_a_micro_batch_the_next_attempt_halves_it",
    ),
    _one(
        25, "the last batch is filled up", "data/batching/batch_plan.py",
        "end = min(number * self.global_batch, self.total_examples)",
        "end = number * self.global_batch",
        "data/test_batch_plan.py::test_a_last_batch_that_is_filled_up_with_rows_again",
    ),
    Mutant(
        26, "the base isn't the original one, and the run's own check is off",
        (
            (
                "model/result/export.py",
                "contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}",
                "contiguous = {name: tensor.contiguous() * 1.5 for name, tensor in tensors.items()}",
            ),
            ("model/result/export_check.py", "if not difference <= TOLERANCE[coarsest]:", "if difference < 0:"),
        ),
        (f"{_EXPORT}test_the_result_loads_air_gapped_and_gives_the_reported_loss",),
    ),
    _one(
        27, "the A matrices are initialized again", "parallel/ddp.py", "parameter.copy_(weights[name])",
        'parameter.copy_(weights[name] if "lora_A" not in name else torch.randn_like(parameter))',
        f"{_KILLED}test_killed_at_every_step_a_run_ends_with_the_same_adapter",
    ),
    _one(
        28, "a micro-batch is divided by its own labels, also if it has none", "training/loop.py", _BACKWARD,
        "own = int(t.train.label_counts[list(micro_batch)].sum())\n"
        "                t.strategy.backward(loss * (t.world.size / step.label_tokens) * (own / own), last)",
        f"{_BUGS}test_a_rank_without_a_trained_token",
    ),
    _one(
        28, "a row without labels is accepted", "data/chat_rendering.py",
        "        if not any(loss_mask[:max_length]):", "        if False:",
        f"{_RENDER}test_a_prompt_as_long_as_the_row_is_a_problem_with_its_number",
    ),
)  # fmt: skip
