"""The parts of the kernels for Hopper: what fits, layouts, warpgroup products, the kernels."""
