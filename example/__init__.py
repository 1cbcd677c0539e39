"""Delayed flights: four tasks of different kinds and scales, with missing labels, under every balancer.

``python -m example`` trains one network per balancer with pytorch-ignite and prints how well each does on every task;
``python -m example --help`` lists the options. :mod:`example.training` is the pattern to copy.
"""
