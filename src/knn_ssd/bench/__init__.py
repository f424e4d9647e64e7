"""The benchmark: methods measured side by side on the same prompts, summarised and reported."""
