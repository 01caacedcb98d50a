"""How long the next step may take, by how long those before it took."""

from __future__ import annotations

from cierzo.scheduler.plan import StepPlan

SHARE_OF_THE_LAST = 0.25


class StepTimes:
    """Moving means: seconds of a step that only decodes, and seconds per token of one that computes prompts too."""

    def __init__(self) -> None:
        self.predicted_s = 0.0  # 0.0: not known
        self._decode_s = 0.0
        self._token_s = 0.0

    def expect(self, plan: StepPlan) -> None:
        """A step is about to run."""
        decodes = plan.num_tokens == len(plan.seqs)
        self.predicted_s = self._decode_s if decodes else self._token_s * plan.num_tokens

    def took(self, plan: StepPlan, seconds: float) -> None:
        """A step has ended."""
        if not plan.seqs:
            return
        if plan.num_tokens == len(plan.seqs):
            self._decode_s = _mean(self._decode_s, seconds)
        else:
            self._token_s = _mean(self._token_s, seconds / plan.num_tokens)


def _mean(mean: float, last: float) -> float:
    return mean + SHARE_OF_THE_LAST * (last - mean) if mean else last
