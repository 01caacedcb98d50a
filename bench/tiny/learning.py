"""Learning of the tiny model: batches of instances, what it gets wrong in them, and the steps of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from cierzo.bench.tiny.tasks import Instance
from cierzo.bench.tiny.words import END, Writer

IGNORED = -100  # a label of what is no answer
# Of R, G and B, as published for Mistral's towers; engine/text/image_tokens.py normalises by the same.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DECAY = 0.1  # of weights in a step, per unit of the rate
MOMENTUM = 0.95


@dataclass(frozen=True, slots=True)
class Batch:
    """Instances, several in a row where they fit: what the model is given, and which tokens of it are answers."""

    given: dict[str, Any]
    owners: Tensor  # [rows, width] the instance of each token, -1 behind the last
    labels: Tensor  # [rows, width] the token behind each, where that is an answer's


def packed(instances: list[Instance], writer: Writer) -> Batch:
    """Put these instances into one batch, in which tokens see only their own instance's."""
    written = [(writer.prompt(one), writer.answer(one)) for one in instances]
    rows = _rows([len(prompt) + len(answer) for prompt, answer in written])
    width = max(sum(len(prompt) + len(answer) for prompt, answer in (written[at] for at in row)) for row in rows)
    ids, places, owners, labels = torch.full((4, len(rows), width), IGNORED)
    ids[:], places[:], owners[:] = END, 0, -1
    for row, held in enumerate(rows):
        begin = 0
        for index in held:
            prompt, answer = written[index]
            answered, end = begin + len(prompt), begin + len(prompt) + len(answer)
            ids[row, begin:end], places[row, begin:end] = torch.tensor(prompt + answer), torch.arange(end - begin)
            owners[row, begin:end], labels[row, answered - 1 : end - 1] = index, torch.tensor(answer)
            begin = end
    mask = (owners[:, None, :, None] == owners[:, None, None]) & torch.ones(width, width, dtype=torch.bool).tril()
    given = {"input_ids": ids, "position_ids": places, "attention_mask": mask, "use_cache": False}
    images = [image for held in rows for index in held if (image := pixels(instances[index])) is not None]
    if images:
        height, across = (max(image.shape[side] for image in images) for side in (1, 2))
        sides = [(0, across - image.shape[2], 0, height - image.shape[1]) for image in images]
        given["pixel_values"] = torch.stack([pad(image, side) for image, side in zip(images, sides, strict=True)])
        given["image_sizes"] = torch.tensor([image.shape[1:] for image in images])
    return Batch(given, owners, labels)


def _rows(lengths: list[int]) -> list[list[int]]:
    """Which of these lengths to put into rows as long as the longest: each into the first that has room."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = (row for row in rows if sum(lengths[at] for at in row) + lengths[index] <= max(lengths))
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(index)
    return rows


def pixels(one: Instance) -> Tensor | None:
    """An image as the tower takes it, float32 [3, height, width]."""
    if one.image is None:
        return None
    values = (np.asarray(one.image, np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def judged(model: Any, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """Judge `count` instances: the mean loss of each one's answer's tokens, and how many of these are not the
    likeliest behind those before them. Where there is none, a greedy generation is right."""
    wanted = batch.labels != IGNORED
    logits = model.lm_head(model.model(**batch.given).last_hidden_state[wanted])
    labels, owners, zeros = batch.labels[wanted], batch.owners[wanted], torch.zeros(count)
    losses = zeros.index_add(0, owners, cross_entropy(logits.float(), labels, reduction="none"))
    wrong = zeros.index_add(0, owners, (logits.argmax(-1) != labels).float())
    return losses / owners.bincount(minlength=count), wrong


def balance(routers: list[Any], top: int) -> Tensor:
    """Loss of experts that get more tokens than others (Switch Transformers, equation 4), mean over layers.

    routers: each layer's scores, weights and choices of `top` experts.
    """
    losses = []
    for logits, _, chosen in routers:
        shares = logits.softmax(-1).mean(0)
        counts = torch.zeros_like(shares).index_add_(0, chosen.flatten(), torch.ones(chosen.numel()))
        losses.append(len(shares) * (counts / (len(logits) * top) * shares).sum())
    return torch.stack(losses).mean()


class Muon:
    """Momentum whose update of a matrix is made orthogonal (Jordan, 2024), for equal matrices, or stacks, at once.

    torch's own takes single matrices alone, which for this many small ones costs as much as the model.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        """weights: matrices, or stacks of them."""
        self._same: dict[tuple[int, ...], list[Tensor]] = {}
        for one in weights:
            self._same.setdefault(tuple(one.shape), []).append(one)
        self._momenta = {shape: torch.zeros(len(same), *shape) for shape, same in self._same.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the weights by their gradients, which end with it. rate: of learning."""
        for shape, weights in self._same.items():
            grads = torch.stack([torch.zeros(shape) if one.grad is None else one.grad for one in weights])
            momentum = self._momenta[shape].lerp_(grads, 1 - MOMENTUM)
            update = _orthogonal(grads.lerp(momentum, MOMENTUM)) * max(1.0, shape[-2] / shape[-1]) ** 0.5
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - rate * DECAY).sub_(change, alpha=rate)
                weight.grad = None


def _orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrices, by five steps of Newton and Schulz."""
    is_high = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_high else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_high else x
