"""Checkpoints on disk, the only room that imports Orbax: trees, runs, folders, arrays read and written in slices."""
