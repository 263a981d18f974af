"""Chooses shares of training data: before a run by designs, surrogates and laws, during it by controllers."""
