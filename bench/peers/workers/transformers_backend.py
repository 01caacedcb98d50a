"""transformers' `generate`, timed token by token; in float32 it is also what all engines are compared with."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# The makers' params.json says "apply_scale": false: no magnitude term in YaRN, neither on cos and sin nor in the
# softmax scale. transformers derives one from mscale_all_dim; these two keys together switch it off.
PLAIN_SCALE = {"attention_factor": 1.0, "mscale_all_dim": 0.0}


class _Clock(transformers.StoppingCriteria):
    """Asked after each token whether to stop; notes the time instead."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter() - self.start)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Backend:
    """The class that config.json names: AutoModelForCausalLM does not map mistral4's text model.

    dtype: "bfloat16" or "float32".
    """

    def __init__(self, checkpoint: str, dtype: str = "bfloat16") -> None:
        named = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
        model_class = getattr(transformers, named["architectures"][0])
        config = model_class.config_class.from_pretrained(checkpoint)
        if named["model_type"] == "mistral4":
            config.rope_parameters.update(PLAIN_SCALE)
        self.model = model_class.from_pretrained(checkpoint, config=config, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Prompts of one length; all requests get their tokens at the same moments."""
        greedy = transformers.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids, clock = torch.tensor(prompts), _Clock()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return [clock.times] * len(prompts)

    def top_logprobs(self, sequences: list[list[int]], count: int) -> list[list[list[list[float]]]]:
        """Score sequences, a forward pass for each."""
        rows = [self._logprobs(sequence).topk(count, dim=-1) for sequence in sequences]
        return [torch.stack([top.indices, top.values], dim=-1).tolist() for top in rows]

    def save_logprobs(self, sequences: list[list[int]], path: str) -> None:
        """All log-probabilities as a .npy file: float32 [sequence, position, vocabulary]."""
        np.save(path, torch.stack([self._logprobs(sequence) for sequence in sequences]).numpy())

    @torch.inference_mode()
    def _logprobs(self, sequence: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([sequence])).logits[0].float().log_softmax(dim=-1)
