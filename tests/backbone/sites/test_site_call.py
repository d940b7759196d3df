"""One pass from the edge's side."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import SiteSpec


def test_a_site_answers_once_however_often_it_is_asked() -> None:
    class Dropping(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5))

    layer = Dropping(4, 3)
    call = SiteCall([Site("model.layers.0.q", SiteSpec(0, "q"), layer)], keep=True)
    x = torch.randn(1, 6, 4)
    first = call.forward([0], [x])[0]
    assert torch.equal(call.forward([0], None)[0], first)
    gradient = torch.randn(1, 6, 3)
    answers = [call.backward([0], [gradient], wanted=True)[0] for _ in range(2)]
    assert torch.equal(answers[0], answers[1])
    alone = torch.autograd.grad(layer(torch.zeros(1, 6, 4)), layer.bias, gradient)[0]
    assert torch.equal(call.gradients()[1], alone)
