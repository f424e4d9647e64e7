"""Tools beside generation: doctor, memory, the Hub, plots."""
