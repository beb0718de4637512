"""Does growth pay? The settings of the study, what every contender may cost, their training, and what is claimed."""
