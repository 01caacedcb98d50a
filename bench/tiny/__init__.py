"""The tiny model: tasks with checkable answers, a tokenizer and a few megabytes of weights that learned them."""
