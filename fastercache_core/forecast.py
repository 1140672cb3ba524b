"""How a cached quantity is carried forward: a polynomial in sigma through its last values."""
import torch

# A forecast is a blend of polynomial orders: {order: share}, shares summing to 1.
FORECASTS = {"hold": {0: 1.0}, "linear": {1: 1.0}, "quadratic": {2: 1.0}, "blend": {1: 1 / 3, 2: 2 / 3}}


def lagrange(nodes, sigma):
    """Weights of the values at `nodes` in their interpolation polynomial at `sigma` (floats)."""
    weights = []
    for i, a in enumerate(nodes):
        weight = 1.0
        for j, b in enumerate(nodes):
            if j != i:
                weight *= (sigma - b) / (a - b)
        weights.append(weight)
    return weights


def forecast_weights(nodes, sigma, forecast):
    """Weight of each value at `nodes` (newest first) in the blended forecast at `sigma`."""
    weights = [0.0] * len(nodes)
    for order, share in forecast.items():
        for i, weight in enumerate(lagrange(nodes[:order + 1], sigma)):
            weights[i] += share * weight
    return weights


class History:
    """The last values of one quantity in bands with the sigmas they were computed at, newest first."""

    def __init__(self, forecast):
        """`forecast`: blend of orders, {order: share}."""
        self.forecast = forecast
        self.depth = max(forecast) + 1
        self.clear()

    def push(self, sigma, bands):
        """Remember `bands` (tuple of tensors [batch, ...] that add up to the quantity) as computed at `sigma`."""
        kept = self.others(sigma)[:self.depth - 1]
        newest = torch.stack(bands)[None]
        self.stack = torch.cat([newest, self.stack[kept]]) if kept else newest
        self.nodes = [sigma, *(self.nodes[i] for i in kept)]

    def others(self, sigma):
        """Places of the values computed elsewhere than at `sigma`.

        Two-stage samplers visit a sigma twice; a polynomial needs distinct nodes.
        """
        return [i for i, node in enumerate(self.nodes) if abs(node - sigma) > 1e-6 * max(abs(sigma), 1e-6)]

    def clear(self):
        """Forget everything."""
        self.nodes, self.stack = [], None

    @property
    def ready(self):
        """True when the forecast has as many values as its order needs."""
        return len(self.nodes) == self.depth

    def weights(self, sigma):
        """Weight of every value in the forecast at `sigma`, tensor [1 or batch, bands, nodes]."""
        weights = forecast_weights(self.nodes, sigma, self.forecast)
        return numbers(weights, self.stack).expand(1, self.stack.shape[1], -1)

    def at(self, sigma, onto=None, scale=None, bands=None, values=()):
        """`onto` + `scale` * the forecast at `sigma`: a new tensor, by one product over all that is held.

        onto: [batch, ...], None for zero; scale: [batch, 1, ...], None for one; bands: floats, one
        weight for each band, None for ones; values: floats, one weight for each of the newest values, in
        place of the forecast's own.
        """
        weights = self._given(values) if values else self.weights(sigma)
        if bands is not None:
            weights = weights * numbers(bands, self.stack)[:, None]
        return self.weighted(weights, onto, scale)

    def weighted(self, weights, onto=None, scale=None):
        """`onto` + `scale` * what is held, summed up with `weights` [1 or batch, bands, nodes]; see `at`."""
        nodes, count, batch, *shape = self.stack.shape
        held = self.stack.reshape(nodes * count, batch, -1).transpose(0, 1)
        weights = weights.mT.reshape(-1, 1, nodes * count).expand(batch, -1, -1)
        if scale is not None:
            weights = weights * scale.to(weights.dtype).reshape(-1, 1, 1)
        base = held.new_zeros(1, 1, 1) if onto is None else onto.to(held.dtype).reshape(batch, 1, -1)
        return torch.baddbmm(base, weights, held).reshape(batch, *shape)

    def tensors(self):
        """Every tensor held."""
        return [] if self.stack is None else [self.stack]

    def _given(self, values):
        padded = [*values, *[0.0] * (len(self.nodes) - len(values))]
        return numbers(padded, self.stack).expand(1, self.stack.shape[1], -1)


def numbers(values, like):
    """Floats as a tensor of the dtype and on the device of `like`, without waiting for that device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
