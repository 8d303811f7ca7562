"""Two models in turn: what the benchmarks that compare a model with another share."""
import statistics
import time
from typing import Callable, Dict, List, Optional, Sequence

import torch


def make_step(
        model: torch.nn.Module,
        x: torch.Tensor,
        train: bool,
        amp: Optional[torch.dtype] = None,
        run: Optional[Callable] = None,
) -> Callable[[], None]:
    """Set a model's mode; return a function that runs one step on a batch: forward, or with backward and zero_grad.

    Args:
        amp: The dtype of autocast; None is without.
        run: What is called in the model's place, the compiled model for example.
    """
    model.train(train)
    run = model if run is None else run

    def step() -> None:
        with torch.inference_mode(not train), torch.autocast(x.device.type, amp, enabled=amp is not None):
            out = run(x)
        if train:
            out.float().sum().backward()
            model.zero_grad()

    return step


def seconds(step: Callable[[], None], repeats: int = 1, synchronize: Callable[[], None] = lambda: None) -> float:
    """Return how long a step takes: the mean of `repeats` of them, with the device waited for before and after."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize()
    return (time.perf_counter() - begin) / repeats


def compare(timers: Sequence[Callable[[], float]], rounds: int, batch_size: int) -> Dict[str, object]:
    """Return medians and ratios of two models that take turns; each timer returns the seconds of one step."""
    times: List[List[float]] = [[timer() for timer in timers] for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in times]
    return dict(
        ms_per_image=[1e3 * statistics.median(t) / batch_size for t in zip(*times, strict=True)],
        ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios), rounds=ratios)
