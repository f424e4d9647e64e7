"""Draft, verify, accept: the rounds of speculative decoding, its drafters, and how far they draft."""
