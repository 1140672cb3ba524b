"""Measured gains of many features: how far each went, so far, of the way that was foretold for it.

The forecast is that of `measured`: hold + g1 * (linear - hold) + g2 * (quadratic - linear). A large network has
hundreds of features, each of a few megabytes, so that time goes to small operations: a comparison takes four
of them, on a sample, and all gains are fitted together when the first one is asked for.
"""
from itertools import accumulate

import torch

from .forecast import numbers
from .measured import MEMORY, Fit, term_weights

# Gains before anything was measured, and what a fit leans to, relative to the terms' own energy. Below 1,
# the first gain makes every forecast lag behind, and such errors add up over a run: a least-squares fit alone would
# choose it so.
PRIOR, LEAN = (1.0, 1 / 3), 1.0
# Gains are fitted to about so many numbers of a feature.
SAMPLE = 2 ** 14


class Gains:
    """Gains of every feature and picture, by keys of the caller's choice."""

    def __init__(self):
        self.products, self.fitted = {}, {}

    def learn(self, key, value, past, sigmas, sigma, axis):
        """Compare `value`, computed at `sigma`, with what `past` (newest first, computed at `sigmas`) foretold.

        `axis` of an output counts the pictures. Earlier comparisons count half as much each time.
        """
        hold, *terms = term_weights(sigmas, sigma)
        rows = [[1.0, *(-w for w in hold)], *([0.0, *term] for term in terms)]
        known = torch.stack([sample(t, axis) for t in (value, *past)])
        moved = torch.tensordot(numbers(rows, known), known, 1).movedim(1, 0)  # [pictures, change and terms, numbers]
        products, before = moved @ moved.mT, self.products.get(key)
        self.products[key] = products if before is None else torch.add(products, before, alpha=MEMORY)
        self.fitted.pop(key, None)

    def steps(self, key, sigmas, sigma, like):
        """What to add of each difference between outputs at `sigmas` (newest first) to the newest one, at `sigma`.

        Tensor [pictures or 1, outputs - 1] on the device of `like`.
        """
        if key in self.products and key not in self.fitted:
            self._fit()
        gains = self.fitted.get(key)
        if gains is None:
            gains = torch.tensor([PRIOR]).to(like.device)
        terms = [[-w for w in accumulate(reversed(term[1:]))][::-1] for term in term_weights(sigmas, sigma)[1:]]
        return gains[:, :len(terms)] @ numbers(terms, gains).reshape(len(terms), len(terms))

    def tensors(self):
        """Every tensor held."""
        return [*self.products.values(), *self.fitted.values()]

    def forget(self, gone):
        """Drop the keys of which `gone` is true."""
        for held in (self.products, self.fitted):
            for key in [key for key in held if gone(key)]:
                del held[key]

    def _fit(self):
        """Fit the gains of all keys that were compared anew, alike ones together."""
        alike = {}
        for key, products in self.products.items():
            if key not in self.fitted:
                alike.setdefault((products.shape, products.device), []).append(key)
        for keys in alike.values():
            p = torch.stack([self.products[key] for key in keys])
            fit = Fit(p[..., 1, 1], p[..., 1, 2], p[..., 2, 2], p[..., 0, 1], p[..., 0, 2])
            # Copies: a view would keep the others' memory, too.
            self.fitted.update(zip(keys, torch.unbind_copy(fit.gains(PRIOR, LEAN)[..., 1:], 1)))


def gains_bytes(pictures):
    """Bytes that are held for one feature of so many pictures: what was compared, and two gains, in float32."""
    return pictures * (3 * 3 + 2) * 4


def sample(x, axis):
    """About SAMPLE numbers of `x`, spread evenly over those of each picture, in float32: [pictures, numbers]."""
    return x.movedim(axis, 0).flatten(1)[:, ::x.numel() // SAMPLE | 1].float()
