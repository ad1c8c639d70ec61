"""Seeded requests whose prompts are computed in several chunks, on a CPU.

vLLM samples for every request of a step, also for one whose prompt is not computed to its end, and throws that sample
away. A seeded request's generator is then turned back by what the sample took of it; but a CPU's generator cannot be
turned back, and the engine dies (vLLM 0.32: "CPU Generator does not use offset").

Here such a request's generator is set aside for the step. The sample that nobody keeps is drawn without it.
"""

from typing import Any

import numpy as np


def keep_engines_alive() -> None:
    """Mend it in this process and those forked from it.

    Raises:
        RuntimeError: this vLLM release samples in another way.
    """
    from vllm.v1.worker import cpu_model_runner

    runner: Any = cpu_model_runner.CPUModelRunner
    sample, keep_books = getattr(runner, "_sample", None), getattr(runner, "_bookkeeping_sync", None)
    if sample is None or keep_books is None:
        raise RuntimeError(f"{runner.__qualname__} is not what it was: this vLLM release samples in another way")

    def set_aside_and_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = (
            np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist() if generators else ()
        )
        self.generators_set_aside = {index: generators.pop(index) for index in unfinished if index in generators}
        return sample(self, *args, **kwargs)

    def keep_books_and_put_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(self.generators_set_aside)

    runner._sample = set_aside_and_sample
    runner._bookkeeping_sync = keep_books_and_put_back
