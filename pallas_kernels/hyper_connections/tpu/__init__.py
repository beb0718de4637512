"""The parts of the TPU kernels: plan, Sinkhorn, bodies, launches, costs."""
