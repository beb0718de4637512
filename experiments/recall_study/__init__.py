"""Is the recurrent state of a hybrid used? Needle questions, models, the state test, checks of the machine, scaling."""
