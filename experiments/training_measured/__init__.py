"""The two sides of `bench_training`: the same model here and in PyTorch, each in a process of its own."""
