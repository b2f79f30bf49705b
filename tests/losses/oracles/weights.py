"""The formulas of the weight functions."""

import math

import lightning_memdml as ml

WEIGHTS = {
    "constant": (ml.Constant(2.0), lambda s: 2.0),
    "threshold": (ml.Threshold(0.25), lambda s: float(s > 0.25)),
    "below a threshold": (ml.Threshold(0.25, above=False), lambda s: float(s < 0.25)),
    "linear": (ml.Linear(2.0, 0.5), lambda s: max(0.0, 2 * s + 0.5)),
    "falling": (ml.Linear(-1.0, 1.0), lambda s: 1 - s),
    "power": (ml.Power(0.2, 2.0), lambda s: (max(0.0, s - 0.2) / 0.8) ** 2),
    "exponential": (ml.Exponential(10.0), lambda s: math.exp(10 * (s - 1))),
    "falling exponential": (ml.Exponential(-5.0, center=-1.0), lambda s: math.exp(-5 * (s + 1))),
    "inverse distance": (ml.InverseDistance(3.0, 0.8), lambda s: min(1.0, 0.8 / math.sqrt(max(2 - 2 * s, 1e-9))) ** 3),
    "sigmoid": (ml.Sigmoid(20.0, 0.3), lambda s: 1 / (1 + math.exp(-20 * (s - 0.3)))),
    "band": (ml.Band(0.1, 0.6), lambda s: float(0.1 < s < 0.6)),
    "piecewise": (ml.Piecewise([-0.5, 0.0, 0.5], [0.0, 0.0, 3.0]), lambda s: min(3.0, max(0.0, 6 * s))),
    "piecewise from the start": (ml.Piecewise([-0.5, 0.5], [1.0, 3.0]), lambda s: min(3.0, max(1.0, 2 * s + 2))),
}
