"""Trained weights and AdamW's moments by parameter name, for any engine.

DDP holds them whole on each rank, ZeRO holds one slice per rank. Stored whole and by name, they form one checkpoint
format that any engine reads on any number of ranks.
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
    """The weights and moments of a stage, after `Accelerator.prepare`.

    AdamW's moments are created at the start, as the zeros that AdamW itself would create. Otherwise ZeRO has no place
    to load them to.

    Args:
        model: The unwrapped model.
        optimizer: The optimizer that `prepare` returned.
        scaler: Accelerate's gradient scaler in fp16 runs, or None.
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
        if self._zero is not None:  # ZeRO 1 and 2 hold one flat slice per parameter group, 3 one per sub-group
            slices = getattr(inner, "single_partition_of_fp32_groups", None)
            held = inner.fp32_partitioned_groups_flat if slices is None else slices
        self._held = list(held)
        for tensor in self._held:
            self._adam.state[tensor] = {"step": torch.tensor(0.0), **{m: torch.zeros_like(tensor) for m in MOMENTS}}
        if self._zero is not None and hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 weights on the CPU. Every rank must call this; rank 0 gets the weights, the others an empty dict."""
        return self._collect("")

    def moments(self) -> dict[str, torch.Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` on the CPU; called like `weights`."""
        return {f"{m}.{name}": value for m in MOMENTS for name, value in self._collect(m).items()}

    @property
    def updates(self) -> int:
        """Number of updates that AdamW has made, without skipped steps."""
        return int(self._adam.state[self._held[0]]["step"])

    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], updates: int) -> None:
        """Restores what `weights`, `moments` and `updates` returned, on every rank, before the next step.

        The model must already hold the weights when it is given to `prepare`, because ZeRO keeps a second copy of them.

        Raises:
            AmpError: A tensor is missing or has another shape.
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
        for name, parameter in self.parameters.items():  # one collective each, in the same order on all ranks
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

        if hasattr(parameter, "ds_tensor"):  # ZeRO-3, whose call for whole values fails if the ranks don't divide them
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
        """State of the dynamic loss scale, Accelerate's or DeepSpeed's; empty without loss scaling."""
        if self._scaler is not None:
            return self._scaler.state_dict()
        scaler = getattr(self._zero, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """Restores what `loss_scale` returned."""
        if state and self._scaler is not None:
            self._scaler.load_state_dict(state)
        elif state:
            vars(self._zero.loss_scaler).update(state)
