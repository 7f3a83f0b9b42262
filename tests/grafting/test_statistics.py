"""Running statistics stay the base's own, whatever loop trains a graft."""

import torch
from torch import nn

from finegraft.grafting import graft


def test_running_statistics_are_used_and_not_updated() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].running_mean.fill_(2.0)
    x = torch.rand(5, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = graft(model, {"parts": [{"where": {"type": "linear"}, "what": {"kind": "low-rank", "rank": 2}}]})
    model.train()
    model(x)
    trained = model[1](model[0](x))
    assert [layer.training for layer in model] == [True, True, True]
    assert torch.allclose(trained, model.eval()[1](model[0](x)))
    held.detach()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
