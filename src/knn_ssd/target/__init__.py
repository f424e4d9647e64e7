"""Models that can draft for themselves: the contract and its implementations."""
