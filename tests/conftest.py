"""What all tests share: one fixed Hypothesis profile, and one thread, with which tiny models are fastest."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed", derandomize=True, deadline=None, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
torch.set_num_threads(1)
