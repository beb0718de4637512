"""Is depth used? The models of the study, their training, and what is asked of them."""
