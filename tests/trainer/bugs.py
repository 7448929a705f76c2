"""Each bug of docs/correctness.md as somebody might write it, and the tests that it must make fail; see `broken`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broken:
    """Bug `number` as somebody might write it: (file, what it says, what it would say). `tests` are those that fail."""

    number: int
    what: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def _one(number: int, what: str, file: str, says: str, would: str, *tests: str) -> Broken:
    return Broken(number, what, ((file, says, would),), tests)


_KILLED, _BUGS, _AVERAGES = "test_killed_everywhere.py::", "test_known_bugs.py::", "test_averages.py::"
_GUARDS, _RENDER, _TRAINING, _EXPORT = "test_guards.py::", "test_render.py::", "test_training.py::", "test_export.py::"
_BACKWARD = "t.learner.backward(loss * (t.world.size / step.label_tokens), last)"
_RATE = "rate = schedule.learning_rate(step.number, total, recipe)"
_LEARNT = "learnt = [np.flatnonzero(flags) for _, flags, *_ in rows]"

ALL = (
    _one(
        1, "a mean of the micro-batch", "train.py", _BACKWARD,
        "t.learner.backward(loss / max(1, len(batch.targets)) / len(micros), last)",
        f"{_AVERAGES}test_a_mean_of_means",
    ),
    _one(
        2, "the micro-batch's own mean is taken for a sum", "loss.py",
        'cross_entropy(exact, batch.targets, reduction="none" if apiece else "sum")',
        'cross_entropy(exact, batch.targets, reduction="none" if apiece else "mean")',
        f"{_AVERAGES}test_a_loss_that_the_model_averages_itself",
    ),
    _one(
        3, "a mean of each batch", "evaluate.py", "own += self.loss_sum(self.learner.model, batch, each)",
        "own += self.loss_sum(self.learner.model, batch, each) / max(1, len(batch.targets)) * 9",
        f"{_AVERAGES}test_an_evaluation_that_depends_on_the_batch_size",
    ),
    _one(
        4, "end token 0 is false", "render.py",
        "if token in self._stops), len(", "if token and token in self._stops), len(",
        f"{_BUGS}test_an_end_token_of_number_0",
    ),
    _one(
        4, "off by one", "render.py", "(answer_ids[: stop + 1], True), (answer_ids[stop + 1 :], False)",
        "(answer_ids[:stop], True), (answer_ids[stop:], False)",
        f"{_RENDER}test_each_answer_and_its_stop_token_is_learnt_and_nothing_else",
    ),
    _one(
        5, "whatever the template does is taken", "render.py",
        "if not before.startswith(done) or not whole.startswith(before):", "if not before.startswith(done):",
        f"{_RENDER}test_a_template_whose_prompt_is_no_prefix_of_the_whole_is_refused",
    ),
    _one(
        6, "the end isn't learnt", "render.py", "        learnt[0] = False  #",
        "        learnt = [flag and token not in self._stops for token, flag in zip(ids, learnt, strict=True)]\n"
        "        learnt[0] = False  #",
        f"{_BUGS}test_an_answer_that_never_ends",
        f"{_RENDER}test_the_prompt_is_what_generation_starts_from_and_the_last_label_is_the_stop_token",
    ),
    _one(
        7, "labels are compared with the padding token", "batch.py", _LEARNT,
        "learnt = [np.flatnonzero(flags & (ids != self.pad)) for ids, flags, *_ in rows]",
        f"{_BUGS}test_an_end_token_that_is_the_padding_token",
    ),
    _one(
        7, "a label that is the padding token is masked", "render.py", "        learnt[0] = False  #",
        "        learnt = [f and t != self._tokenizer.pad_token_id for t, f in zip(ids, learnt, strict=True)]\n"
        "        learnt[0] = False  #",
        f"{_RENDER}test_an_end_token_is_learnt_even_where_it_is_the_padding_token",
    ),
    _one(
        8, "a beginning is always put before", "render.py",
        "return ids if ids[: len(self._first)] == self._first else [*self._first, *ids]",
        "return [*self._first, *ids]",
        f"{_RENDER}test_plain_text_begins_with_one_beginning_token",
    ),
    _one(
        8, "the tokenizer's beginning beside the template's", "render.py",
        "self._tokenizer(text, add_special_tokens=False)", "self._tokenizer(text)",
        f"{_RENDER}test_a_template_with_a_beginning_token_gets_no_second_one",
    ),
    _one(
        9, "a row is one document", "batch.py", "            layout=row.layout,",
        "            layout=layout.Layout(row.layout.size, ((0, row.layout.size),)),",
        f"{_BUGS}test_a_packed_row_whose_examples_see_each_other",
        "test_one_by_one.py::test_every_way_of_sharing_a_row_gives_the_same_loss_and_gradients",
    ),
    _one(
        10, "an example's first token is learnt", "batch.py", _LEARNT,
        "learnt = [np.flatnonzero(np.concatenate([[True], flags[1:]])) for _, flags, *_ in rows]",
        f"{_BUGS}test_a_first_token_that_is_predicted_from_the_example_before",
    ),
    Broken(
        11, "another permutation after a resume",
        (
            ("arrangement.py", "seed=run.training.seed,", "seed=run.training.seed + most.resumed,"),
            ("arrangement.py", "    longest: int\n", "    longest: int\n    resumed: int = 0\n"),
            (
                "assembly.py", "reason, halvings, data.longest)",
                "reason, halvings, data.longest, int(saved is not None))",
            ),
        ),
        (
            f"{_KILLED}test_killed_at_every_step_a_run_tells_the_same_history",
            "test_resume.py::test_another_world_or_strategy_goes_on_from_the_same_checkpoint",
        ),
    ),
    _one(
        12, "lengths are sorted by a random state of the process", "plan.py",
        "random = np.random.Generator(np.random.PCG64([seed, epoch]))\n    shuffled",
        'random = np.random.Generator(np.random.PCG64([seed, epoch, __import__("os").getpid()]))\n    shuffled',
        f"{_KILLED}test_killed_at_every_step_a_run_tells_the_same_history",
    ),
    _one(
        13, "dropout goes on from wherever the process is", "train.py",
        'torch.manual_seed(seeds.mix(t.run.training.seed, "dropout", step.number, index, t.world.rank))\n', "pass\n",
        f"{_KILLED}test_killed_at_every_step_a_run_ends_with_the_same_adapter",
    ),
    _one(
        14, "the newest folder, complete or not", "manifest_io.py", "if verify(path) is None), None)",
        "if path.is_dir()), None)",
        f"{_KILLED}test_killed_at_any_touch_of_a_checkpoint_the_newest_complete_one_is_found",
        "test_resume.py::test_a_torn_checkpoint_is_passed_over_for_the_one_before",
        "test_shards.py::test_killed_at_any_touch_of_shards_the_newest_complete_checkpoint_is_found",
        "test_shards.py::test_a_torn_or_altered_shard_costs_the_whole_checkpoint",
    ),
    _one(
        15, "each rank stops when it hears of it", "agreement.py",
        "return Agreed(loss / step.label_tokens, any_stop > 0,",
        "return Agreed(loss / step.label_tokens, stop,",
        f"{_BUGS}test_a_stop_that_the_ranks_hear_at_different_steps",
        f"{_GUARDS}test_a_rank_that_is_asked_to_leave_takes_all_along",
    ),
    Broken(
        16, "what rank 0 holds is written as if it were whole",
        (
            (
                "zero.py",
                "return self._gathered({name: (p, safe_get_full_fp32_param) for name, p in self._parameters.items()})",
                "return {name: to_cpu(p) for name, p in self._parameters.items()}",
            ),
        ),
        (f"{_TRAINING}test_zero3_gives_the_adapter_of_ddp_to_five_digits",),
    ),
    _one(
        17, "products of two number formats", "loss.py", "enabled=self.autocast is not None), inside",
        "enabled=False), inside",
        f"{_BUGS}test_float32_adapters_beside_a_bfloat16_base_that_is_split",
        f"{_TRAINING}test_a_frozen_base_in_bfloat16_serves_every_strategy",
    ),
    Broken(
        18, "adapters in the base's number format",
        (
            (
                "adapters.py", "get_peft_model(loaded.base, config)",
                "get_peft_model(loaded.base, config, autocast_adapter_dtype=False)",
            ),
            ("adapters.py", "_widen(parameter for parameter in model.parameters() if parameter.requires_grad)\n", "\n"),
        ),
        (f"{_BUGS}test_small_updates_that_are_lost_in_bfloat16",),
    ),
    _one(
        19, "an adapter of the output layer isn't written", "export.py",
        "apart = {name: tensor.contiguous() for name, tensor in tensors.items()}",
        'apart = {name: tensor.contiguous() for name, tensor in tensors.items() if "lm_head" not in name}',
        f"{_BUGS}test_an_adapter_on_an_output_head_that_is_tied_to_the_embeddings",
    ),
    _one(
        19, "a tied weight is written twice", "export.py",
        "tensors = {name: tensor.to(stored) for name, tensor in whole.items()}",
        'tensors = {name: tensor.to(stored) for name, tensor in whole.items()}\n'
        '    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()',
        f"{_EXPORT}test_a_whole_model_is_written_in_the_bases_format_with_tied_weights",
    ),
    _one(
        20, "nobody looks whether there is an embedding", "method.py",
        "model.check_tokens(loaded, data.highest)", "pass",
        f"{_BUGS}test_a_token_that_the_model_has_no_embedding_for",
    ),
    _one(
        20, "the tokenizer stays behind", "export.py",
        "        if (model / name).is_file():\n            shutil", "        if False:\n            shutil",
        f"{_EXPORT}test_the_tokenizer_comes_along_unchanged",
    ),
    _one(
        21, "the schedule steps once a rank", "train.py", _RATE,
        "rate = schedule.learning_rate(min(total, step.number * t.world.size), total, recipe)",
        f"{_TRAINING}test_the_learning_rate_counts_optimizer_steps",
    ),
    _one(
        21, "the schedule steps once a micro-batch", "train.py", _RATE,
        "rate = schedule.learning_rate(min(total, step.number * len(step.micros[0])), total, recipe)",
        f"{_TRAINING}test_the_learning_rate_counts_optimizer_steps",
    ),
    _one(
        22, "divided again", "zero.py", "self._engine.backward(loss, scale_wrt_gas=False)",
        "self._engine.backward(loss / 2, scale_wrt_gas=False)",
        f"{_AVERAGES}test_a_strategy_that_divides_by_accumulation_again",
    ),
    Broken(
        23, "a step with a NaN is done",
        (
            ("train.py", "t.learner.step(rate) if agreed.finite else _refused(t)", "t.learner.step(rate)"),
            (
                "learner.py", "        if math.isfinite(norm):\n            self._optimizer.step(rate)",
                "        self._optimizer.step(rate)",
            ),
        ),
        (
            f"{_GUARDS}test_a_step_whose_loss_isnt_finite_changes_neither_weights_nor_moments",
            "test_faults.py::test_a_loss_that_isnt_finite_stops_all_ranks_before_the_step_and_names_the_rows",
        ),
    ),
    _one(
        24, "less is computed, and learnt", "train.py", "t = replace(t, plan=t.whole.halved(state.halvings))",
        "t = replace(t, plan=replace(t.whole.halved(state.halvings), "
        "global_batch=max(1, t.whole.global_batch >> state.halvings)))",
        f"{_GUARDS}test_a_rank_that_runs_out_of_memory_makes_all_compute_less_at_once",
    ),
    _one(
        24, "a rank that the others wait for goes on by itself", "train.py",
        "or not t.learner.alone or len(micro) < 2", "or len(micro) < 2",
        f"{_GUARDS}test_where_ranks_meet_within_a_micro_batch_the_next_attempt_halves_it",
    ),
    _one(
        25, "filled up", "plan.py", "end = min(number * self.global_batch, self.total_examples)",
        "end = number * self.global_batch",
        "test_plan.py::test_a_last_batch_that_is_filled_up_with_rows_again",
    ),
    _one(
        26, "the base isn't what it was", "export.py",
        "apart = {name: tensor.contiguous() for name, tensor in tensors.items()}",
        "apart = {name: tensor.contiguous() * 1.5 for name, tensor in tensors.items()}",
        f"{_EXPORT}test_the_result_loads_air_gapped_and_gives_the_reported_loss",
    ),
    _one(
        27, "matrices A are drawn anew", "learner.py", "parameter.copy_(weights[name])",
        'parameter.copy_(weights[name] if "lora_A" not in name else torch.randn_like(parameter))',
        f"{_KILLED}test_killed_at_every_step_a_run_ends_with_the_same_adapter",
    ),
    _one(
        28, "0 divided by 0", "train.py", _BACKWARD,
        "count = torch.tensor(float(len(batch.targets)))\n"
        "                t.learner.backward(loss * (t.world.size / step.label_tokens) * (count / count), last)",
        f"{_BUGS}test_a_rank_without_a_learnt_token",
    ),
    _one(
        28, "a row without a label is no problem", "render.py",
        "        if not any(learnt[:most]):", "        if False:",
        f"{_RENDER}test_a_prompt_as_long_as_the_row_is_a_problem_with_its_number",
    ),
)  # fmt: skip
