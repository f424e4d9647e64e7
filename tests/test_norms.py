"""RMS norms of transformers' models, run by the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knn_ssd.backends.transformers.norms import norm_replacements
from knn_ssd.kernels import binding
from knn_ssd.testing import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

SIZES = {"hidden_size": 64, "head_dim": 32}  # which the kernels take
WITHOUT = ("phi", "gpt_neox", "gpt2", "stablelm", "cohere2", "falcon")  # have layer norms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rms_norm_of_a_family_is_found_and_gives_what_it_gave(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if family != "falcon" or name != "head_dim"}
    model = tiny_model(family, dtype=dtype, **sizes)
    norms = {id(vars(m)): m for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    for norm in norms.values():
        nn.init.normal_(norm.weight)
    found = list(norm_replacements(model.modules()))
    assert {id(each.attributes) for each in found} == set(norms)
    assert bool(norms) == (family not in WITHOUT)
    for each in found:
        norm = norms[id(each.attributes)].float()
        x = 3 * torch.randn(2, 5, len(norm.weight)).transpose(0, 1)
        x[1] *= 1e-3  # so small that epsilon counts
        y = each.value(x)
        torch.testing.assert_close(y, norm(x), rtol=1e-5, atol=1e-6)
        for i in range(5):
            assert torch.equal(each.value(x[i : i + 1, :1]), y[i : i + 1, :1])


class Shifted(nn.Module):
    """Like an RMS norm, but for what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    "module", [Shifted(), nn.LayerNorm(64, bias=False), nn.RMSNorm(40, eps=1e-6), nn.Linear(64, 64)]
)
def test_other_modules_stay_as_they_are(module: nn.Module) -> None:
    assert not list(norm_replacements([module]))


def test_sizes_that_the_kernel_does_not_take_are_refused() -> None:
    x = torch.zeros(2, 40)
    with pytest.raises(ValueError, match="sizes"):
        binding.kernels().knn_ssd_rms_norm(x.data_ptr(), 2, 40, x.data_ptr(), 1e-6, x.data_ptr())
