"""Other people's programs against the HTTP door: `make clients`."""
