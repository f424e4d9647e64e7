"""From prompts to an atlas: `pipeline.calibrate` runs the whole calibration, and the other modules are its steps."""
