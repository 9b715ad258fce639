"""Small networks: what reads an observation, and the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from aligngym.core.spaces import encoded_shape, is_image

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


class ObservationNetwork(nn.Module):
    """Computes features of encoded observations: numbers one-hot, vectors as they are, images by convolutions.

    Images of 36 pixels or more go through the three convolutions of V. Mnih et al., *Human-level control through deep
    reinforcement learning*, 2015; smaller ones, such as a grid's cells, through two of 3×3. Bytes are divided by 255.

    Args:
        space: of the observations.
        hidden: widths of the layers; may be empty, and the features are then the input itself.
        activation: after each layer, one of ``tanh``, ``relu``, ``elu`` and ``silu``.

    Attributes:
        num_features: width of what is returned.

    Raises:
        ValueError: for an unknown activation or a width that is not positive.
    """

    def __init__(self, space: spaces.Space, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden layers have at least one unit each, not {list(hidden)}")
        shape = encoded_shape(space)
        self.num_states = int(space.n) if isinstance(space, spaces.Discrete) else None
        self.convolutions = _convolutions(shape) if is_image(space) else None
        if self.num_states is not None:
            width = self.num_states
        elif self.convolutions is not None:
            with torch.no_grad():
                width = self._flat_image(torch.zeros(1, *shape)).shape[1]
        else:
            width = int(torch.Size(shape).numel())
        layers: list[nn.Module] = []
        for units in hidden:
            layers += [nn.Linear(width, units), ACTIVATIONS[activation]()]
            width = units
        self.layers = nn.Sequential(*layers)
        self.num_features = width

    def forward(self, observations: Tensor) -> Tensor:
        """Return ``[N, num_features]`` for ``[N, …]`` encoded observations."""
        if self.num_states is not None:
            return self.layers(F.one_hot(observations, self.num_states).float())
        if self.convolutions is not None:
            return self.layers(self._flat_image(observations))
        return self.layers(observations.flatten(1).float())

    def _flat_image(self, images: Tensor) -> Tensor:
        assert self.convolutions is not None
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self.convolutions(scaled.movedim(-1, 1)).flatten(1)


def _convolutions(shape: tuple[int, ...]) -> nn.Sequential:
    height, width, channels = shape
    if min(height, width) >= 36:
        layers = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
    else:
        layers = [(16, 3, 1, 1), (32, 3, 1, 1)]
    modules: list[nn.Module] = []
    for filters, size, stride, padding in layers:
        modules += [nn.Conv2d(channels, filters, size, stride, padding), nn.ReLU()]
        channels = filters
    return nn.Sequential(*modules)


def initialise_orthogonally(network: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Make the weights of all linear and convolutional layers orthogonal, and their biases 0.

    A. Saxe et al., *Exact solutions to the nonlinear dynamics of learning in deep linear networks*, 2014. That PPO
    gains from it, with √2 inside, 0.01 at the policy's and 1 at the critic's last layer: L. Engstrom et al.,
    *Implementation matters in deep policy gradients*, 2020.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(module.weight, gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
