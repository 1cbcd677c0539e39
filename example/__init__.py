"""Delayed flights: four tasks of different kinds and scales, with missing labels, under ten ways to balance them.

``python -m example`` trains with each of them, and each task alone, from several seeds; it prints a table and draws
figures. ``python -m example --help`` lists the options. :mod:`example.training` is the pattern to copy, and
:mod:`example.methods` says what is compared.

``python -m example toy`` animates two tasks on a representation of two numbers. ``python -m example study`` compares
every balancer on several problems, all tuned with the same budget: :mod:`example.study`.
"""
