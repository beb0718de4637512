"""What gates give on text: the models of the study, their training, and what is asked of them."""
