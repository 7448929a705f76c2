"""Sharded: a Learner on DeepSpeed's ZeRO stages 1 to 3, through Accelerate. Chosen by `assembly`.

Three things are needed together on the CPU, else Accelerate goes wrong silently: ACCELERATE_USE_DEEPSPEED, no
`cpu=True`, and the backend named by InitProcessGroupKwargs. `assert_same_world` would notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune_trainer import zero_config
from finetune_trainer.learner import MOMENTS, Extent, Stored, assert_same_world, to_cpu, trained
from finetune_trainer.optimizers import Recipe, adamw, set_rate, shape_of
from finetune_trainer.world import World


class Sharded:
    """Stage 1 splits the optimizer's state over the ranks, 2 the gradients too, 3 the weights too.

    In stage 1 DeepSpeed sees the gradients once a step, after all ranks have said that theirs are whole, as in ddp.
    """

    def __init__(
        self, model: Any, recipe: Recipe, world: World, stage: zero_config.Stage, offload: zero_config.Offload = "none"
    ) -> None:
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

        zero_config.without_compiling()
        plugin = DeepSpeedPlugin(hf_ds_config=zero_config.configuration(stage, recipe, offload), zero3_init_flag=False)
        backend = InitProcessGroupKwargs(backend="gloo" if world.device.type == "cpu" else "nccl")
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend])
        assert_same_world(accelerator, world)
        self.alone = stage == 1  # in 2 and 3 ranks meet inside forward and backward
        self._world = world
        self._stage = stage
        self._plain = model
        engine, _ = accelerator.prepare(model.to(world.device), adamw(trained(model), recipe, fused=False))
        self._engine = engine
        self._parameters = trained(model)

    @property
    def model(self) -> Any:
        return self._plain if self.alone else self._engine

    @property
    def plain(self) -> Any:
        return self._plain

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.alone:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> float:
        if self.alone:
            self._meet()
        set_rate(self._engine.optimizer, rate)
        self._engine.step()
        if self._engine.optimizer.overflow:  # DeepSpeed found a gradient that isn't finite, and changed nothing
            return math.nan
        return float(self._engine.get_global_grad_norm())

    def _meet(self) -> None:
        """All ranks' gradients of a step, of every weight: one may lack some that another has."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._engine.set_gradient_accumulation_boundary(is_boundary=True)
        self._engine.allreduce_gradients()

    def forget(self) -> None:
        """DeepSpeed drops gradients that met in one way only: by a step that finds an overflow."""
        if self.alone:
            for parameter in self._parameters.values():
                parameter.grad = None
            return
        optimizer = self._engine.optimizer
        looks_for_it = "_overflow_check_and_loss_scale_update" if self._stage == 3 else "check_overflow"

        def found(*_: Any, **__: Any) -> None:
            optimizer.overflow = True

        before = getattr(optimizer, "check_grad_overflow", None)
        optimizer.check_grad_overflow = True
        setattr(optimizer, looks_for_it, found)
        try:
            self._engine.step()
        finally:
            delattr(optimizer, looks_for_it)
            optimizer.check_grad_overflow = before

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered({name: (p, safe_get_full_fp32_param) for name, p in self._parameters.items()})

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()

        def of(moment: str) -> Any:
            return lambda parameter: safe_get_full_optimizer_state(parameter, moment)

        return self._gathered(
            {f"{moment}/{name}": (p, of(moment)) for name, p in self._parameters.items() for moment in MOMENTS}
        )

    def extents(self) -> dict[str, Extent]:
        return {name: self._extent(parameter) for name, parameter in self._parameters.items()}

    def own_weights(self) -> dict[str, Tensor]:
        return {name: to_cpu(self._held(parameter)) for name, parameter in self._parameters.items()}

    def own_moments(self) -> dict[str, Tensor]:
        self._link_moments()
        return {
            f"{moment}/{name}": to_cpu(self._held(parameter, moment))
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def set_moments(self, moments: Stored, steps: int) -> None:
        optimizer = self._engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        for partition in flat:
            optimizer.optimizer.state[partition] = {
                "step": torch.tensor(float(steps)),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        self._link_moments()
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                self._hold(parameter, moments, f"{moment}/{name}", moment)

    def set_weights(self, weights: Stored) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._hold(parameter, weights, name)
                if self._stage == 3:
                    parameter.ds_tensor.copy_(self._padded(parameter, weights, name))
                else:
                    parameter.copy_(safe_get_full_fp32_param(parameter))
        if self._stage == 3:
            self._split_again()

    def _split_again(self) -> None:
        """Weights that are whole at the moment are old: small ones that stay whole are gathered anew."""
        for parameter in self._parameters.values():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition([parameter])
        staying = self._engine.optimizer.persistent_parameters
        if staying:
            staying[0].all_gather(staying)

    def _extent(self, parameter: Any) -> Extent:
        """Stage 3 cuts each weight; stages 1 and 2 cut all of them laid end to end, so a rank may hold none of one."""
        shape = tuple(shape_of(parameter))
        if self._stage == 3:
            each = parameter.ds_tensor.ds_numel
            offset = min(each * self._world.rank, parameter.ds_numel)
            return Extent(shape, offset, min(each, parameter.ds_numel - offset))
        if parameter._hp_mapping is None:
            return Extent(shape, 0, 0)
        held = parameter._hp_mapping.lp_fragment_address
        return Extent(shape, held.start, held.numel)

    def _held(self, parameter: Any, moment: str | None = None) -> Tensor:
        """This rank's part, as DeepSpeed holds it, without padding."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if self._stage != 3:
            mapping = parameter._hp_mapping
            part: Tensor = torch.empty(0) if mapping is None else mapping.get_hp_fragment(moment)
            return part
        padded: Tensor = (
            safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
        )
        return padded[: self._extent(parameter).length]

    def _hold(self, parameter: Any, tensors: Stored, name: str, moment: str | None = None) -> None:
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

    def _padded(self, parameter: Any, tensors: Stored, name: str) -> Tensor:
        """This rank's part, followed by zeros to the length that every rank's has."""
        extent = self._extent(parameter)
        value = torch.zeros(parameter.ds_tensor.ds_numel, device=self._world.device)
        value[: extent.length] = tensors.part(name, extent.offset, extent.length)
        return value

    def _link_moments(self) -> None:
        """DeepSpeed 0.19 links parameters to their moments once, after the first group's first step, when other groups
        have none yet."""
        if self._stage != 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _gathered(self, wanted: Mapping[str, Any]) -> dict[str, Tensor]:
        """One parameter at a time, so that a rank never holds more than one whole; only rank 0 keeps them."""
        kept: dict[str, Tensor] = {}
        for name, (parameter, whole) in wanted.items():
            value = whole(parameter)
            if value is None or value.numel() == 0:
                raise RuntimeError(f"DeepSpeed gave nothing for {name}")
            if self._world.is_first:
                kept[name] = to_cpu(value)
        return kept
