"""Delayed flights: four tasks of different kinds and scales, with missing labels, under every balancer.

``python -m example`` trains with every balancer, and each task alone, from several seeds; it prints a table and draws
figures. ``python -m example --help`` lists the options. :mod:`example.training` is the pattern to copy, and
:mod:`example.methods` says what is compared. ``python -m example toy``
animates two tasks on a representation of two numbers.
"""
