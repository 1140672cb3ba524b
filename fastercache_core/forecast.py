"""How a cached quantity is carried forward: a polynomial in sigma through its last values."""

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


def combine(tensors, weights):
    """Sum of tensors times their weights, in a new tensor of the first one's shape and dtype.

    weights: as many floats, or tensors that broadcast.
    """
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if isinstance(weight, float):
            total.add_(tensor, alpha=weight)
        else:
            total.addcmul_(tensor, weight)
    return total


class History:
    """The last values of one quantity with the sigmas they were computed at, newest first."""

    def __init__(self, forecast):
        """`forecast`: blend of orders, {order: share}."""
        self.forecast = forecast
        self.depth = max(forecast) + 1
        self.values = []

    def push(self, sigma, bands):
        """Remember `bands` (tuple of tensors that add up to the quantity) as computed at `sigma`."""
        # Two-stage samplers visit a sigma twice; a polynomial needs distinct nodes.
        kept = [v for v in self.values if abs(v[0] - sigma) > 1e-6 * max(abs(sigma), 1e-6)]
        self.values = [(sigma, bands), *kept[:self.depth - 1]]

    def clear(self):
        """Forget everything."""
        self.values = []

    @property
    def ready(self):
        """True when the forecast has as many values as its order needs."""
        return len(self.values) == self.depth

    def at(self, sigma):
        """Forecast of every band at `sigma`: a tuple of new tensors."""
        weights = forecast_weights(self.nodes, sigma, self.forecast)
        return tuple(combine(band, weights) for band in zip(*(bands for _, bands in self.values)))

    @property
    def nodes(self):
        """Sigmas of the values held, newest first."""
        return [sigma for sigma, _ in self.values]

    def tensors(self):
        """Every tensor held."""
        return [tensor for _, bands in self.values for tensor in bands]
