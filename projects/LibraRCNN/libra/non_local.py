"""
Shape shorthand in this module:

    B: number of images
    C: number of channels
    P: number of positions of a feature map
"""

from torch import Tensor, nn


def non_local(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """
    Gather for each position from all positions of its image::

        y_i = sum_j softmax_j(theta_i . phi_j) g_j

    With theta, phi and g linear in the features, this is the embedded Gaussian form of
    https://arxiv.org/abs/1711.07971. It takes B P^2 numbers of memory.

    Args:
        theta, phi, g: floating (B, C, P).

    Returns:
        (B, C, P)
    """
    attention = (theta.transpose(1, 2) @ phi).softmax(dim=2)
    return g @ attention.transpose(1, 2)


class NonLocalBlock(nn.Module):
    """
    Adds the result of :func:`non_local` to a feature map. An untrained block adds nothing: the last
    convolution starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels, 1)
        # A bias would move all scores of a position alike, which the softmax takes away again.
        self.phi = nn.Conv2d(channels, channels, 1, bias=False)
        self.g = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        # Small, so that the attention starts out nearly uniform.
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.out.weight)
        for layer in (self.theta, self.g, self.out):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: floating (B, C, height, width).

        Returns:
            The same shape.
        """
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        return x + self.out(non_local(theta, phi, g).view_as(x))
