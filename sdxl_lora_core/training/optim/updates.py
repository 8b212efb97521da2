"""Updates of the trained parameters by their gradients, without a wait for the device."""

from __future__ import annotations

import logging
import math
from collections import deque

import torch
from torch import Tensor

from ...runtime.device import LateRead
from ..config.train_config import TrainConfig
from ..model.flat_parameters import FlatParameters
from ..run.loop_state import LoopState
from .lr_schedule import learning_rate
from .optimizers import ELEMENTWISE, can_be_masked, make_optimizer, masked_step, set_learning_rates
from .weight_average import Averaging

log = logging.getLogger("sdxl_lora")


class Updates:
    """Applies the gradients of `flat` to its values and their average, and reads the losses later.

    An update whose loss or gradient norm is not finite changes nothing. `scaler` is the loss scaler of fp16.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig, scaler: torch.amp.GradScaler) -> None:
        self.flat, self.config, self.scaler = flat, config, scaler
        self.optimizer = make_optimizer(flat.groups_for(config.optimizer in ELEMENTWISE), config)
        self.averaging = Averaging([flat.whole], self.optimizer, config, flat.refresh)
        self._unread: deque[LateRead] = deque()  # losses and gradient norms

    @property
    def wait_for_loss(self) -> bool:
        """Whether each update reads its loss first, because the optimizer cannot skip an update on the device."""
        return not can_be_masked(self.optimizer)

    def apply(self, losses: Tensor, state: LoopState) -> None:
        """Clips the gradients, updates the parameters and clears the gradients.

        `losses` are terms of the update's loss, float32 [N], on the device.
        """
        step = state.step
        rate = learning_rate(self.config, step, state.schedule_start)
        set_learning_rates(self.optimizer, self.flat.groups, rate)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.flat.whole, self.config.max_grad_norm or math.inf)
        values = torch.cat([losses, norm.reshape(1)])
        is_finite = values.isfinite().all()
        self._unread.append(LateRead(values))
        if self.wait_for_loss:
            self.read_losses(state)
            if state.skipped[-1:] != [step + 1]:
                self.optimizer.step()
        else:
            masked_step(self.optimizer, is_finite)
        self.flat.refresh()
        self.averaging.update(step + 1, is_finite)
        self.scaler.update()
        self.flat.clear_gradients()
        state.step = step + 1
        state.learning_rates.append(rate)

    def read_losses(self, state: LoopState, late: int = 0) -> None:
        """Adds the losses of all updates but the last `late` to `state`, and the steps that were skipped.

        The terms of a loss are added up in the order of the passes.
        """
        while len(self._unread) > late:
            *losses, norm = self._unread.popleft().read()
            loss, step = sum(losses), len(state.losses) + 1
            state.losses.append(loss)
            if not (all(map(math.isfinite, losses)) and math.isfinite(norm)):
                state.skipped.append(step)
                log.warning("step %d is skipped: loss %s, gradient norm %s", step, loss, norm)
