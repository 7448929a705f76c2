"""What was done about each finding of the review, and the tests that hold it. Values only.

The findings are G1 to G34 of the review of commit 96d635c; `benchmarks.gpu.claims` says how each of
them is known.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_DONE = "Not done: "


@dataclass(frozen=True)
class Repair:
    """A finding, what was done, the file name of the decision page, and the tests by their file
    below `tests/`.

    `done` begins with `NOT_DONE` if the finding still holds; then it has the reason.
    """

    number: str
    done: str
    decision: str
    tests: tuple[str, ...] = ()


_D0019 = "0019-memory-estimate.md"
_D0033 = "0033-mixed-precision.md"
_D0034 = "0034-pods-for-gpu-clusters.md"
_D0035 = "0035-roofline.md"
_D0036 = "0036-fused-kernels.md"
_D0037 = "0037-attention-on-gpus.md"
_D0038 = "0038-quantized-bases-under-fsdp.md"
_D0039 = "0039-host-memory.md"
_D0040 = "0040-network-profiles-and-scheduling.md"
_D0041 = "0041-model-cache.md"
_D0042 = "0042-what-a-gpu-says.md"
_D0052 = "0052-long-contexts-and-selective-recomputation.md"
_MIXED = "trainer/parallel/test_mixed_precision.py::"
_SCENARIOS = "trainer/parallel/test_gpu_scenarios.py::"
_STEP = "trainer/parallel/test_memory_of_a_step.py::"
_CHOICE = "trainer/parallel/test_strategy_choice.py::"
_NF4 = "trainer/parallel/test_quantized_fsdp.py::"
_ATTENTION = "trainer/kernels/test_attention_options.py::"
_GPU_FAULTS = "trainer/supervisor/test_gpu_faults.py::"
_MANIFESTS = "k8s_operator/core/test_manifests.py::"
_SPECS = "api/test_api_server.py::test_the_api_server_agrees_with_pydantic"

REPAIRS = (
    Repair(
        "G1", "DeepSpeed is configured for the decided dtype, and a run whose products have another one is refused at "
        "its start, with every strategy.", _D0033,
        (_MIXED + "test_every_linear_product_of_a_run_in_bfloat16_is_in_bfloat16",
         _MIXED + "test_a_rank_whose_layers_compute_in_float32_fails_before_the_first_step"),
    ),
    Repair(
        "G2", "Bases under zero3 are stored in the decided dtype.", _D0033,
        (_MIXED + "test_a_frozen_base_is_stored_in_bfloat16_and_trained_weights_in_float32",),
    ),
    Repair(
        "G3", "What fits is ordered by its estimated speed, and nothing is offloaded to save less than 5%.", _D0019,
        (_SCENARIOS + "test_auto_chooses", _CHOICE + "test_auto_chooses_the_fastest_configuration_that_fits"),
    ),
    Repair(
        "G4", "FSDP2 has a mixed-precision policy, so the only copies in bfloat16 are those of gathered layers.",
        _D0033, (_MIXED + "test_fsdp_has_no_copies_of_weights_in_bfloat16_besides_what_it_gathers",
                 _STEP + "test_full_training_of_8b_in_shards_stays_within_a_gpu"),
    ),
    Repair(
        "G5", "Models are loaded from mapped files and written weight by weight, and the estimate counts the host's "
        "memory.", _D0039,
        ("trainer/parallel/test_host_memory_of_a_run.py::test_no_rank_holds_more_than_its_shard_while_the_model_is_"
         "loaded",
         "trainer/parallel/test_host_memory_of_a_run.py::test_the_result_is_written_without_a_copy_of_all_weights",
         "trainer/supervisor/test_scarce_memory.py::test_an_attempt_that_is_killed_as_a_whole_while_memory_is_scarce_"
         "counts"),
    ),
    Repair(
        "G6", "An error names the memory that is short, with the field and the amount.", _D0019,
        (_SCENARIOS + "test_an_error_about_the_host_names_its_memory",
         _SCENARIOS + "test_an_error_about_the_gpu_names_its_memory"),
    ),
    Repair(
        "G7", "The estimate is compared with the trainer's own step on fake tensors.", _D0019,
        (_STEP + "test_the_estimate_is_at_most_15_percent_above_what_a_step_needs",),
    ),
    Repair(
        "G8", "Data that moves is progress while a model is loaded or written.", _D0034,
        ("trainer/supervisor/test_slow_disk.py::test_a_slow_write_that_takes_longer_than_stall_seconds_is_waited_for",
         "trainer/supervisor/test_slow_disk.py::test_reads_and_mapped_files_count_as_progress_and_spinning_does_not"),
    ),
    Repair(
        "G9", "Variables by an allow-list, further resources, network profiles, the libraries of rdma-core in the "
        "image, and a measurement of the network at the start.", _D0040,
        ("trainer/supervisor/test_rank_environment.py::test_what_a_job_may_set_reaches_every_rank_as_it_is",
         "k8s_operator/core/test_scheduling.py::test_a_profile_adds_devices_variables_annotations_and_a_capability",
         "images/test_recipe.py::test_the_image_has_what_nccl_loads_for_rdma",
         "trainer/parallel/test_network.py::test_the_bandwidth_of_a_real_slow_network_is_measured"),
    ),
    Repair(
        "G10", "GpuUnavailable is a fault of the infrastructure; its message names the driver and the oldest one that "
        "suits; the next attempt prefers other nodes. The image looks for the driver where GKE mounts it.", _D0034,
        ("trainer/parallel/test_gpu_access.py::test_a_driver_that_is_too_old_is_named_and_the_one_that_is_needed_too",
         "k8s_operator/core/test_avoided_nodes.py::test_the_next_attempt_avoids_the_node_whose_gpu_failed_and_only_"
         "that",
         "images/test_recipe.py::test_a_driver_that_is_mounted_without_nvidias_runtime_is_found"),
    ),
    Repair(
        "G11", "Several slices or shares in a pod, and devices of other vendors, are refused by the CRD.", _D0034,
        (_SPECS, "trainer/reporting/test_gpu_watch.py::test_a_mig_slice_has_its_own_memory_and_the_uuid_of_its_gpu_"
                 "but_no_utilization"),
    ),
    Repair(
        "G12", "GpuFault is a reason of its own, from Xid errors, ECC and lost GPUs; a lack of memory has a restart "
        "budget of its own.", _D0034,
        (_GPU_FAULTS + "test_an_xid_error_is_the_cause_of_what_a_rank_reports",
         _GPU_FAULTS + "test_a_lack_of_memory_remains_one_although_a_gpu_failed",
         "trainer/supervisor/test_exit_reason.py::test_a_failed_gpu_explains_what_ranks_show_of_it_and_nothing_else"),
    ),
    Repair(
        "G13", "A group that stays incomplete gives its nodes back, and Kueue can admit whole groups.", _D0040,
        ("k8s_operator/core/test_gang.py::test_a_part_of_a_group_gives_its_nodes_back_after_the_timeout",
         "k8s_operator/core/test_gang.py::test_a_job_for_a_queue_is_created_suspended_and_its_check_is_not_queued"),
    ),
    Repair(
        "G14", "Cores, memory and disk follow from the GPUs and the model; the preflight pod has a place of its own.",
        _D0040, ("k8s_operator/core/test_amounts.py::test_cores_memory_and_disk_follow_from_the_gpus",
                 _MANIFESTS + "test_a_check_starts_no_gpu_node_of_the_jobs"),
    ),
    Repair(
        "G15", "Segments are expandable on GPUs, and rows have few sizes.", _D0034,
        ("trainer/test_host_memory.py::test_segments_of_a_gpus_memory_are_expandable_unless_a_variable_says_otherwise",
         "trainer/kernels/test_output_head.py::test_rows_have_few_sizes_on_a_gpu"),
    ),
    Repair(
        "G16", "Attention is one operator that reads the layout itself, so all layouts share a program; a layer that "
        "can't be compiled is reported.", _D0036,
        ("trainer/model/test_compilation.py::test_on_gpus_all_layouts_share_a_program",
         "trainer/model/test_compilation.py::test_layers_that_cant_be_compiled_run_uncompiled_and_the_decision_says_"
         "so"),
    ),
    Repair(
        "G17", "Gradients of shared keys are summed in float32, in a fixed order.", _D0037,
        (_ATTENTION + "test_the_gradient_of_a_beginning_that_many_examples_share_is_summed_in_float32",),
    ),
    Repair(
        "G18", "The kernel gets the layer's window, and sinks scale its output.", _D0037,
        (_ATTENTION + "test_attention_on_cuda_is_as_exact_as_bfloat16",
         _ATTENTION + "test_a_window_leaves_out_the_keys_before_it"),
    ),
    Repair(
        "G19", "Scores with a soft cap are computed in chunks.", _D0037,
        (_ATTENTION + "test_chunks_of_scores_equal_one_masked_attention",),
    ),
    Repair(
        "G20", "Heads that the kernel refuses are computed in chunks of scores.", _D0037,
        (_ATTENTION + "test_the_flash_kernel_is_used_for_exactly_what_it_accepts",),
    ),
    Repair(
        "G21", "Parts of a step are timed by events in the GPU's queue.", _D0035,
        ("trainer/training/test_step_clock.py::test_parts_are_what_the_gpu_computes_and_the_optimizer_is_read_a_step_"
         "later",),
    ),
    Repair(
        "G22", "Stage 3 gathers on a stream of its own, and the offloaded AdamW is the fused one.", _D0038,
        ("trainer/parallel/test_deepspeed_on_gpus.py::test_stage_3_overlaps_on_gpus",
         "trainer/parallel/test_deepspeed_on_gpus.py::test_what_is_offloaded_is_pinned_and_updated_by_one_kernel_on_"
         "gpus"),
    ),
    Repair(
        "G23", "Before Ampere, auto is float32 and says what that costs, and bfloat16 is refused. float16 isn't "
        "supported, because the state of loss scaling would belong to checkpoints, for GPUs with at most 32 GB.",
        _D0038, ("trainer/model/test_gpu_formats.py::test_auto_is_bfloat16_as_of_ampere",
                 "trainer/model/test_gpu_formats.py::test_bfloat16_is_refused_by_a_gpu_that_would_emulate_it"),
    ),
    Repair(
        "G24", "Answers are generated from weights that are gathered once, or skipped with the reason. Generating is "
        "still eager: a static cache with compiled decoding can't be proved without a GPU.", _D0038,
        ("trainer/evaluation/test_generation.py::test_generating_a_token_gathers_nothing",
         "trainer/evaluation/test_generation.py::test_answers_are_skipped_with_a_reason_if_the_full_model_doesnt_fit"),
    ),
    Repair(
        "G25", "A result is loaded where all of its way has room, on the host and on the GPU.", _D0042,
        ("trainer/model/test_adapter_merge.py::test_a_result_is_loaded_where_all_of_its_way_fits_and_its_base_is_"
         "quantized_alike",),
    ),
    Repair(
        "G26", "The base of a result is quantized on the device that trained, wherever the copy is kept.", _D0034,
        (_NF4 + "test_a_weight_is_quantized_on_the_device_that_computes_wherever_it_is_kept",
         "trainer/model/test_adapter_merge.py::test_a_result_is_loaded_where_all_of_its_way_fits_and_its_base_is_"
         "quantized_alike"),
    ),
    Repair(
        "G27", "NVML's figures have the UUID that DCGM uses, and Xid and ECC errors are counted.", _D0042,
        ("trainer/reporting/test_gpu_watch.py::test_every_figure_has_its_unit_and_the_uuid_that_dcgm_uses",
         "trainer/reporting/test_rank_figures.py::test_speed_is_shown_by_gpu_and_as_a_share_of_the_peak"),
    ),
    Repair(
        "G28", "A rank that stays slow is named with its node.", _D0042,
        ("trainer/training/test_stragglers.py::test_a_slow_rank_is_named_with_its_node_and_changes_no_loss",),
    ),
    Repair(
        "G29", "When ranks stall, their flight records name the collective and the rank that is missing.", _D0042,
        ("trainer/supervisor/test_flight_records.py::test_the_rank_that_the_others_wait_for_has_called_fewer_"
         "collectives",),
    ),
    Repair(
        "G30", "A claim that the administrator names holds models for pods, attempts and jobs.", _D0041,
        ("trainer/storage/test_model_cache.py::test_of_two_pods_one_downloads_and_the_other_waits",),
    ),
    Repair(
        "G31", "FSDP2 shards bases in nf4. With int8, only ddp is supported: its scales are an attribute of the "
        "parameter, which FSDP2 doesn't shard; such a run in bfloat16 is warned of float16's range.", _D0038,
        (_NF4 + "test_the_losses_are_those_of_ddp_up_to_rounding",
         "trainer/model/test_gpu_formats.py::test_int8_on_a_gpu_in_bfloat16_comes_with_a_warning_and_a_remedy"),
    ),
    Repair(
        "G32", "In full training with ddp on GPUs, gradients are sent in bfloat16 and added up in float32. They are "
        "still sent after the last backward pass: a rank that runs out of memory in it would leave the others in a "
        "collective.", _D0035,
        ("trainer/parallel/test_gradient_messages.py::test_all_ranks_have_the_same_mean_which_is_as_exact_as_the_"
         "format",
         "trainer/parallel/test_gradient_messages.py::test_half_of_the_bytes_are_sent_and_memory_for_two_copies_is_"
         "needed"),
    ),
    Repair(
        "G33", "The preflight pod stores its tokens next to the checkpoints, and the pods of every attempt download "
        "them. Without a preflight (runPolicy.preflight: never), ranks still render the rows.", _D0052,
        ("trainer/destination/test_token_store.py::test_an_attempt_computes_no_tokens_that_the_preflight_has_stored",),
    ),
    Repair(
        "G34", "A job can set its own grace period.", _D0034,
        (_MANIFESTS + "test_a_jobs_own_grace_period_wins_and_the_trainer_knows_it",),
    ),
)  # fmt: skip
