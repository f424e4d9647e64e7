"""Draft, verify, accept: the rounds of speculative decoding, who drafts, and how far."""
