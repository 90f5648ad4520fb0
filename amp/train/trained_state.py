"""Trained weights and AdamW's moments by parameter name, whatever engine holds them.

DDP holds them whole on each rank, ZeRO holds a slice a rank. By name and whole they make one checkpoint format, which
any engine reads on any number of ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer

from amp.distributed import rank, world_size
from amp.errors import AmpError
from amp.model.clip import ActionAwareCLIP

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainedState:
    """What a stage trains, behind `Accelerator.prepare`.

    AdamW's moments exist from the start, at zero as AdamW itself would make them: ZeRO has no place to load them to
    before.

    Args:
        model: The unwrapped model.
        optimizer: As `prepare` returned it.
        scaler: Accelerate's gradient scaler of fp16 runs, or None.
    """

    def __init__(
        self, model: ActionAwareCLIP, optimizer: AcceleratedOptimizer, scaler: torch.amp.GradScaler | None = None
    ):
        self._scaler = scaler
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = optimizer.optimizer
        self._zero: Any = inner if hasattr(inner, "loss_scaler") else None
        self._adam = inner if self._zero is None else inner.optimizer
        held: Iterable[torch.Tensor] = self.parameters.values()
        if self._zero is not None:  # ZeRO 1 and 2 hold one flat slice a parameter group, 3 one a sub-group
            slices = getattr(inner, "single_partition_of_fp32_groups", None)
            held = inner.fp32_partitioned_groups_flat if slices is None else slices
        self._held = list(held)
        for tensor in self._held:
            self._adam.state[tensor] = {"step": torch.tensor(0.0), **{m: torch.zeros_like(tensor) for m in MOMENTS}}
        if self._zero is not None and hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 weights on the CPU; every rank calls it, rank 0 gets them, the others an empty dict."""
        return self._collect("")

    def moments(self) -> dict[str, torch.Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` on the CPU; every rank calls it, as `weights`."""
        return {f"{m}.{name}": value for m in MOMENTS for name, value in self._collect(m).items()}

    @property
    def updates(self) -> int:
        """Updates that AdamW has made; steps skipped for their gradients don't count."""
        return int(self._adam.state[self._held[0]]["step"])

    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], updates: int) -> None:
        """Puts back what `weights`, `moments` and `updates` returned, on every rank, before the next step.

        Raises:
            AmpError: One is missing or of another shape.

        The model must hold the weights already when it is given to `prepare`: ZeRO keeps a second copy of them.
        """
        for name in self.parameters:
            shape = self._shape(name)
            for part, where in ((weights, name), *((moments, f"{moment}.{name}") for moment in MOMENTS)):
                if where not in part or part[where].shape != shape:
                    seen = tuple(part[where].shape) if where in part else "missing"
                    raise AmpError(f"the checkpoint's {where} is {seen}, expected shape {tuple(shape)}; remove it")
        for tensor in self._held:
            self._adam.state[tensor]["step"].fill_(updates)
        for name in self.parameters:
            self._put(name, "", weights[name])
            for moment in MOMENTS:
                self._put(name, moment, moments[f"{moment}.{name}"])

    def _shape(self, name: str) -> torch.Size:
        parameter = self.parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place

    def _collect(self, moment: str) -> dict[str, torch.Tensor]:
        out = {}
        for name, parameter in self.parameters.items():  # a collective each: all ranks in the same order
            value = self._whole(parameter, moment)
            if rank() == 0:
                out[name] = value.detach().float().cpu().clone()
        return out

    def _whole(self, parameter: torch.nn.Parameter, moment: str) -> torch.Tensor:
        if self._zero is None:
            return self._adam.state[parameter][moment] if moment else parameter
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def _put(self, name: str, moment: str, value: torch.Tensor) -> None:
        parameter = self.parameters[name]
        if self._zero is None:
            (self._adam.state[parameter][moment] if moment else parameter).copy_(value)
            return
        from deepspeed import utils

        if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its call for whole values fails where ranks don't divide them
            size = parameter.ds_tensor.numel()
            value = F.pad(value.flatten(), (0, size * world_size() - value.numel()))[rank() * size :][:size]
            if moment:
                utils.safe_set_local_optimizer_state(parameter, value, moment)
            else:
                utils.safe_set_local_fp32_param(parameter, value)
        elif moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)

    # -- fp16 -------------------------------------------------------------------------------------------------------

    def loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale, Accelerate's or DeepSpeed's; empty where there is none."""
        if self._scaler is not None:
            return self._scaler.state_dict()
        scaler = getattr(self._zero, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """Puts back what `loss_scale` returned."""
        if state and self._scaler is not None:
            self._scaler.load_state_dict(state)
        elif state:
            vars(self._zero.loss_scaler).update(state)
