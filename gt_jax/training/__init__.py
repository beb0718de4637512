"""The training loop and its parts: one step, loss, optimizer, compute price, thaw, stopping, and the compiled step."""
