"""What `experiments.bench_gpu` measures, and with what."""
