"""Measurements of cost, side by side in one run; never tests."""
