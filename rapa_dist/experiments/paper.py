"""The paper's numbers for CIFAR-10: Rasch, Gokmen, Rigotti, Haensch (arXiv 1807.01356), errors in %."""

Pair = tuple[float, float]

TABLE_1: dict[str, Pair] = {
    "none": (18.85, 2.37),
    "perforated": (30.79, 25.93),
    "enlarged": (17.75, 0.25),
    "random-fixed": (24.42, 3.86),
    "random": (17.67, 5.81),
    "image-overlap": (24.52, 0.99),
    "image-pad": (25.86, 6.53),
    "alternate": (21.02, 3.98),
}
"""Best test and train error by scheme, max pooling."""

TABLE_2: dict[str, dict[str, Pair]] = {
    "max": {"none": (18.93, 0.35), "enlarged": (17.57, 0.04), "random": (17.67, 7.06)},
    "average": {"none": (24.46, 4.29), "enlarged": (23.28, 0.64), "random": (24.32, 7.64)},
    "mixed": {"none": (18.19, 0.42), "enlarged": (17.53, 0.04), "random": (17.37, 6.65)},
    "stochastic": {"none": (20.09, 15.7), "enlarged": (18.39, 11.02), "random": (21.15, 17.32)},
}
"""Best test and train error by pooling."""
VOTES_5 = {"max": 16.89, "average": 24.23, "mixed": 16.78, "stochastic": 18.84}
"""Test error of random by the majority of 5 votes (Table 2)."""
VOTES_9 = 16.83
"""The same of 128,32,8 tiles by 9 votes (§4)."""
REDUCED = {"max": 19.31, "average": 24.51, "mixed": 18.93, "stochastic": 21.19}
"""Test error of random, reduced to one kernel matrix per layer (Table 2)."""

GAP_CLOSED_AT_DB = 33.0
"""Signal-to-noise ratio at which the paper says how much of the gap to perfect robustness is closed (Fig. 4)."""
GAP_CLOSED = {"random": 41.0, "random-128x32x8": 64.0}
"""How much, in percent."""
