"""What a model and a run are: frozen dataclasses with a JSON round trip. Nothing here imports JAX."""
