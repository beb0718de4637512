"""The origin (PyTorch) system's checkpoints: its tensor names, its files, and the way there and back."""
