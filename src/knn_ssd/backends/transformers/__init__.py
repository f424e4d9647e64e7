"""Any decoder of transformers, adapted from outside."""
