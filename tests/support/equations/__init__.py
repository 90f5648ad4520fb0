"""Naive references: the paper's equations and the searches, one image, one caption, one head and one row at a time.

They read the weights of a model, but call none of the code that a test compares with them, so that the test can fail.
"""
