"""Small 4 against Small 3: same device, same engine, same load client (`python -m cierzo.bench.headline`)."""
