"""The colour scale of objectives: dark is good, and it can be told from light and from dark paper."""

RAINFALL = [
    [0.0, "#2a3f9d"],
    [0.2, "#2f7fb9"],
    [0.4, "#35b0a0"],
    [0.6, "#8fd06a"],
    [0.8, "#e6d95c"],
    [1.0, "#f2a65a"],
]
