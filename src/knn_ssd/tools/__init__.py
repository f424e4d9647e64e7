"""What users look at beside generating: doctor, memory, the Hub, plots."""
