"""TPU pods by name, and what a program compiled for one costs: FLOPs, HBM traffic, collectives."""
