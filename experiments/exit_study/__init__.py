"""Does leaving the stack early save time at equal loss? Models, measuring, figures and report of the study."""
