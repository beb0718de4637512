"""What `calibrate` minimises by default, and how hard it tries (GROWTH.md 7; the equations: `growth.calibration`)."""

OBJECTIVES = ("blocks", "final", "kl")
OBJECTIVE, ITERATIONS, RIDGE = "kl", 6, 1e-3
