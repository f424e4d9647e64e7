"""An OpenAI-compatible server over one engine: many clients, one model."""
