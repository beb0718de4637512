"""The gated delta rule: see `api`."""
