"""Fuzzing of what clients send: frames, the splitter, and whole connections. `make fuzz` is the long form."""
