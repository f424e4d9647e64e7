"""From prompts to an atlas. `pipeline.calibrate` is the whole of it; the other modules are its steps."""
