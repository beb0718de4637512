"""The parts of the TPU kernels: layouts, bodies, launches, costs."""
