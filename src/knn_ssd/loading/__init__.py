"""From a model's name to a loaded model: Hub id, directory or GGUF file."""
