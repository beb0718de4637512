"""The language model and its layers, the operations they cost, and rows that are longer than a memory chunk."""
