"""Learning-rate schedules, as a factor of the peak."""

import math

from flexpert.config.groups import OptimConfig


def lr_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Factor of the peak learning rate in optimiser step `step` (the first is 0).

    Linear warm-up from 0 over `warmup_steps`, then constant, or cosine or linear down to `final_lr_ratio` at the
    horizon.
    The horizon may lie beyond the run: the public model of FlexOlmo stops a cosine laid out for 5T tokens at 1T.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    horizon = config.horizon_steps or num_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, horizon - config.warmup_steps))
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * shape
