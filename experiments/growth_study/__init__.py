"""The study behind experiments/growth_operators.py: which way of growing an adaptive checkpoint is best?"""
