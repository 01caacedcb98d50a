"""Training of the tiny model: `python -m cierzo.bench.train_tiny FOLDER`.

A Mistral 4 with a vision tower, of 1.8 million parameters, learns the tasks of bench/tiny/tasks.py from scratch, in
an hour of two cores, and is written as a checkpoint of 4 MB. transformers computes it; cierzo only serves it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cierzo.bench.tiny.tasks import TASKS, Instance, drawn
from cierzo.bench.tiny.words import END, NUM_TOKENS, Writer, tekken

IGNORED = -100  # a label that no loss is taken of
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 11,
    # Small 4's, but for its factor; attention_factor and mscale_all_dim keep its magnitude out of the softmax scale
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "llama_4_scaling_beta": 0.1,
    },
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "patch_size": 14,
    "image_size": 1540,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
WARM_UP_STEPS = 200
TOLD_STEPS = 50
BALANCE = 0.01  # weight of the loss that spreads tokens over experts


def new_model() -> Any:
    """transformers' model, with random weights."""
    import transformers

    text = transformers.Mistral4Config(**TEXT)
    vision = transformers.PixtralVisionConfig(**VISION)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=2, tie_word_embeddings=False
    )
    config._attn_implementation = "sdpa"
    return transformers.Mistral3ForConditionalGeneration(config).float()


def pixels(one: Instance) -> Tensor | None:
    """An image as the tower takes it, float32 [3, height, width]."""
    if one.image is None:
        return None
    values = (np.asarray(one.image, np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def batch_of(instances: list[Instance], writer: Writer) -> dict[str, Any]:
    """Arguments of the model, padded on the right: a causal model's real tokens see none of that."""
    prompts = [writer.prompt(one) for one in instances]
    answers = [writer.answer(one) for one in instances]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(instances), width), END)
    labels = torch.full((len(instances), width), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    images = [image for one in instances if (image := pixels(one)) is not None]
    seen: dict[str, Any] = {}
    if images:
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        padded = torch.zeros(len(images), 3, height, width)
        for row, image in enumerate(images):
            padded[row, :, : image.shape[1], : image.shape[2]] = image
        seen = {"pixel_values": padded, "image_sizes": torch.tensor([image.shape[1:] for image in images])}
    return {"input_ids": ids, "labels": labels, **seen}


def batches(writer: Writer, count: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Batches for training without an end, each in parts of about the same length."""
    draw = random.Random(seed)
    while True:
        instances = [drawn(task, draw, held_out=False) for task in TASKS for _ in range(count)]
        instances.sort(key=lambda one: len(writer.prompt(one)) + len(writer.answer(one)))
        size = len(instances) // 4
        yield [batch_of(instances[at : at + size], writer) for at in range(0, len(instances), size)]


def balance(routers: list[Any], top: int) -> Tensor:
    """Loss of experts that get more tokens than others (Switch Transformers, equation 4), mean over layers."""
    losses = []
    for logits, _, chosen in routers:
        shares = logits.softmax(-1).mean(0)
        counts = torch.zeros_like(shares).index_add_(0, chosen.flatten(), torch.ones(chosen.numel()))
        losses.append(len(shares) * (counts / (len(logits) * top) * shares).sum())
    return torch.stack(losses).mean()


def train(folder: Path, steps: int, *, count: int, rate: float, seed: int) -> Any:
    """Train for so many steps, and tell how it goes. count: instances of each task in a step; rate: of learning."""
    torch.manual_seed(seed)
    writer, model = Writer(folder), new_model()
    routers: list[Any] = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, given, result: routers.append(result))
    matrices = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    start_s, total = time.monotonic(), 0.0
    for step, parts in enumerate(batches(writer, count, seed), 1):
        if step > steps:
            break
        factor = min(1.0, step / WARM_UP_STEPS) * (0.02 + 0.98 * min(1.0, 2 * (1 - step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        wanted = sum(int((part["labels"] != IGNORED).sum()) for part in parts)
        for part in parts:
            routers.clear()
            labels = part.pop("labels")
            logits = model(**part).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / wanted + BALANCE / len(parts) * balance(routers, TEXT["num_experts_per_tok"])
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % TOLD_STEPS == 0:
            minutes = (time.monotonic() - start_s) / 60
            told = ", ".join(f"{task} {share:.0%}" for task, share in forced(model, writer, 64).items())
            print(f"{minutes:5.1f} min, step {step}, loss {total / TOLD_STEPS:.4f}, {told}", flush=True)
            total = 0.0
    return model


@torch.no_grad()
def forced(model: Any, writer: Writer, count: int, seed: int = 1) -> dict[str, float]:
    """Share of held-out answers of which every token is the likeliest behind those before it, by task: what a
    greedy generation gets right."""
    draw, shares = random.Random(seed), {}
    for task in TASKS:
        batch = batch_of([drawn(task, draw, held_out=True) for _ in range(count)], writer)
        labels = batch.pop("labels")[:, 1:]
        likeliest = model(**batch).logits[:, :-1].argmax(-1)
        shares[task] = ((likeliest == labels) | (labels == IGNORED)).all(-1).float().mean().item()
    return shares


def write_words(folder: Path, seed: int) -> None:
    """Write the tokenizer, made from instances of all tasks."""
    draw, texts = random.Random(seed), []
    for task in TASKS:
        for _ in range(1500):
            one = drawn(task, draw, held_out=False)
            listed = json.dumps([{"type": "function", "function": each} for each in one.tools])
            texts += [one.question, one.answer, one.thinking, listed, f'{{"reasoning_effort": "{one.effort}"}}']
            texts += [] if one.call is None else [one.call[0], json.dumps(one.call[1])]
    (folder / "tekken.json").write_text(json.dumps(tekken(texts), separators=(",", ":")))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m cierzo.bench.train_tiny", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=4000, help="of training (default: %(default)s, an hour)")
    parser.add_argument("--instances", type=int, default=24, help="of each task in a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-3, help="of learning (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_words(asked.folder, asked.seed)
    model = train(asked.folder, asked.steps, count=asked.instances, rate=asked.rate, seed=asked.seed)
    model = model.to(torch.bfloat16)
    model.save_pretrained(asked.folder)
    shares = forced(model, Writer(asked.folder), 500, seed=2)
    print(json.dumps({task: round(share, 4) for task, share in shares.items()}))
    size = sum(math.prod(one.shape) * 2 for one in model.parameters())
    print(f"{size:,} bytes of weights in {asked.folder}")


if __name__ == "__main__":
    main()
