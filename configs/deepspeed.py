"""Keys of DeepSpeed's config that are not for a user to set, and why: people paste what was written for other
trainers."""

from __future__ import annotations

from collections.abc import Mapping

_OURS = "Earwitness decides it"
_BATCH = f"{_OURS}, from batch.global_size, batch.micro_seconds and the number of processes"
_DTYPE = f"{_OURS}: engine.dtype is that of the weights that compute, all sums are fp32"
_OPTIMIZER = "the optimizer and its schedule are those of the section optim"
_OFFLOAD = "state stays on the GPUs; more of them, or batch.micro_seconds, save memory"
_CHECKPOINTS = "checkpoints are Earwitness's own, for any number of processes: section checkpoint"
_CURVES = "times and curves are told by Earwitness: section monitor, `launch status`, TensorBoard"
_SCALING = f"{_OURS}: gradients are summed exactly, and not scaled"
_STAGE3 = "it belongs to ZeRO-3 or ZeRO++, and Earwitness trains with ZeRO-2"
_PARALLEL = "only the batch is divided among the processes"
_DATA = "the order of the samples is Earwitness's: sections data and batch"
_LAYOUT = f"{_OURS}: it saves and loads the state by the place of each parameter in DeepSpeed's buffers"
_NO_USE = "it changes nothing with ZeRO-2 on GPUs"


def _each(reasons: Mapping[str, str]) -> dict[str, str]:
    """Why, by single keys, of reasons by keys that share one."""
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


DECIDED_IN_ZERO = _each(
    {
        f"{_OURS}: it is 2, as checkpoints and exact sums are written for it; engine.backend chooses FSDP2": (
            "stage"
        ),
        _OFFLOAD: (
            "offload_optimizer offload_param cpu_offload cpu_offload_param cpu_offload_params"
            " cpu_offload_use_pin_memory zenflow sub_group_size super_offload"
        ),
        _LAYOUT: "round_robin_gradients parameter_alignment legacy_stage1",
        _NO_USE: "allgather_partitions load_from_fp32_weights memory_efficient_linear override_module_apply",
        _CHECKPOINTS: "elastic_checkpoint pipeline_loading_checkpoint",
        f"{_OURS}: it finds unused parameters and gradients that are not finite by itself": (
            "ignore_unused_parameters enable_sanity_checks compute_grad_norm"
        ),
        _STAGE3: (
            "zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights"
            " zero_quantized_gradients mics_shard_size mics_hierarchical_params_gather leaf_module"
            " stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size"
            " stage3_param_persistence_threshold stage3_model_persistence_threshold"
            " stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params"
            " stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save"
            " stage3_gather_fp16_weights_on_model_save gather_16bit_weights_on_model_save"
            " max_live_parameters max_reuse_distance prefetch_bucket_size param_persistence_threshold"
            " model_persistence_threshold module_granularity_threshold log_trace_cache_warnings"
            " save_muon_momentum_buffer_in_memory"
        ),
    }
)
"""Of `zero_optimization`."""
DECIDED = _each(
    {
        _BATCH: (
            "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
            " managed_gradient_accumulation elasticity autotuning"
        ),
        _DTYPE: (
            "fp16 bf16 bfloat16 amp torch_autocast data_types communication_data_type"
            " seq_parallel_communication_data_type fp32_allreduce"
        ),
        _OPTIMIZER: "optimizer scheduler zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        "optim.clip_grad_norm is the largest norm": "gradient_clipping",
        _SCALING: "prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients",
        _CURVES: (
            "steps_per_print wall_clock_breakdown memory_breakdown dump_state timers flops_profiler"
            " comms_logger monitor_config tensorboard wandb csv_monitor comet log_level"
        ),
        _CHECKPOINTS: "checkpoint load_universal_checkpoint use_node_local_storage nebula datastates_ckpt",
        _OFFLOAD: "aio",
        "model.gradient_checkpointing does that": "activation_checkpointing",
        "model.compile does that": "compile",
        _DATA: (
            "data_efficiency curriculum_learning dataloader_drop_last progressive_layer_drop"
            " data_sampling data_routing"
        ),
        _PARALLEL: (
            "tensor_parallel autotp sequence_parallel_size pipeline expert_parallel"
            " use_data_before_expert_parallelism hybrid_engine"
        ),
        f"{_OURS}: weights are trained in full": (
            "quantize_training compression_training sparse_attention eigenvalue weight_quantization"
        ),
        _NO_USE: "disable_allgather disable_python_gc zero_allow_comm_data_type_fp32",
    }
)
"""Of the whole config."""
