"""Implements stages 1 to 3 of DeepSpeed's ZeRO through Accelerate (zero1, zero2, zero3).

On the CPU, three things are needed together, or Accelerate silently does the wrong thing, which
`check_world` would detect: ACCELERATE_USE_DEEPSPEED, no `cpu=True`, and a backend that is set with
InitProcessGroupKwargs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.model import partitioned
from finetune_trainer.model.partitioned import shape_of
from finetune_trainer.parallel import deepspeed_config
from finetune_trainer.parallel.optimizers import OptimizerConfig, adamw, set_rate
from finetune_trainer.parallel.strategy import MOMENTS, Extent, TensorSource, autocast, to_cpu, trained
from finetune_trainer.parallel.world import World


class DeepSpeedZero:
    """Splits the optimizer state over the ranks in stage 1, the gradients too in stage 2, and the
    weights too in stage 3.

    In stage 1, as in ddp, DeepSpeed gets the gradients once per step, after all ranks have reported
    that theirs are complete.
    """

    def __init__(
        self,
        model: Any,
        config: OptimizerConfig,
        world: World,
        options: deepspeed_config.ZeroOptions,
    ) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        deepspeed_config.skip_compiling_ops()
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config.configuration(options, config), zero3_init_flag=False)
        backend = InitProcessGroupKwargs(backend="gloo" if world.device.type == "cpu" else "nccl")
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend])
        deepspeed_config.check_world(accelerator, world)
        self._calls_engine = options.calls_engine
        self._world = world
        self._stage = options.stage
        self._half = options.half
        self._model = model
        optimizer = adamw(trained(model.to(world.device)), config, fused=options.fused_optimizer)
        self._engine, _ = accelerator.prepare(model, optimizer)
        self._parameters = trained(model)

    @property
    def independent_micro_batches(self) -> bool:
        return not (self._calls_engine or self._world.sequence)

    @property
    def model(self) -> Any:
        return self._engine if self._calls_engine else self._model

    @property
    def unwrapped(self) -> Any:
        return self._model

    def autocast(self, model: Any) -> AbstractContextManager[Any]:
        if model is self._engine:
            # In stage 3, autocast's copies of weights would outlive the gathered weights.
            return deepspeed_config.uncached() if self._stage == 3 else nullcontext()
        return autocast(self._world.device, self._half)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._calls_engine:
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        if not self._calls_engine:
            self._reduce_gradients()
        set_rate(self._engine.optimizer, rate)
        self._engine.step()
        if self._engine.optimizer.overflow:  # a gradient isn't finite, and nothing was changed
            return math.nan
        return float(self._engine.get_global_grad_norm())

    def _reduce_gradients(self) -> None:
        """Averages all gradients over the ranks. A gradient that this rank lacks counts as
        zeros."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._engine.set_gradient_accumulation_boundary(is_boundary=True)
        self._engine.allreduce_gradients()

    def zero_grad(self) -> None:
        """Drops the gradients.

        Once DeepSpeed has reduced them, only an optimizer step that finds an overflow drops them,
        so such a step is simulated.
        """
        if not self._calls_engine:
            for parameter in self._parameters.values():
                parameter.grad = None
            return
        optimizer = self._engine.optimizer
        overflow_check = "_overflow_check_and_loss_scale_update" if self._stage == 3 else "check_overflow"

        def report_overflow(*_: Any, **__: Any) -> None:
            optimizer.overflow = True

        check_grad_overflow = getattr(optimizer, "check_grad_overflow", None)
        optimizer.check_grad_overflow = True
        setattr(optimizer, overflow_check, report_overflow)
        try:
            self._engine.step()
        finally:
            delattr(optimizer, overflow_check)
            optimizer.check_grad_overflow = check_grad_overflow

    @property
    def gathered_bytes(self) -> int:
        parameters = self._model.parameters() if self._stage == 3 else ()
        return sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        import deepspeed

        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        with deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            # These hooks would gather and release the weights of each module.
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)
        self._partition_again()

    def weights(self) -> dict[str, Tensor]:
        gathered = {name: self.gather(name, torch.float32) for name in self._parameters}
        return {name: weight for name, weight in gathered.items() if weight is not None}

    def gather(self, name: str, dtype: torch.dtype) -> Tensor | None:
        from deepspeed.utils import safe_get_full_fp32_param

        if name in self._parameters:
            return self._gathered(name, safe_get_full_fp32_param(self._parameters[name]), dtype)
        frozen = self._model.get_parameter(name)
        with partitioned.gathered(frozen):
            return self._gathered(name, frozen, dtype)

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()

        gathered = {
            f"{moment}/{name}": self._gathered(name, safe_get_full_optimizer_state(parameter, moment), torch.float32)
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }
        return {name: moment for name, moment in gathered.items() if moment is not None}

    def extents(self) -> dict[str, Extent]:
        return {name: self._extent(parameter) for name, parameter in self._parameters.items()}

    def own_weights(self) -> dict[str, Tensor]:
        return {name: to_cpu(self._local_part(parameter)) for name, parameter in self._parameters.items()}

    def own_optimizer_state(self) -> dict[str, Tensor]:
        self._link_moments()
        return {
            f"{moment}/{name}": to_cpu(self._local_part(parameter, moment))
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set_optimizer_state(self, moments: TensorSource, steps: int) -> None:
        optimizer = self._engine.optimizer
        partitions = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        for partition in partitions:
            optimizer.optimizer.state[partition] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        self._link_moments()
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                self._load_part(parameter, moments, f"{moment}/{name}", moment)

    def set_weights(self, weights: TensorSource) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._load_part(parameter, weights, name)
                if self._stage == 3:
                    parameter.ds_tensor.copy_(self._padded(parameter, weights, name))
                else:
                    parameter.copy_(safe_get_full_fp32_param(parameter))
        if self._stage == 3:
            self._partition_again()

    def _partition_again(self) -> None:
        """Discards the copies of weights that are currently gathered, since they are outdated, and
        gathers the small ones again that DeepSpeed always keeps gathered."""
        for parameter in self._parameters.values():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition([parameter])
        persistent = self._engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def _extent(self, parameter: Any) -> Extent:
        """Returns which part of a weight this rank holds.

        Stage 3 divides each weight. Stages 1 and 2 divide the concatenation of all weights, so a
        rank may hold nothing of some weights.
        """
        shape = tuple(shape_of(parameter))
        if self._stage == 3:
            part_size = parameter.ds_tensor.ds_numel
            offset = min(part_size * self._world.rank, parameter.ds_numel)
            return Extent(shape, offset, min(part_size, parameter.ds_numel - offset))
        if parameter._hp_mapping is None:
            return Extent(shape, 0, 0)
        fragment = parameter._hp_mapping.lp_fragment_address
        return Extent(shape, fragment.start, fragment.numel)

    def _local_part(self, parameter: Any, moment: str | None = None) -> Tensor:
        """Returns this rank's part of a weight, or of one of its moments, in float32 and without
        DeepSpeed's padding."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if self._stage != 3:
            mapping = parameter._hp_mapping
            part: Tensor = torch.empty(0) if mapping is None else mapping.get_hp_fragment(moment)
            return part
        padded: Tensor = (
            safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
        )
        return padded[: self._extent(parameter).length]

    def _load_part(self, parameter: Any, tensors: TensorSource, name: str, moment: str | None = None) -> None:
        """Copies this rank's part of the tensor `name` into a weight or one of its moments."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self._stage == 3:
            value = self._padded(parameter, tensors, name)
            if moment:
                safe_set_local_optimizer_state(parameter, value, moment)
            else:
                safe_set_local_fp32_param(parameter, value)
            return
        extent = self._extent(parameter)
        part = tensors.part(name, extent.offset, extent.length)
        if extent.length:
            parameter._hp_mapping.get_hp_fragment(moment).copy_(part)

    def _padded(self, parameter: Any, tensors: TensorSource, name: str) -> Tensor:
        """Returns this rank's part of the tensor `name`, padded with zeros to the length that the
        parts of all ranks have."""
        extent = self._extent(parameter)
        value = torch.zeros(parameter.ds_tensor.ds_numel, device=self._world.device)
        value[: extent.length] = tensors.part(name, extent.offset, extent.length)
        return value

    def _link_moments(self) -> None:
        """Links parameters to their moments.

        DeepSpeed 0.19 does so only once, after the first step of the first group, when the other
        groups don't have any moments yet.
        """
        if self._stage != 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _gathered(self, name: str, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Returns a copy of what all ranks gathered on rank 0, and None on the others, which don't
        keep it."""
        if value is None or value.numel() == 0:
            raise RuntimeError(f"DeepSpeed returned no values for {name}")
        return to_cpu(value, dtype) if self._world.is_first else None
