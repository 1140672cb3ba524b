"""Carrying the difference between branches forward where it feeds back on itself.

The difference is multiplied by cfg - 1 and moves the latent, and the network answers to that in the next
difference. Continued along a polynomial over long gaps, or at a high cfg, it swings up from gap to gap;
held, it does not. So the forecast lies between the two: the last value, fading as it was seen to fade,
and the measured polynomial, each with the less weight the more it was wrong when last compared.
"""
import torch

from .measured import MeasuredHistory

# Of the fading seen from one computed value to the next, a forecast takes on this part: what merely
# changed looks like fading, too.
FADES = 0.5
LEAST = 1e-3  # so much of a value is left at least, where the next one was computed
TINY = 1e-12


class WeighedHistory(MeasuredHistory):
    """The last values of a quantity in bands, newest first, with what two ways to continue them were worth.

    Both are told for every picture of the batch by itself, and stay on the device.
    """

    def push(self, sigma, bands):
        """Remember `bands` (tuple of tensors [batch, ...]) as computed at `sigma`, and learn from them."""
        if 0 in self.others(sigma):
            values = torch.stack(bands)
            if len(self.nodes) > 1:
                self._weigh(sigma, values.sum(0))
            self._see_fading(sigma, values.flatten(2))
        super().push(sigma, bands)

    def clear(self):
        """Forget everything."""
        super().clear()
        self.share = self.left = self.span = None

    def weights(self, sigma):
        """Weight of every value in the forecast at `sigma`, tensor [1 or batch, bands, nodes]."""
        fading = self._fading(sigma)
        return fading if self.share is None else torch.lerp(fading, super().weights(sigma), self.share)

    def _fading(self, sigma):
        """Weights of a forecast by the newest value alone, as `weights`."""
        _, count, batch = self.stack.shape[:3]
        weights = self.stack.new_zeros(batch, count, len(self.nodes))
        weights[..., 0] = 1.0 if self.left is None else self.left ** (FADES * (self.nodes[0] - sigma) / self.span)
        return weights

    def _see_fading(self, sigma, values):
        """Note how much of the newest value is left in `values` [bands, batch, numbers]: [batch, bands]."""
        newest = self.stack[0].flatten(2)
        left = (values * newest).sum(-1) / newest.pow(2).sum(-1).clamp_min(TINY)
        self.left, self.span = left.clamp(LEAST, 1.0).mT, self.nodes[0] - sigma

    def _weigh(self, sigma, true):
        """Compare both forecasts with `true` [batch, ...] for the share of the measured one, [batch, 1, 1]."""
        fading, measured = (self._wrong(weights, true) for weights in (self._fading(sigma), super().weights(sigma)))
        self.share = (fading / (fading + measured).clamp_min(TINY))[:, None, None]

    def _wrong(self, weights, true):
        """Sum of squared errors of a forecast by `weights`, [batch]."""
        return (self.weighted(weights) - true).flatten(1).pow(2).sum(-1)
