"""What the TPU kernels cost on a chip that is not here: chips, cases, and reading what the compiler wrote."""
