"""The HTTP door: OpenAI's and Mistral's interfaces, and a page for people, in front of the engine."""
