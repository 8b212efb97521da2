"""The state in which a run begins: its plan for memory, made before anything is loaded to the device."""

from __future__ import annotations

import logging

from ...runtime.device import DeviceMemory
from ..data.batches import PassOfUpdate, TrainingData
from ..run.loop_state import LoopState
from .memory_measure import MeasuredRun
from .memory_plan import plan_memory

log = logging.getLogger("sdxl_lora")


def planned_state(data: TrainingData, memory: DeviceMemory) -> LoopState:
    """The state of a new run. A resumed run keeps the plan of its first session."""
    config = data.config
    free = min(memory.free(), config.memory_limit_gb * 1e9 or float("inf"))
    areas = [entry.bucket[0] * entry.bucket[1] for entry in data.job.entries]
    largest = areas.index(max(areas))
    measured = MeasuredRun(
        data.job,
        data.device,
        lambda images: data.batch(PassOfUpdate(0, (largest,) * images)),
        data.folders.memory_plans,
    )
    plan = plan_memory(measured, config, free, memory.least)
    memory.take(plan.needed)
    reason = plan.reason(free)
    if plan.tight:
        log.warning("this run may not fit, or use shared memory that is many times slower: %s", reason)
    kept = f"latents and prompts in main memory up to {data.kept.limit / 1e9:.1f} GB"
    return LoopState(
        images_per_pass=plan.images_per_pass,
        gradient_checkpointing=plan.checkpointing,
        base_weights=plan.base_weights,
        offloaded_blocks=plan.offloaded_blocks,
        memory=f"{str(data.dtype).removeprefix('torch.')}, {reason}; {kept}",
    )
