"""Naive references of the paper's equations and of search: one image, caption, head and row at a time.

They read the weights of a model, but never call the code under test.
"""
