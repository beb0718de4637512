"""The study of retrofitted models: does a plain model that is made adaptive use its passes, and are they worth it?"""
