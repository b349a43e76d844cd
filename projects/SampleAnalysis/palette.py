"""Colours and line styles of all figures."""

DPI = 90
# Okabe and Ito's colours, which people with any colour vision can distinguish.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER = "#56B4E9", "#E69F00"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, "black")
COLORS = {"random": BLUE, "hard": ORANGE, "prime": GREEN}
# Colours and lines of runs; the baseline first.
STYLES = (
    ("black", "-"),
    (BLUE, "--"),
    (ORANGE, "-."),
    (GREEN, ":"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1))),
    (AMBER, (0, (1, 1))),
    (SKY, (0, (8, 2))),
)
