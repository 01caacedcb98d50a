"""Count of work: what an operation, a step and a model's weights cost on a device. No torch.

sizes.py        sizes of a model's layers, and its matrices by kind
operations.py   `Work`: bytes and operations of one call of each operation of kernels/ops, from plain sizes
data_sheets.py  cards as their maker describes them
weights.py      a configured model's sizes, the number formats of its matrices, the bytes of them all
work.py         a step of a model as a list of operations
launched.py     the same step as a GPU launches it, several operations in one
device.py       a device: bandwidth, rates, memory, and what kernels reach of them
roofs.py        seconds of a kernel's launch on a card, from its machine code: the roofs that it is under
predicted.json  seconds of every operation on the cards by these roofs, written by bench/gpu/predicted.py
cards.py        devices by name: with what was predicted, or what the GPU bench has measured
step_model.py   the price of an operation, a step's seconds on a device, sums over many steps

bench/gpu runs where msgspec may be missing: sizes.py, operations.py, data_sheets.py and roofs.py do without it.
"""
