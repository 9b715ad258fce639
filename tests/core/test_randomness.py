import pytest
import torch
from torch import nn

from aligngym.core.randomness import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_for_a_block_and_then_as_before(training):
    # A part that was added later may be in another mode than the whole.
    module = nn.Sequential(nn.Dropout(0.5)).train(training)
    module[0].train()
    x = torch.ones(100)
    with evaluating(module):
        assert torch.equal(module(x), x)
    with pytest.raises(KeyError), evaluating(module):
        raise KeyError
    assert module.training == module[0].training == training
    assert torch.equal(module(x), x) != training
